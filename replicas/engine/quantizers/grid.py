"""Integer grids: a group of weights shares a scale s and a zero z, and w is stored as the q of s * (q - z).

Weights are [N, K], outputs by inputs; groups lie along K. A code has `bits` bits, 0 .. 2^bits - 1. Scales are rounded
to float16 before codes are taken, since that is how every checkpoint layout stores them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.protocol import ConfigError

WHOLE_ROW = -1
_SHRINKS = 14  # tries of a smaller range, each 3.5 % narrower: clipping pays between 60 and 100 % of the range
_SHRINK_STEP = 0.035


@dataclass(frozen=True, slots=True)
class Grid:
    """group_size: inputs that share a scale, WHOLE_ROW for all. symmetric: the zero is the middle, 2^(bits-1)."""

    bits: int
    group_size: int
    symmetric: bool

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def group(self, inputs: int) -> int:
        """Inputs per group of a matrix with `inputs` inputs."""
        return inputs if self.group_size == WHOLE_ROW else self.group_size

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """ConfigError naming the tensor if its inputs do not divide into groups."""
        if shape[1] % self.group(shape[1]):
            raise ConfigError(f"tensor {name!r} has {shape[1]} inputs, not a multiple of group size {self.group_size}")


@dataclass(frozen=True, slots=True)
class Codes:
    """w[n, k] = scales[n, g] * (codes[n, k] - zeros[n, g]) with g = group_of[k].

    codes uint8 [N, K]; scales float32 [N, G], each a float16 number; zeros uint8 [N, G]; group_of int64 [K].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor

    def dequantise(self) -> Tensor:
        """float32 [N, K]."""
        return self.scales[:, self.group_of] * (self.codes.float() - self.zeros[:, self.group_of].float())

    def split(self, rows: list[int]) -> list[Codes]:
        """The codes of matrices that were laid on top of one another."""
        parts = (torch.split(held, rows) for held in (self.codes, self.scales, self.zeros))
        return [Codes(codes, scales, zeros, self.group_of) for codes, scales, zeros in zip(*parts, strict=True)]


def contiguous_groups(inputs: int, grid: Grid) -> Tensor:
    """group_of where groups are neighbouring inputs."""
    return torch.arange(inputs) // grid.group(inputs)


def scale_and_zero(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The grid over [low, high] of each group: scales float32 and zeros float32, same shape.

    A range always holds 0. Zeros are 1 or more: GPTQ's v1 layout stores zero - 1 and cannot say 0.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    if grid.symmetric:
        scale = torch.maximum(-low, high) * 2 / grid.top
    else:
        scale = (high - low) / grid.top
    scale = scale.half().float()
    scale = torch.where(scale == 0, 1.0, scale)
    if grid.symmetric:
        return scale, torch.full_like(scale, (grid.top + 1) // 2)
    return scale, (-low / scale).round().clamp(1, grid.top)


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Codes, float32 whole numbers, of weights that broadcast with their scale and zero."""
    return (weight / scale + zero).round_().clamp_(0, top)


def min_max(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, G] that reach every weight [N, K]."""
    grouped = weight.view(len(weight), -1, grid.group(weight.shape[1]))
    return scale_and_zero(grouped.amin(-1), grouped.amax(-1), grid)


def least_error(weight: Tensor, grid: Grid, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros [N, G] whose rounding changes the outputs least.

    A group's part in the squared output error is e' H e, with e its rounding errors and H [K, K] the mean of x x' over
    calibration inputs x. Tried for each group: its range shrunk at both ends, then at either end alone (weights beyond
    it are clipped). Groups are taken as independent of one another.
    """
    rows, size = len(weight), grid.group(weight.shape[1])
    grouped = weight.view(rows, -1, size)
    count = grouped.shape[1]
    own = torch.stack([hessian[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(count)])
    low, high = grouped.amin(-1), grouped.amax(-1)
    best_scale, best_zero = scale_and_zero(low, high, grid)
    best_low, best_high, least = low, high, torch.full_like(low, torch.inf)

    def attempt(new_low: Tensor, new_high: Tensor) -> None:
        nonlocal best_scale, best_zero, best_low, best_high, least
        scale, zero = scale_and_zero(new_low, new_high, grid)
        wide_scale, wide_zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
        error = (nearest(grouped, wide_scale, wide_zero, grid.top) - wide_zero) * wide_scale - grouped
        error = error.transpose(0, 1)  # [G, N, size]
        loss = (torch.bmm(error, own) * error).sum(-1).T
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_low, best_high = torch.where(better, new_low, best_low), torch.where(better, new_high, best_high)

    for step in range(_SHRINKS):
        keep = 1 - step * _SHRINK_STEP
        attempt(low * keep, high * keep)
    if not grid.symmetric:
        for end in ("low", "high"):
            for keep in (0.7, 0.8, 0.87, 0.94, 1.07):
                one_low, one_high = (best_low * keep, best_high) if end == "low" else (best_low, best_high * keep)
                attempt(one_low, one_high)
    return best_scale, best_zero
