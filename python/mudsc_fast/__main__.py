"""``python -m mudsc_fast``."""

from mudsc_fast.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
