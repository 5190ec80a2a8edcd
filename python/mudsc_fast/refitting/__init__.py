"""Refitting merged networks by least squares; see :func:`mudsc_fast.refit`."""

from mudsc_fast.refitting.refit import refit

__all__ = ["refit"]
