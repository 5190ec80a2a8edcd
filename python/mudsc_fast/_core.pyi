from typing import Final

__version__: Final[str]
compiler: Final[str]
isa_levels: Final[tuple[str, ...]]
supported_isa: Final[int]
has_cuda: Final[bool]

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
) -> None: ...
def zip_units(
    similarity: int,
    scalar_type: int,
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
