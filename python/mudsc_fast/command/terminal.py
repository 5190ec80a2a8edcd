"""Messages on stderr, in color if it is a terminal."""

from __future__ import annotations

import logging
import os
import sys
from types import TracebackType

_COLORS = {"error": "31", "warning": "33", "hint": "36"}

_LOGGER = logging.getLogger("mudsc_fast")


def in_color() -> bool:
    """Return whether stderr is a terminal that shows colors (https://no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Messages(logging.Handler):
    """Shows warnings of the package while it is entered, and errors.

    Parameters
    ----------
    prefix
        What each message begins with: the command.
    quiet
        Whether to leave out warnings.
    """

    def __init__(self, prefix: str, *, quiet: bool) -> None:
        super().__init__(logging.WARNING)
        self._prefix = prefix
        self._quiet = quiet

    def __enter__(self) -> Messages:
        """Start to show the package's log messages."""
        self._propagated = _LOGGER.propagate
        _LOGGER.propagate = False
        _LOGGER.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous logging."""
        _LOGGER.removeHandler(self)
        _LOGGER.propagate = self._propagated

    def emit(self, record: logging.LogRecord) -> None:
        """Show a logged warning."""
        if not self._quiet:
            self._show("warning", record.getMessage())

    def error(self, text: str) -> None:
        """Show an error."""
        self._show("error", text)

    def hint(self, text: str) -> None:
        """Show advice."""
        self._show("hint", text)

    def _show(self, kind: str, text: str) -> None:
        label = f"{kind}:"
        if in_color():
            label = f"\x1b[1;{_COLORS[kind]}m{label}\x1b[0m"
        print(f"{self._prefix}: {label} {text}", file=sys.stderr)
