"""Files that are replaced atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def save(content: Any, path: str | os.PathLike[str]) -> None:
    """Write a file of ``torch.save`` atomically.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # torch raises it when a write to the file fails
            reason = str(error).partition("\n")[0]
            raise OSError(f"cannot write {os.fspath(path)}: is the disk full? ({reason})") from error
