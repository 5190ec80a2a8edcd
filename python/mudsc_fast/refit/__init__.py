"""Refitting merged networks by least squares; see :func:`mudsc_fast.refit`."""

from mudsc_fast.refit.refit import DEFAULT_RIDGES, refit

__all__ = ["DEFAULT_RIDGES", "refit"]
