"""AWQ (Lin et al. 2023, arXiv:2306.00978): scale up the inputs that matter before rounding, then clip ranges.

Weights that read a loud input are multiplied by s > 1 and the input is divided by it, which changes nothing but the
rounding: s = a^alpha with a the mean magnitude of each input, alpha from a grid of 20, whichever changes the outputs
least. The division is folded into what makes the input:

    q, k, v      <- input norm            o     <- v (shared by the query heads of a KV head: their mean a)
    gate, up     <- post-attention norm   down  <- up

Then each group's range is shrunk where that lessens the error (`grid.least_error`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from replicas.engine.quantizers.grid import Codes, Grid, least_error
from replicas.engine.quantizers.rtn import quantise as round_to_nearest
from replicas.engine.quantizers.rtn import round_to

_ALPHAS = 20


def search_scales(weight: Tensor, grid: Grid, hessian: Tensor, magnitude: Tensor, share: Sequence[int] = ()) -> Tensor:
    """s float32 [K] for weight [N, K] (all matrices that read the input, on top of one another).

    hessian [K, K]: mean of x x'; magnitude [K]: mean |x|. `share` (kv_heads, group, head_dim) gives the inputs of the
    query heads in a group the same s.
    """
    if share:
        kv_heads, group, dim = share
        magnitude = magnitude.view(kv_heads, group, dim).mean(1, keepdim=True).expand(-1, group, -1).reshape(-1)
    magnitude = magnitude.clamp_min(1e-4 * float(magnitude.max()) + 1e-12)
    best, least = torch.ones_like(magnitude), torch.inf
    for step in range(_ALPHAS):
        scales = magnitude ** (step / _ALPHAS)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = round_to_nearest(weight * scales, grid).dequantise() / scales - weight
        loss = float(((error @ hessian) * error).sum())
        if loss < least:
            best, least = scales, loss
    return best


def quantise(weight: Tensor, grid: Grid, hessian: Tensor) -> Codes:
    """Codes of weight [N, K], already scaled, with clipped ranges; hessian is that of the scaled inputs."""
    scale, zero = least_error(weight, grid, hessian)
    return round_to(weight, grid, scale, zero)
