from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mudsc_fast.unit_map import UnitMap

_Result = TypeVar("_Result")

__version__: Final[str]
ZIP_NOT_FINITE: Final[int]
compiler: Final[str]
isa_levels: Final[tuple[str, ...]]
supported_isa: Final[int]
cuda_problem: Final[str]

def assign_array(cost_matrix: object, maximize: object, /) -> tuple[Any, Any] | None: ...
def solve_array(
    similarity: object, maximize: object, threshold: object, result_type: type[_Result] | None, /
) -> _Result | Tensor | None: ...
def assign_both_ways(
    cost_matrix: object, threshold: object, need_square: object, /
) -> tuple[float, NDArray[np.int32], NDArray[np.int32]] | None: ...
def solve_list(
    arrays: list[NDArray[Any]], maximize: bool, threshold: float | None, return_duals: bool, isa: int, threads: int
) -> tuple[list[Any], list[int]]: ...
def linear_assignment(
    values: NDArray[Any],
    dtype: int,
    maximize: bool,
    tolerance: float,
    prices: NDArray[np.float64] | None,
    isa: int,
    threads: int,
) -> tuple[NDArray[Any], ...]: ...
def pairwise_assignment(
    x: NDArray[np.float32],
    y: NDArray[np.float32],
    squared_distance: bool,
    maximize: bool,
    tolerance: float,
    prices: NDArray[np.float64] | None,
    isa: int,
    threads: int,
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], float, float] | None: ...
def read_tensors_by_attributes(enabled: bool) -> None: ...
def fast_permute_merge(
    torch: ModuleType, map_type: type
) -> Callable[[object, object, object, object], Tensor | None] | None: ...
def permute_merge(
    tensors: list[Tensor],
    maps: dict[int, UnitMap],
    weights: list[float],
    out: Tensor,
    out_is_new: bool,
    isa: int,
    threads: int,
) -> None: ...
def permute_in_place(tensor: Tensor, maps: dict[int, UnitMap], isa: int, threads: int) -> None: ...
def permute_view(shape: Sequence[int], axes: list[int]) -> tuple[int, int, int, int, int, int, int]: ...
def zip_units(
    similarity: Tensor,
    num_models: int,
    remaining: int,
    budget: int,
    shrink: float,
    cluster_of_unit: Tensor,
    values: Tensor,
    isa: int,
) -> int: ...

_Order: TypeAlias = tuple[Tensor, Tensor | None, Tensor | None]

def center_features(
    features: Tensor,
    outer_order: _Order | None,
    inner_order: _Order | None,
    centered: Tensor,
    mean: Tensor,
    squares: Tensor,
    isa: int,
    threads: int,
) -> None: ...
def accumulate_comoment(
    comoment: Tensor, product: Tensor, row_shift: Tensor, column_shift: Tensor, isa: int, threads: int
) -> None: ...
def correlate(
    comoment: Tensor,
    row_deviation: Tensor,
    column_deviation: Tensor,
    count: float,
    eps: float,
    out: Tensor,
    mirror: Tensor | None,
    other: Tensor | None,
    balance: float,
    isa: int,
    threads: int,
) -> None: ...
