"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): round one input after the other, spread each error over those to come.

With H = mean of x x' over calibration inputs x, the squared output error of a row is e' H e. After input k is rounded
with error e_k, the least-squares correction of the later inputs is -e_k / U[k, k] * U[k, k+1:], where U is the upper
Cholesky factor of H's inverse; columns go in blocks, so that most of the correction is one matrix product.

The order of inputs:

    none    as they lie; a group's scale is fitted when its first input is reached, to the corrected weights
    static  by falling H[k, k] (the loudest first, while there is most room to correct); groups stay neighbours as they
            lie and their scales are fitted before the first rounding, so that a reader needs no permutation
    desc    by falling H[k, k], groups along that order: `desc_act`, the reader gathers by group_of

What the layers before it did to its inputs is put right first, see `follow`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.quantizers.grid import Codes, Grid, contiguous_groups, least_error, nearest
from replicas.protocol import ConfigError

ORDERS = ("none", "static", "desc")
_BLOCK = 128


def quantise(weight: Tensor, grid: Grid, hessian: Tensor, *, damping: float = 0.01, order: str = "static") -> Codes:
    """Codes of weight float32 [N, K] given H float32 [K, K]. `damping`: share of H's mean diagonal added to it."""
    inputs = weight.shape[1]
    size = grid.group(inputs)
    weight, hessian = weight.clone(), hessian.clone()
    silent = hessian.diagonal() <= 0
    weight[:, silent] = 0  # an input that is always 0 may have any weight
    hessian.diagonal()[silent] = 1
    group_of = contiguous_groups(inputs, grid)
    permutation = torch.arange(inputs)
    scale = zero = torch.empty(0)
    if order != "none":
        permutation = hessian.diagonal().argsort(descending=True, stable=True)
    if order == "static":
        scale, zero = least_error(weight, grid, hessian)
    weight, hessian = weight[:, permutation], hessian[permutation][:, permutation]
    groups = group_of[permutation] if order == "static" else group_of
    if order != "static":
        scale, zero = (torch.empty(len(weight), inputs // size) for _ in range(2))
    upper = _inverse_root(hessian, damping)
    codes = torch.empty_like(weight)
    for start in range(0, inputs, _BLOCK):
        end = min(start + _BLOCK, inputs)
        errors = torch.empty(len(weight), end - start)
        for k in range(start, end):
            if order != "static" and k % size == 0:
                g, cut = k // size, slice(k, k + size)
                late = _caught_up(weight, errors, upper, start, k, cut)
                scale[:, g : g + 1], zero[:, g : g + 1] = least_error(late, _one_group(grid), hessian[cut, cut])
            g = int(groups[k])
            column = nearest(weight[:, k], scale[:, g], zero[:, g], grid.top)
            codes[:, k] = column
            error = (weight[:, k] - scale[:, g] * (column - zero[:, g])) / upper[k, k]
            weight[:, k + 1 : end].addr_(error, upper[k, k + 1 : end], alpha=-1)
            errors[:, k - start] = error
        weight[:, end:].addmm_(errors, upper[start:end, end:], alpha=-1)
    back = permutation.argsort()
    return Codes(codes[:, back].byte(), scale, zero.byte(), groups[back])


def follow(weight: Tensor, hessian: Tensor, cross: Tensor, *, damping: float = 0.01, share: float = 0.5) -> Tensor:
    """The weight that gives from rounded layers' outputs x what `weight` would give from the exact ones y, by least
    squares, `share` of the way (QEP: Arai & Ichikawa 2025, arXiv:2504.09629; all of it would fit the calibration text).

    hessian: mean of x x'; cross: mean of y x'; both [K, K].
    """
    wide = hessian.double()
    wide.diagonal().add_(float(wide.diagonal().mean()) * damping)
    lower, failed = torch.linalg.cholesky_ex(wide)
    if int(failed):
        return weight
    missing = weight.double() @ (cross - hessian).double()
    return weight + share * torch.cholesky_solve(missing.T, lower).T.float()


def _one_group(grid: Grid) -> Grid:
    return Grid(grid.bits, -1, grid.symmetric)


def _caught_up(weight: Tensor, errors: Tensor, upper: Tensor, start: int, k: int, cut: slice) -> Tensor:
    """weight[:, cut] with the corrections that its columns beyond the running block have not had yet."""
    end = min(start + _BLOCK, weight.shape[1])
    late = weight[:, cut].clone()
    if cut.stop > end and k > start:
        late[:, end - cut.start :] -= errors[:, : k - start] @ upper[start:k, end : cut.stop]
    return late


def _inverse_root(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U' U = inverse of the damped H, in float64 (small matrices, ill conditioned)."""
    wide = hessian.double()
    mean = float(wide.diagonal().mean())
    for attempt in range(4):  # ten times the damping after each failure
        damped = wide + torch.eye(len(wide), dtype=torch.float64) * (mean * damping * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            root, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                found: Tensor = root.float().contiguous()
                return found
    raise ConfigError(f"the calibration inputs' covariance cannot be inverted even with damping {damping * 1000:g}")
