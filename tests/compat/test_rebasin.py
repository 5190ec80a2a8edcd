"""Weight matching with the interface of git-re-basin's ports, and the package rebasin with a patch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import mudsc_fast
from mudsc_fast.compat import rebasin
from networks import CONV_SPEC, MLP_AXES, ConvNet, make_mlp, random_permutations

MLP = rebasin.permutation_spec_from_axes_to_perm(MLP_AXES)


def by_definition(
    axes: Mapping[str, tuple[str | None, ...]], a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """Algorithm 1 of the paper on NumPy arrays with scipy, recomputing every permutation at each visit."""
    names = list(dict.fromkeys(name for row in axes.values() for name in row if name))
    found = {
        name: np.arange(next(a[t].shape[row.index(name)] for t, row in axes.items() if name in row)) for name in names
    }
    torch.manual_seed(seed)
    for _ in range(100):
        better = False
        for index in torch.randperm(len(names)).tolist():
            name = names[index]
            total = 0.0
            for tensor, row in axes.items():
                for axis, held in enumerate(row):
                    if held != name:
                        continue
                    moved = b[tensor]
                    for other, by in enumerate(row):
                        if by is not None and other != axis:
                            moved = np.take(moved, found[by], axis=other)
                    flat = [np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1) for x in (a[tensor], moved)]
                    total = total + flat[0] @ flat[1].T
            assert isinstance(total, np.ndarray)
            rows, columns = linear_sum_assignment(total, maximize=True)
            better |= bool(total[rows, columns].sum() > total[rows, found[name]].sum() + 1e-12)
            found[name] = columns
        if not better:
            break
    return found


@pytest.mark.parametrize("seed", range(3))
def test_matches_published_algorithm(seed: int) -> None:
    a, b = (make_mlp(seed=2 * seed + i, dtype=torch.float64).state_dict() for i in range(2))
    expected = by_definition(MLP_AXES, {k: v.numpy() for k, v in a.items()}, {k: v.numpy() for k, v in b.items()}, 7)
    torch.manual_seed(7)
    found = rebasin.weight_matching(MLP, a, b, silent=True)
    assert list(found) == ["fc1", "fc2"]
    for name, permutation in found.items():
        assert permutation.dtype == torch.int64
        assert permutation.tolist() == expected[name].tolist()


def test_finds_permutations_of_permuted_network() -> None:
    model = ConvNet()
    permutations = random_permutations(CONV_SPEC, model, 5)
    other = mudsc_fast.permute_state_dict(model.state_dict(), CONV_SPEC, permutations)
    spec = rebasin.permutation_spec_from_axes_to_perm(
        {
            tensor: tuple(segments[0].axis.node if segments[0].axis else None for segments in layout)
            for tensor, layout in CONV_SPEC.layouts.items()
        }
    )
    found = rebasin.weight_matching(spec, model.state_dict(), other, silent=True)
    restored = rebasin.apply_permutation(spec, found, other)
    assert list(restored) == list(other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(restored[name], tensor)


def test_starts_from_given_permutations(caplog: pytest.LogCaptureFixture) -> None:
    a, b = (make_mlp(seed=seed).state_dict() for seed in range(2))
    torch.manual_seed(0)
    best = rebasin.weight_matching(MLP, a, b, silent=True)
    kept = {name: permutation.clone() for name, permutation in best.items()}
    with caplog.at_level(logging.INFO):
        again = rebasin.weight_matching(MLP, a, b, init_perm=best)
    for name in best:
        assert torch.equal(again[name], kept[name])
        assert torch.equal(best[name], kept[name])
    assert "iteration 0, permutation fc" in caplog.text
    identity = rebasin.weight_matching(MLP, a, b, max_iter=0)
    assert all(torch.equal(order, torch.arange(32)) for order in identity.values())


def test_errors_name_permutation() -> None:
    state = make_mlp().state_dict()
    with pytest.raises(ValueError, match="init_perm must hold the permutations fc1, fc2, got fc1"):
        rebasin.weight_matching(MLP, state, state, init_perm={"fc1": torch.arange(32)})
    with pytest.raises(ValueError, match=r"init_perm\['fc2'\] must be a permutation of 32 units"):
        rebasin.weight_matching(MLP, state, state, init_perm={"fc1": torch.arange(32), "fc2": torch.zeros(32)})


def test_rebasin_package_gives_same_result_when_patched() -> None:
    package = pytest.importorskip("rebasin", reason="the extra 'compat' (pip install rebasin) is not installed")
    results: list[dict[str, Tensor]] = []
    for patched in (False, True):
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 5))
        second = copy.deepcopy(first)
        for module in second:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        batch = torch.randn(4, 20)

        def run() -> None:
            package.PermutationCoordinateDescent(first, second, batch).rebasin()  # noqa: B023 - called at once

        if patched:
            with mudsc_fast.patch(only=["rebasin"]) as patch:
                run()
            assert patch.patched == ("rebasin.permutation_coordinate_descent.linear_sum_assignment",)
        else:
            run()
        results.append(second.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name])
