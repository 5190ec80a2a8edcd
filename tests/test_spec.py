from __future__ import annotations

from typing import Any

import pytest
import torch

from mudsc_fast.spec import Axis, Groups, Observation, PermutationSpec, Window, consumes, mlp, produces
from networks import make_mlp

BAD: Any = 3
CHAIN = {
    "fc1.weight": ("a", None),
    "fc1.bias": ("a",),
    "fc2.weight": ("b", "a"),
    "fc2.bias": ("b",),
    "fc3.weight": (None, "b"),
    "fc3.bias": (None,),
}


def chain_state(widths: tuple[int, int, int, int] = (5, 7, 6, 4)) -> dict[str, torch.Tensor]:
    state = {}
    for index in range(3):
        state[f"fc{index + 1}.weight"] = torch.randn(widths[index + 1], widths[index])
        state[f"fc{index + 1}.bias"] = torch.randn(widths[index + 1])
    return state


def test_inverse_map_is_derived() -> None:
    spec = PermutationSpec(CHAIN)
    assert spec.nodes == ("a", "b")
    assert [(use.tensor, use.position, use.axis.role) for use in spec.uses("a")] == [
        ("fc1.weight", 0, "produce"),
        ("fc1.bias", 0, "produce"),
        ("fc2.weight", 1, "consume"),
    ]
    assert spec.neighbors("a") == ("b",)
    assert spec.units(chain_state()) == {"a": 7, "b": 6}


def test_default_observation_is_last_consumer() -> None:
    spec = PermutationSpec({**CHAIN, "head.weight": (None, "a")})
    assert spec.observations("a") == (Observation("head"),)
    assert spec.observations("b") == (Observation("fc3"),)


def test_observe_overrides_and_may_be_a_name() -> None:
    twice = [Observation("fc2", "output"), Observation("fc3")]
    spec = PermutationSpec(CHAIN, observe={"a": "fc2", "b": twice})
    assert spec.observations("a") == (Observation("fc2", "input", None),)
    assert spec.observations("b") == tuple(twice)


def test_node_without_consumer_has_no_observation() -> None:
    assert PermutationSpec({"fc.weight": ("a", None)}).observations("a") == ()


def test_roles_can_be_named() -> None:
    spec = PermutationSpec({"embedding": (None, produces("s")), "transposed.weight": (consumes("s"), None)})
    assert [(use.tensor, use.position, use.axis.role) for use in spec.uses("s")] == [
        ("embedding", 1, "produce"),
        ("transposed.weight", 0, "consume"),
    ]
    assert spec.observations("s") == (Observation("transposed"),)


def test_square_tensor_makes_node_its_own_neighbor() -> None:
    assert PermutationSpec({"fc.weight": ("a", "a")}).neighbors("a") == ("a",)


