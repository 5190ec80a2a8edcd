from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mudsc_fast.compat.pleas import lsa_solver


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (5, 9), (200, 200)])
@pytest.mark.parametrize("maximize", [True, False])
def test_matches_scipy(shape: tuple[int, int], maximize: bool) -> None:
    similarity = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    columns = lsa_solver(similarity, maximize=maximize) if not maximize else lsa_solver(similarity)
    assert columns.dtype == torch.int64
    assert columns.device == similarity.device
    assert columns.tolist() == linear_sum_assignment(similarity.numpy(), maximize=maximize)[1].tolist()


def test_input_may_require_gradients() -> None:
    assert lsa_solver(torch.eye(3).requires_grad_()).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(3,), (3, 2), (1, 3, 3)])
def test_more_rows_than_columns_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"A must be \[n, m\] with n <= m, got shape"):
        lsa_solver(torch.zeros(shape))
