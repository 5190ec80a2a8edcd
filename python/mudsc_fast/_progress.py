"""Progress bars: on by default for long work in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

#: Seconds before an automatic progress bar appears, so that short work shows none.
_DELAY = 2.0


def progress_bar(
    iterable: Iterable[Any] | None = None, *, description: str, progress: bool | None, total: int | None = None
) -> tqdm[Any]:
    """Return a progress bar on stderr.

    Parameters
    ----------
    iterable
        What to iterate over, if anything.
    description
        The text before the bar.
    progress
        True shows the bar, False does not, None shows it if stderr is a terminal and the work is long.
    total
        The number of steps, if `iterable` has no length.
    """
    return tqdm(
        iterable,
        desc=description,
        total=total,
        disable=None if progress is None else not progress,
        delay=_DELAY if progress is None else 0,
        leave=progress is not None,
    )
