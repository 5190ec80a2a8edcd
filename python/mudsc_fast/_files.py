"""Files that are replaced atomically."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path in the same folder to write to; the file replaces `path` if the enclosed code succeeds."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def torch_save(content: Any, file: str | os.PathLike[str] | IO[bytes]) -> None:
    """Call ``torch.save``, and raise an OSError if a write fails."""
    try:
        torch.save(content, file)
    except RuntimeError as error:  # torch raises it when a write to the file fails
        reason = str(error).partition("\n")[0]
        raise OSError(0, f"is the disk full? ({reason})") from error


def save(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a file of ``torch.save`` atomically.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    try:
        with atomic_write(path) as temporary:
            torch_save(content, temporary)
    except OSError as error:
        if error.errno:  # of the system, with the name of the file
            raise
        raise OSError(f"cannot write {os.fspath(path)}: {error.strerror}") from error


def load(path: str | os.PathLike[str], device: torch.device | str) -> Any:
    """Return the content of a file of ``torch.save``. Nothing in the file is executed.

    Raises
    ------
    OSError
        If it cannot be opened.
    ValueError
        If it is damaged.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened
            raise
        raise ValueError(str(error)) from error
