"""A decoder layer's small operations in Triton; products are cuBLAS's or our own, as was measured."""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.ops import Linear
from replicas.engine.quantized.torch_linear import TorchQuantizedLinear
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.triton import quant
from replicas.engine.triton.crossover import Crossover, device_crossover
from replicas.engine.triton.device import next_power_of_2
from replicas.engine.triton.linear import TritonLinear
from replicas.engine.triton.overlap import options

_TILE = 1024


class TritonOps:
    """See `replicas.engine.ops.Ops` for the contract."""

    name = "triton"
    multiplies_quantized = True

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TritonLinear(weight, bias, self._crossover())

    def quantized_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        if quant.obstacle(weight):
            return TorchQuantizedLinear(weight.to(self._device), bias)
        return quant.TritonQuantizedLinear(weight, bias, self._device, self._dtype, self._crossover())

    def _crossover(self) -> Crossover | None:
        return device_crossover() if self._device.type == "cuda" else None

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _norm(x.flatten(0, -2), None, weight, out, eps)
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """In place: the norm lands in x, the sum in residual."""
        assert x.is_contiguous(), "x must be contiguous"
        assert residual.is_contiguous(), "the residual must be contiguous"
        _norm(x, residual, weight, x, eps)
        return x, residual

    def rope(self, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """In place."""
        from replicas.engine.triton.kernels.elementwise import rope

        tokens, q_heads, dim = q.shape
        half = next_power_of_2(dim // 2)
        heads = min(max(_TILE // 2 // half, 1), next_power_of_2(k.shape[1]))
        if tokens:
            rope[(tokens, -(-q_heads // heads) + -(-k.shape[1] // heads))](
                *(q, k, cos_sin, positions, q_heads, k.shape[1]),
                *(q.stride(0), q.stride(1), k.stride(0), k.stride(1)),
                HALF_DIM=dim // 2,
                HALF=half,
                HEADS=heads,
                num_warps=4 if heads * half >= 256 else 1,
            )
        return q, k

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        from replicas.engine.triton.kernels.elementwise import silu_mul

        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        assert gate_up.is_contiguous(), "gate_up must be contiguous"
        out = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
        if rows:
            silu_mul[(rows, -(-width // _TILE))](gate_up, out, width, BLOCK=_TILE, num_warps=4, **options())
        return out


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> None:
    from replicas.engine.triton.kernels.elementwise import rms_norm

    rows, width = x.shape
    assert x.stride(1) == 1, "the last dimension of x must be contiguous"
    if not rows:
        return
    block = next_power_of_2(width)
    together = max(1, _TILE // block)
    rms_norm[(-(-rows // together),)](
        *(x, x if residual is None else residual, weight, out, rows, x.stride(0), eps),
        ADD=residual is not None,
        WIDTH=width,
        ROWS=together,
        BLOCK=block,
        num_warps=8 if block >= 4096 else 4,
        **options(),
    )
