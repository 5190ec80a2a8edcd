"""Means, squared deviations and co-moments of the units of several models, and how they change as samples arrive."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mudsc_fast import _memory
from mudsc_fast.kernels.cpu import correlation as cpu
from mudsc_fast.kernels.cuda import _device
from mudsc_fast.kernels.cuda import correlation as cuda
from mudsc_fast.kernels.reference import correlation as reference
from mudsc_fast.ops import _dispatch

#: Which pairs of models are compared: model 0 with each other model, or all with all.
Blocks = Literal["cross", "full"]


def pairs_of(num_models: int, blocks: Blocks) -> list[tuple[int, int]]:
    """Return the pairs of models whose co-moments are kept, in the order in which they are stored."""
    if blocks == "cross":
        return [(0, j) for j in range(1, num_models)]
    return [(i, j) for i in range(num_models) for j in range(i, num_models)]


@dataclass
class Moments:
    """Moments of the samples so far.

    Attributes
    ----------
    pairs
        The P pairs of models.
    mean, squares
        [N, C] float64: the mean of each unit, and the sum of its squared deviations.
    num_samples
        Number of samples.
    in_range
        Whether all features that were not checked before they were added are finite, with sums of squares that float32
        can hold: a bool on the device, or None if there are no such features.
    rows
        The units of model 0 whose moments are updated, for "cross" on the CPU; all by default. If these are the first
        updates, the co-moments of other units are undefined.
    """

    pairs: list[tuple[int, int]]
    mean: Tensor
    squares: Tensor
    _comoments: Tensor | None  # until something is added or asked for, because clearing large memory takes time
    num_samples: int = 0
    in_range: Tensor | None = None
    rows: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def zeros(cls, num_models: int, units: int, blocks: Blocks, device: torch.device | str) -> Moments:
        """Return the moments of zero samples."""
        pairs = pairs_of(num_models, blocks)
        mean, squares = (torch.zeros(num_models, units, dtype=torch.float64, device=device) for _ in range(2))
        result = cls(pairs, mean, squares, None)
        if mean.device.type != "cpu":
            result._comoments = result._empty().zero_()
        return result

    def _empty(self) -> Tensor:
        return _memory.empty((len(self.pairs), self.units, self.units), self.mean.dtype, self.device)

    @property
    def comoments(self) -> Tensor:
        """[P, C, C] float64: for each pair of models the sums of the products of two units' deviations."""
        if self._comoments is None:
            self._comoments = self._empty()
            self._comoments[:, self.rows] = 0
        return self._comoments

    @comoments.setter
    def comoments(self, comoments: Tensor) -> None:
        self._comoments = comoments

    @property
    def device(self) -> torch.device:
        """The device of the sums."""
        return self.mean.device

    @property
    def units(self) -> int:
        """Number C of units of each model."""
        return self.mean.shape[1]

    def is_in_range(self) -> bool:
        """Return whether all features were in range; waits for the device if some were added without a check."""
        if self.in_range is not None:
            _device.refuse_capture("using the sums of a CorrelationAccumulator", self.device)
            if not bool(self.in_range):
                return False
            self.in_range = None  # what was added so far is checked
        return True

    def join(self, count: int, mean: Tensor, squares: Tensor, comoments: Iterable[Tensor]) -> None:
        """Add the moments of `count` other samples about their own mean: the update of Chan, Golub and LeVeque."""
        if count == 0:
            return
        total = self.num_samples + count
        shift = mean - self.mean
        # n_a n_b / (n_a + n_b): the factor with which the difference of the means enters each (co-)moment.
        weighted = shift * (self.num_samples * (count / total))
        is_first = self._comoments is None and self.num_samples == 0
        if is_first:
            self._comoments = self._empty()
        for (i, j), own, joined in zip(self.pairs, self.comoments, comoments, strict=True):
            if is_first:
                own[self.rows] = joined
            else:
                self.accumulate(own[self.rows], joined, weighted[i, self.rows], shift[j])
        self.squares += squares + weighted * shift
        self.mean += shift * (count / total)
        self.num_samples = total

    def center_about(self, mean: Tensor, total: int) -> None:
        """Make these the part of `total` samples with a common mean: parts about the same mean can be added."""
        shift = self.mean - mean
        for (i, j), own in zip(self.pairs, self.comoments, strict=True):
            own.addr_(self.num_samples * shift[i], shift[j])
        self.squares += self.num_samples * shift * shift
        self.mean.copy_(mean)
        self.num_samples = total

    def shift(self, shift: Tensor, squares: Tensor) -> None:
        """Move the mean by `shift` [N, C] over the number of samples, after `squares` changed by the given amount."""
        nothing = torch.zeros_like(self.comoments[0])
        for (i, j), own in zip(self.pairs, self.comoments, strict=True):
            self.accumulate(own, nothing, shift[i] / -self.num_samples, shift[j])
        self.squares += squares - shift * shift / self.num_samples
        self.squares.clamp_(min=0)
        self.mean += shift / self.num_samples

    def accumulate(self, comoment: Tensor, product: Tensor, row_shift: Tensor, column_shift: Tensor) -> None:
        """Add `product` + outer(row_shift, column_shift) to `comoment` [R, C], in one pass."""
        kernel = _dispatch.choose(
            "correlation",
            self.device,
            {
                "cpu": cpu.accumulate,
                "cuda": cuda.accumulate,
                "triton": reference.accumulate,
                "reference": reference.accumulate,
            },
        )
        kernel(comoment, product, row_shift, column_shift)