def test_from_nodes_equals_the_axes_map() -> None:
    nodes = {
        "a": [("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)],
        "b": [("fc2.weight", 0), ("fc2.bias", 0), ("fc3.weight", 1)],
    }
    expected = PermutationSpec({name: axes for name, axes in CHAIN.items() if name != "fc3.bias"})
    assert PermutationSpec.from_nodes(nodes) == expected
    assert hash(PermutationSpec.from_nodes(nodes)) == hash(expected)
    with_role = PermutationSpec.from_nodes({"s": [("embedding", 1, "produce")]})
    assert with_role == PermutationSpec({"embedding": (None, Axis("s", "produce"))})


def test_mlp_builder() -> None:
    renamed = {
        name: tuple({"a": "fc1", "b": "fc2"}.get(axis) if axis else None for axis in axes)
        for name, axes in CHAIN.items()
    }
    assert mlp(["fc1", "fc2", "fc3"]) == PermutationSpec(renamed)
    assert set(mlp(["fc1", "fc2"], bias=False).layouts) == {"fc1.weight", "fc2.weight"}


def test_axis_covered_twice() -> None:
    with pytest.raises(ValueError, match=r"axis 0 of 'w' is covered twice: by node 'a' and by node 'b'"):
        PermutationSpec.from_nodes({"a": [("w", 0)], "b": [("w", 0)]})


def test_node_covers_axis_twice() -> None:
    with pytest.raises(ValueError, match=r"axis 1 of 'w' is covered twice: by node 'a' and by node 'a'"):
        PermutationSpec.from_nodes({"a": [("w", 1), ("w", 1)]})


def test_missing_tensor() -> None:
    with pytest.raises(ValueError, match=r"spec names the tensor 'fc9.weight', which the models do not have"):
        PermutationSpec({**CHAIN, "fc9.weight": ("a",)}).units(chain_state())


def test_axis_of_another_length() -> None:
    state = chain_state()
    state["fc2.weight"] = torch.randn(6, 8)
    expected = r"axis 1 of 'fc2.weight' has 8 units, but node 'a' has 7 units on axis 0 of 'fc1.weight'"
    with pytest.raises(ValueError, match=expected):
        PermutationSpec(CHAIN).units(state)


def test_too_many_axes() -> None:
    with pytest.raises(ValueError, match=r"spec gives 2 axes to 'fc1.bias', which has 1: shape \(7,\)"):
        PermutationSpec({**CHAIN, "fc1.bias": ("a", None)}).units(chain_state())


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PermutationSpec({"w": (None,)}), ValueError, "at least one node"),
        (
            lambda: PermutationSpec({"w": (Axis("a", "produce", compared=False),)}),
            ValueError,
            "axes must name node 'a' on at least one axis that is compared, got none",
        ),
        (lambda: PermutationSpec({"w": "ab"}), TypeError, "sequence with one entry per axis"),
        (
            lambda: PermutationSpec({"w": (BAD,)}),
            TypeError,
            "axis 0 of 'w' must be the name of a node",
        ),
        (lambda: PermutationSpec(CHAIN, observe={"z": "fc1"}), ValueError, "observe names the node 'z'"),
        (lambda: PermutationSpec.from_nodes({"a": [("w", -1)]}), ValueError, "must not be negative, got -1"),
        (lambda: Observation("fc1", BAD), ValueError, "'input', 'output', 'projection', 'state', got 3"),
        (lambda: PermutationSpec({"w": ([],)}), TypeError, "axis 0 of 'w' must be .* got list"),
        (
            lambda: PermutationSpec({"w": ([Window("a", 0)],)}),
            ValueError,
            "width of a window must be at least 1, got 0",
        ),
        (
            lambda: Axis("a", BAD),
            ValueError,
            "role of node 'a' must be 'produce' or 'consume', got 3",
        ),
        (lambda: produces("a", inner=0), ValueError, "inner and outer of node 'a' must be at least 1, got 0 and 1"),
        (lambda: PermutationSpec(CHAIN, groups={"z": 2}), ValueError, "groups names the node 'z'"),
        (lambda: PermutationSpec(CHAIN, groups={"a": 0}), ValueError, r"groups\['a'\] must be at least 1, got 0"),
        (
            lambda: PermutationSpec(CHAIN, groups={"a": Groups(2, "t"), "b": Groups(3, "t")}),
            ValueError,
            "nodes with the same tie must have the same number of groups, got {'a': 2, 'b': 3}",
        ),
        (lambda: mlp(["fc1"]), ValueError, "at least two layers"),
        (lambda: mlp(["fc1", "fc1"]), ValueError, "distinct"),
    ],
)
def test_bad_specifications(build: object, error: type[Exception], message: str) -> None:
    assert callable(build)
    with pytest.raises(error, match=message):
        build()


