"""Back ends: every folder holds the same file names, one per op; `reference` defines what is correct."""
