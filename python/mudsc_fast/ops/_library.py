"""The ops as torch sees them: ``torch.ops.mudsc_fast``, known to FakeTensor, torch.compile and torch.export.

A public function that is traced calls the op of its name here instead of its kernel, with tensors and plain numbers
only; when the op runs, it calls the public function on real tensors, which checks their values and chooses the kernel.
Untraced calls do not come this way and pay nothing. No op has a gradient, and each says so when it is asked for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from mudsc_fast.ops.correlation import Blocks, Precision

_library = torch.library.Library("mudsc_fast", "DEF")


def traced(tensor: object) -> bool:
    """Return whether an op on this tensor is recorded or simulated rather than computed."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor) or _len_torch_dispatch_stack() > 0


# The host waits for a device in most of these, or copies to it, which a CUDA graph cannot hold. Older versions of torch
# do not know the tag.
_TAGS = [torch.Tag.pt2_compliant_tag, *filter(None, [getattr(torch.Tag, "cudagraph_unsafe", None)])]


def _define(schema: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an op whose kernel runs on every device, its shapes, and its refusal of gradients."""
    name = schema.partition("(")[0]
    _library.define(schema, tags=_TAGS)

    def refuse_gradients(*arguments: Any) -> Any:
        tensors = [part for value in arguments for part in (value if isinstance(value, (list, tuple)) else [value])]
        if torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in tensors):
            raise ValueError(
                f"mudsc_fast::{name} has no gradient: call under torch.no_grad() or pass tensors that require none"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return getattr(torch.ops.mudsc_fast, name)(*arguments)

    for device in ("CPU", "CUDA"):
        _library.impl(name, compute, device)
    _library.impl(name, refuse_gradients, "Autograd")
    torch.library.register_fake(f"mudsc_fast::{name}", fake, lib=_library)


# ---- permute_merge: of each mapped axis its place, index, lengths, kind and scale ---------------------------------


def _permute_merge(
    tensors: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor],
    units_in: Sequence[int],
    units_out: Sequence[int],
    are_permutations: Sequence[bool],
    scales: Sequence[Tensor | None],
    weights: Sequence[float],
) -> Tensor:
    from mudsc_fast.ops.permute import UnitMap, permute_merge

    maps = {
        axis: UnitMap(index, before, after, is_permutation, scale)
        for axis, index, before, after, is_permutation, scale in zip(
            axes, indices, units_in, units_out, are_permutations, scales, strict=True
        )
    }
    return permute_merge(tensors, maps, weights=weights)


def _permute_merge_fake(
    tensors: Sequence[Tensor],
    axes: Sequence[int],
    indices: Sequence[Tensor],  # noqa: ARG001
    units_in: Sequence[int],  # noqa: ARG001
    units_out: Sequence[int],
    are_permutations: Sequence[bool],  # noqa: ARG001
    scales: Sequence[Tensor | None],  # noqa: ARG001
    weights: Sequence[float],  # noqa: ARG001
) -> Tensor:
    shape = list(tensors[0].shape)
    for axis, length in zip(axes, units_out, strict=True):
        shape[axis] = length
    return tensors[0].new_empty(shape)


_define(
    "permute_merge(Tensor[] tensors, int[] axes, Tensor[] indices, SymInt[] units_in, SymInt[] units_out, "
    "bool[] are_permutations, Tensor?[] scales, float[] weights) -> Tensor",
    _permute_merge,
    _permute_merge_fake,
)

# ---- linear_assignment --------------------------------------------------------------------------------------------


def _linear_assignment(
    similarity: Tensor, maximize: bool, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from mudsc_fast.ops.assignment import linear_assignment

    found = linear_assignment(similarity, maximize=maximize, tolerance=tolerance)
    return found.columns, found.objective, found.row_duals, found.column_duals, found.gap


def _linear_assignment_fake(
    similarity: Tensor,
    maximize: bool,  # noqa: ARG001
    tolerance: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *batch, rows, columns = similarity.shape
    numbers = [similarity.new_empty(shape, dtype=torch.float64) for shape in (batch, [*batch, rows], [*batch, columns])]
    assigned = similarity.new_empty([*batch, rows], dtype=torch.int64)
    return assigned, numbers[0], numbers[1], numbers[2], similarity.new_empty(batch, dtype=torch.float64)


_define(
    "linear_assignment(Tensor similarity, bool maximize, float tolerance) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_assignment,
    _linear_assignment_fake,
)

# ---- zip_units: the value as a tensor -----------------------------------------------------------------------------


def _zip_units(
    similarity: Tensor, num_models: int, remaining: int, budget: int, shrink: float
) -> tuple[Tensor, Tensor, Tensor]:
    from mudsc_fast.ops.zip import zip_within_budget

    zipped = zip_within_budget(similarity, num_models, remaining, budget, shrink)
    value = torch.tensor(zipped.value, dtype=torch.float64, device=similarity.device)
    return zipped.cluster_of_unit, zipped.sizes, value


def _zip_units_fake(
    similarity: Tensor,
    num_models: int,  # noqa: ARG001
    remaining: int,
    budget: int,  # noqa: ARG001
    shrink: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        similarity.new_empty(similarity.shape[0], dtype=torch.int64),
        similarity.new_empty(remaining, dtype=torch.int64),
        similarity.new_empty((), dtype=torch.float64),
    )


_define(
    "zip_units(Tensor similarity, int num_models, SymInt remaining, SymInt budget, float shrink) "
    "-> (Tensor, Tensor, Tensor)",
    _zip_units,
    _zip_units_fake,
)

# ---- correlation_update: the sums of an accumulator, in place; returns whether the features were in range ---------


def _correlation_update(
    mean: Tensor,
    squares: Tensor,
    comoments: Tensor,
    num_samples: int,
    features: Sequence[Tensor],
    channel_axis: int,
    blocks: Blocks,
    precision: Precision,
) -> Tensor:
    from mudsc_fast.ops.correlation import CorrelationAccumulator

    sums = CorrelationAccumulator.of_sums(mean, squares, comoments, num_samples, blocks, precision)
    sums.update(*features, channel_axis=channel_axis)
    return sums.in_range


def _correlation_update_fake(
    mean: Tensor,
    squares: Tensor,  # noqa: ARG001
    comoments: Tensor,  # noqa: ARG001
    num_samples: int,  # noqa: ARG001
    features: Sequence[Tensor],  # noqa: ARG001
    channel_axis: int,  # noqa: ARG001
    blocks: str,  # noqa: ARG001
    precision: str,  # noqa: ARG001
) -> Tensor:
    return mean.new_empty((), dtype=torch.bool)


_define(
    "correlation_update(Tensor(a!) mean, Tensor(b!) squares, Tensor(c!) comoments, SymInt num_samples, "
    "Tensor[] features, int channel_axis, str blocks, str precision) -> Tensor",
    _correlation_update,
    _correlation_update_fake,
)
