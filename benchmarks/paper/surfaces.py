"""The loss landscape around the merges of a pair, as in the paper's figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

import mudsc_fast
from mudsc_fast._files import atomic_write
from mudsc_fast.plot import Evaluate, landscape
from paper.methods import SPACES, Setting, collected, has_batch_norm, normalized


def draw(
    models: Sequence[nn.Module],
    setting: Setting,
    evaluate: Evaluate,
    balance: float,
    normalization: Any,
    *,
    steps: int,
    cache: Path,
    path: Path,
) -> None:
    """Draw the loss on the plane of the first two principal components of seven networks.

    They are the first network of the pair and, for each of the three spaces, the second network matched to the first
    and the mean of both.
    """
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    prepared = [normalized(model, setting) for model in models]
    statistics = collected(prepared, setting, "align")
    networks, labels = [models[0]], ["task 1"]
    for space in SPACES:
        matching = mudsc_fast.match(
            prepared,
            None if space == "weight" else statistics,
            spec=setting.spec,
            space=space,
            balance=balance if space == "dual" else 0.5,
        )
        merged = matching.merge(prepared).model
        assert merged is not None
        networks += [merged, matching.permute(prepared[1], 1)]
        labels += [f"{space} merge", f"task 2, {space}"]
    cache.parent.mkdir(parents=True, exist_ok=True)
    surface = landscape(
        networks,
        evaluate,
        steps=steps,
        batch_norm_data=normalization if has_batch_norm(models[0]) else None,
        cache=cache,
    )
    figure = surface.plot(labels)[0].figure
    assert isinstance(figure, Figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
