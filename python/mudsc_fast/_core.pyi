from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Result = TypeVar("Result")

__version__: Final[str]
compiler: Final[str]
isa_levels: Final[tuple[str, ...]]
supported_isa: Final[int]
cuda_problem: Final[str]

def assign_array(cost_matrix: object, maximize: object, /) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None: ...
def solve_array(
    similarity: object, maximize: object, threshold: object, result_type: type[Result] | None, /
) -> Result | NDArray[np.int64] | None: ...
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
def plain_permute_merge(
    torch: ModuleType, map_type: type
) -> Callable[[object, object, object, object], Tensor | None] | None: ...
def permute_merge(
    isa: int,
    threads: int,
    dtype: int,
    tensors: list[int],
    weights: list[float],
    outer: int,
    middle: int,
    inner: int,
    rows: tuple[int, int, int, int, int],
    columns: tuple[int, int, int, int, int],
    out: int,
    out_is_new: bool,
) -> None: ...
def permute_in_place(
    isa: int,
    threads: int,
    dtype: int,
    outer: int,
    middle: int,
    inner: int,
    rows: tuple[int, int, int, int, int],
    columns: tuple[int, int, int, int, int],
    out: int,
) -> None: ...
def zip_units(
    similarity: int,
    dtype: int,
    row_stride: int,
    units: int,
    num_models: int,
    remaining: int,
    budget: int,
    shrink: float,
    cluster_of_unit: int,
    values: int,
    isa: int,
) -> int: ...
def center_features(
    isa: int,
    threads: int,
    dtype: int,
    features: int,
    outer: int,
    units: int,
    inner: int,
    outer_stride: int,
    unit_stride: int,
    inner_stride: int,
    outer_order: tuple[int, int, int],
    inner_order: tuple[int, int, int],
    centered_dtype: int,
    unit_major: bool,
    centered: int,
    mean: int,
    squares: int,
) -> None: ...
def accumulate_comoment(
    isa: int,
    threads: int,
    product_dtype: int,
    product: int,
    row_shift: int,
    column_shift: int,
    units: int,
    comoment: int,
) -> None: ...
def correlate(
    isa: int,
    threads: int,
    comoment: int,
    row_deviation: int,
    column_deviation: int,
    units: int,
    count: float,
    eps: float,
    dtype: int,
    out: int,
    mirror: int,
    row_stride: int,
    other: int,
    other_stride: int,
    balance: float,
) -> None: ...
