"""Messages on stderr, in color if it is a terminal."""

from __future__ import annotations

import logging
import os
import re
import sys
from types import TracebackType

from mudsc_fast._forward import FORWARD_HINT

_COLORS = {"error": "31", "warning": "33", "hint": "36"}

_LOGGER = logging.getLogger("mudsc_fast")

#: Options of the command that are called otherwise than the argument in Python.
_OPTION_OF_ARGUMENT = {"build": "model", "file_format": "format"}

_ARGUMENT = (
    r"(spec|data|build|space|balance|weights|shrink|budget|mode|task_heads|ignore|dequantize|dtype|file_format|shard_size"
    r"|random_state|max_sweeps|patience|precision)"
)

#: What the command has in place of objects of Python.
_WORDS = {
    "verify=False": "--no-verify",
    "the models as modules": "--model",
    "spec: a PermutationSpec, ": "spec: ",
    FORWARD_HINT: "",
}

#: An argument of Python in a message: ``spec='mlp'``, ``pass data`` or ``weights must ...`` at the beginning of a line.
_GIVEN = re.compile(
    rf"(?<![\w.]){_ARGUMENT}="
    r"(?:(?P<flag>True\b(?: to mudsc_fast[\w.]+)?)|'(?P<word>[\w.,:=-]+)'|(?P<value>(?=['\[\w])))?"
)
_NAMED = re.compile(rf"((?:^|: )(?=\w+ (?:must|names|needs)\b)|\b[Pp]ass ){_ARGUMENT}\b(?! to\b)", re.MULTILINE)


def as_options(message: str) -> str:
    """Return a message that names arguments of Python with the options of the command."""

    def option(name: str) -> str:
        return "--" + _OPTION_OF_ARGUMENT.get(name, name).replace("_", "-")

    def given(match: re.Match[str]) -> str:
        space = "" if match["word"] is None and match["value"] is None else " "
        return option(match[1]) + space + (match["word"] or "")

    for words, replacement in _WORDS.items():
        message = message.replace(words, replacement)
    return _NAMED.sub(lambda match: match[1] + option(match[2]), _GIVEN.sub(given, message))


def in_color() -> bool:
    """Return whether stderr is a terminal that shows colors (https://no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def label(kind: str) -> str:
    """Return what a message of a kind, such as an error, begins with."""
    return f"\x1b[1;{_COLORS[kind]}m{kind}:\x1b[0m" if in_color() else f"{kind}:"


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
            self._show("warning", as_options(record.getMessage()))

    def error(self, text: str) -> None:
        """Show an error."""
        self._show("error", as_options(text))

    def hint(self, text: str) -> None:
        """Show advice."""
        self._show("hint", text)

    def _show(self, kind: str, text: str) -> None:
        print(f"{self._prefix}: {label(kind)} {text}", file=sys.stderr)
