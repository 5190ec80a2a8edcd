"""The error of everything that reads or writes checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be read, written, or merged with another one. The message says why and what to do."""
