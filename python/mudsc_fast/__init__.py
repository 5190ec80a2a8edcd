"""Training-free merging of pretrained networks, and the fast kernels under it."""

from __future__ import annotations

__version__ = "0.1.0"
