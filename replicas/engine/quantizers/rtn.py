"""Round to nearest: each group's range from its least to its greatest weight, no calibration. The floor for others."""

from __future__ import annotations

from torch import Tensor

from replicas.engine.quantizers.grid import Codes, Grid, contiguous_groups, min_max, nearest


def round_to(weight: Tensor, grid: Grid, scale: Tensor, zero: Tensor) -> Codes:
    """Codes of weight [N, K] on the grids scale, zero [N, G] of neighbouring inputs."""
    group_of = contiguous_groups(weight.shape[1], grid)
    codes = nearest(weight, scale[:, group_of], zero[:, group_of], grid.top)
    return Codes(codes.byte(), scale, zero.byte(), group_of)


def quantise(weight: Tensor, grid: Grid) -> Codes:
    scale, zero = min_max(weight, grid)
    return round_to(weight, grid, scale, zero)