def test_validation_reports_mismatched_observations() -> None:
    model = make_mlp((5, 7, 6, 4))
    spec = PermutationSpec(
        CHAIN, {"a": Observation("fc1", "output", -1, 0, 6), "b": Observation("fc2", "projection", -1)}
    )
    with pytest.raises(ValueError, match="spec does not fit") as caught:
        spec.validate(model)
    assert str(caught.value).splitlines() == [
        "spec does not fit the model in 2 places:",
        "node 'a' has 7 units, but is observed at 6 entries of the output of 'fc1', 7 expected",
        "spec observes node 'b' at the projection of 'fc2', which must be a torch.nn.MultiheadAttention, got Linear",
    ]


def test_validation_reports_problems_of_all_tensors() -> None:
    state = chain_state()
    state["fc1.weight"] = torch.randn(7)
    state["fc2.weight"] = torch.randn(6, 8)
    assert PermutationSpec(CHAIN).problems(state) == [
        "spec gives 2 axes to 'fc1.weight', which has 1: shape (7,)",
        "axis 1 of 'fc2.weight' has 8 units, but node 'a' has 7 units on axis 0 of 'fc1.bias'",
    ]


FUSED = PermutationSpec(
    {
        "qkv.weight": ([Window("qk", 8), Window("qk", 8), Window("v", 12)], "stream"),
        "out.weight": ("stream", "v"),
        "flat.weight": (None, consumes("stream", inner=3, outer=2)),
    },
    groups={"qk": Groups(2, "heads"), "v": Groups(2, "heads")},
)


def fused_state() -> dict[str, torch.Tensor]:
    return {"qkv.weight": torch.randn(28, 5), "out.weight": torch.randn(5, 12), "flat.weight": torch.randn(2, 30)}


def test_windows_groups_and_flattened_axes() -> None:
    assert FUSED.units(fused_state()) == {"qk": 8, "v": 12, "stream": 5}
    assert FUSED.bundles == (("qk", "v"), ("stream",))
    assert [(use.position, use.segment.start, use.segment.width) for use in FUSED.uses("qk")] == [(0, 0, 8), (0, 8, 8)]
    assert FUSED.neighbors("stream") == ("qk", "v")
    assert FUSED.observations("stream") == (Observation("flat", inner=3, outer=2),)


def test_error_names_every_problem() -> None:
    state = fused_state()
    state["qkv.weight"] = torch.randn(27, 5)
    state["flat.weight"] = torch.randn(2, 31)
    assert FUSED.problems(state) == [
        "axis 0 of 'qkv.weight' has length 27, but its windows cover 28",
        "axis 1 of 'flat.weight' holds 31 entries of node 'stream', not a multiple of inner * outer = 6",
    ]
    with pytest.raises(ValueError, match=r"windows cover 28 \(and 1 more\)"):
        FUSED.units(state)


def test_groups_must_divide_the_units() -> None:
    spec = PermutationSpec(CHAIN, groups={"a": 3})
    with pytest.raises(ValueError, match="node 'a' has 7 units, which 3 groups do not divide"):
        spec.units(chain_state())


def test_description() -> None:
    assert FUSED.describe().splitlines() == [
        "node    groups  tied to  axes  first axis",
        "qk      2       v        2     axis 0 of 'qkv.weight' (from entry 0)",
        "v       2       qk       2     axis 0 of 'qkv.weight' (from entry 16)",
        "stream  1                3     axis 1 of 'qkv.weight'",
    ]


def test_validation_reports_every_mismatch() -> None:
    model = make_mlp((5, 7, 6, 4))
    PermutationSpec(CHAIN).validate(model)
    spec = PermutationSpec({**CHAIN, "fc9.weight": ("a",), "fc3.bias": (None, "b")}, observe={"b": "fc8"})
    with pytest.raises(ValueError, match="spec does not fit") as caught:
        spec.validate(model)
    assert str(caught.value).splitlines() == [
        "spec does not fit the model in 3 places:",
        "spec gives 2 axes to 'fc3.bias', which has 1: shape (4,)",
        "spec names the tensor 'fc9.weight', which the models do not have; "
        "did you mean 'fc3.weight' or 'fc2.weight' or 'fc1.weight'?",
        "node 'b' is observed at module 'fc8', which the model does not have",
    ]
