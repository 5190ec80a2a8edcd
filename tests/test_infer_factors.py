"""The algebra of factors and views behind derived specifications."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mudsc_fast.spec.infer import views
from mudsc_fast.spec.infer.factors import (
    Factor,
    concatenation,
    factors_of,
    freeze,
    is_frozen,
    product,
    split,
    terms_of,
    unify,
    window,
)
from mudsc_fast.spec.infer.views import NotAViewError, View, factors_of_view


def sizes(factors: list[Factor]) -> list[int]:
    return [factor.size for factor in factors]


def test_products_are_refined_to_common_factors() -> None:
    first, second = Factor(24), Factor(24)
    split(first, 4)
    split(second, 2)
    unify(first, second)
    assert sizes(factors_of(first)) == sizes(factors_of(second)) == [2, 2, 6]
    assert factors_of(first) == factors_of(second)
    assert not is_frozen(first)


def test_products_without_common_refinement_are_frozen() -> None:
    first, second = Factor(24), Factor(24)
    split(first, 3)
    split(second, 8)
    unify(first, second)
    assert is_frozen(first)
    assert is_frozen(second)


def test_sums_are_refined_to_common_terms() -> None:
    first, second = Factor(10), Factor(10)
    window(first, 0, 4)
    window(second, 3, 7)
    unify(first, second)
    assert sizes(terms_of(first)) == [3, 1, 6]
    assert terms_of(first) == terms_of(second)


def test_product_of_equal_terms_is_sum() -> None:
    total, repeated = concatenation([Factor(4), Factor(4), Factor(4)]), Factor(12)
    outer, inner = split(repeated, 3)
    unify(total, repeated)
    assert is_frozen(outer) or is_frozen(factors_of(total)[0])
    assert factors_of(total)[-1] is inner.find()
    assert not is_frozen(inner)


def test_product_and_sum_of_other_terms_are_frozen() -> None:
    total, repeated = concatenation([Factor(5), Factor(7)]), Factor(12)
    split(repeated, 3)
    unify(total, repeated)
    assert is_frozen(total)
    assert is_frozen(repeated)


def test_window_freezes_factors_it_cuts() -> None:
    whole = Factor(12)
    outer, inner = split(whole, 3)
    assert window(whole, 4, 4) is inner.find()
    assert is_frozen(outer)
    assert not is_frozen(inner)
    assert sizes(factors_of(window(whole, 0, 8))) == [2, 4]
    assert window(whole, 5, 2).size == 2
    assert sizes(terms_of(inner)) == [1, 2, 1]
    assert is_frozen(window(whole, 3, 4))  # from one block into the next


def test_unifying_with_frozen_factor_freezes() -> None:
    fixed, moving = Factor(6, frozen=True), Factor(6)
    split(moving, 2)
    unify(moving, fixed)
    assert is_frozen(moving)
    assert all(map(is_frozen, split(fixed, 3)))
    assert is_frozen(window(fixed, 1, 2))


def test_single_entry_has_no_factors() -> None:
    assert factors_of(product([Factor(1), Factor(1)])) == []
    five = Factor(5)
    assert product([Factor(1), five]) is five
    assert split(five, 1)[1] is five
    assert split(five, 5)[0] is five
    assert concatenation([]).size == 0


@st.composite
def moves(draw: st.DrawFn) -> tuple[View, torch.Tensor]:
    """Apply random moves to a view and to a tensor of flat indices, and return both."""
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=3))
    view = views.whole([Factor(length) for length in shape])
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    for _ in range(draw(st.integers(0, 6))):
        move = draw(st.sampled_from(["permute", "reshape", "narrow", "select", "expand"]))
        axis = draw(st.integers(0, max(tensor.ndim - 1, 0)))
        try:
            if move == "permute":
                order = draw(st.permutations(range(tensor.ndim)))
                view, tensor = views.permute(view, order), tensor.permute(order)
            elif move == "reshape":
                target = draw(st.sampled_from([(tensor.numel(),), (2, -1), (-1, 3), (-1, 2, 2)]))
                if tensor.numel() % math.prod(length for length in target if length > 0) == 0:
                    moved = tensor.reshape(target)
                    view, tensor = views.reshape(view, moved.shape), moved
            elif move == "narrow" and tensor.ndim:
                length = draw(st.integers(1, tensor.shape[axis]))
                start = draw(st.integers(0, tensor.shape[axis] - length))
                view, tensor = views.narrow(view, axis, start, length), tensor.narrow(axis, start, length)
            elif move == "select" and tensor.ndim:
                index = draw(st.integers(0, tensor.shape[axis] - 1))
                view, tensor = views.select(view, axis, index), tensor.select(axis, index)
            elif move == "expand":
                shape = [2, *(3 if length == 1 else length for length in tensor.shape)]
                view, tensor = views.expand(view, shape), tensor.expand(shape)
        except NotAViewError:
            pass
    return view, tensor


@given(moves())
def test_views_match_tensor_views(case: tuple[View, torch.Tensor]) -> None:
    view, tensor = case
    assert view.shape == tuple(tensor.shape)
    strides = [math.prod(f.size for f in view.base.axes[i + 1 :]) for i in range(len(view.base.axes))]
    begin = sum(offset * stride for offset, stride in zip(view.offsets, strides, strict=True))
    indices = torch.tensor(begin)
    for axis in view.axes:
        for piece in axis:
            step = 0 if piece.axis is None else piece.step * strides[piece.axis]
            indices = indices[..., None] + step * torch.arange(piece.count)
    assert torch.equal(indices.reshape(tensor.shape), tensor)


@given(moves())
def test_factors_of_view_have_its_shape(case: tuple[View, torch.Tensor]) -> None:
    view, tensor = case
    assert tuple(sizes(factors_of_view(view))) == tuple(tensor.shape)
    assert sum(term.size for axis in view.base.axes for term in terms_of(axis)) == sum(f.size for f in view.base.axes)


def test_windows_of_fused_axis_are_found() -> None:
    fused = Factor(24)
    value = views.whole([Factor(5), fused])
    heads = views.permute(views.reshape(value, [5, 3, 2, 4]), [1, 0, 2, 3])
    query = views.select(heads, 0, 0)
    rest = views.narrow(value, 1, 8, 16)
    _, *units = factors_of_view(query)
    assert sizes(units) == [2, 4]
    assert sizes([factors_of_view(rest)[1]]) == [16]
    assert [sizes(factors_of(term)) for term in terms_of(fused)] == [[2, 4], [16]]


def test_strided_slice_splits_blocks() -> None:
    rotary = Factor(8)
    even = views.narrow(views.whole([rotary]), 0, 0, 4, 2)
    assert sizes(factors_of_view(even)) == [4]
    pairs, place = factors_of(rotary)
    assert (pairs.size, place.size, is_frozen(pairs), is_frozen(place)) == (4, 2, False, True)


def test_distinguished_entry_freezes_others() -> None:
    axis = Factor(7)
    factors_of_view(views.select(views.whole([axis, Factor(3)]), 0, 2))
    assert is_frozen(axis)


def test_non_views_are_rejected() -> None:
    value = views.whole([Factor(4), Factor(6)])
    with pytest.raises(NotAViewError):
        views.reshape(value, [3, 8])
    joined = views.reshape(value, [24])
    assert views.narrow(joined, 0, 6, 12).shape == (12,)
    assert views.narrow(joined, 0, 7, 4).shape == (4,)
    with pytest.raises(NotAViewError):
        views.narrow(joined, 0, 4, 4)


def test_freezing_reaches_all_atoms() -> None:
    whole = concatenation([product([Factor(2), Factor(3)]), Factor(4)])
    freeze(whole)
    assert is_frozen(whole)
