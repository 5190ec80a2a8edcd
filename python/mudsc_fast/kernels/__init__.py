"""Backends: every folder has the same file names, one per op; `reference` defines the correct results."""
