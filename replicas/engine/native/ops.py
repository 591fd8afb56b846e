"""The decoder's operations on the C++ kernels: CPU, float32.

Every result is the same bit for bit whatever other rows are in the call and whatever the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.host_memory import Arena
from replicas.engine.native.library import Library
from replicas.engine.native.linear import NativeLinear, dense_linear, quantized_linear
from replicas.engine.quantized.weight import QuantizedWeight


def _check(x: Tensor) -> None:
    assert x.dtype is torch.float32, f"native kernels compute in float32, got {x.dtype}"
    assert x.is_contiguous(), f"native kernels want contiguous input, got strides {x.stride()} for shape {x.shape}"


class NativeOps:
    """See `replicas.engine.ops.Ops` for the contract."""

    name = "native"
    multiplies_quantized = True

    def __init__(self, library: Library) -> None:
        self._library, self._arena = library, Arena()
        self._rms_norm, self._rope, self._silu_mul = library.rms_norm, library.rope, library.silu_mul

    def linear(self, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        return dense_linear(self._library, self._arena, weight, bias)

    def quantized_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> NativeLinear:
        return quantized_linear(self._library, self._arena, weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if not x.is_contiguous():
            x = x.contiguous()
        _check(x)
        _check(weight)
        out = torch.empty_like(x)
        width = x.shape[-1]
        rows = x.numel() // width
        self._rms_norm(x.data_ptr(), None, weight.data_ptr(), eps, rows, width, out.data_ptr(), torch.get_num_threads())
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """In place: the norm lands in x, the sum in residual."""
        _check(x)
        _check(residual)
        _check(weight)
        width = x.shape[-1]
        rows, pointer = x.numel() // width, x.data_ptr()
        self._rms_norm(
            pointer, residual.data_ptr(), weight.data_ptr(), eps, rows, width, pointer, torch.get_num_threads()
        )
        return x, residual

    def rope(self, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """In place."""
        assert q.dtype is k.dtype is cos_sin.dtype is torch.float32, f"float32 only, got {q.dtype} and {k.dtype}"
        (tokens, q_heads, dim), (q_row, q_head, q_unit) = q.shape, q.stride()
        k_heads, (k_row, k_head, k_unit) = k.shape[1], k.stride()
        assert q_unit == k_unit == 1, "the last dimension of q and k must be contiguous"
        assert positions.dtype is torch.int64, f"positions are int64, got {positions.dtype}"
        assert positions.is_contiguous(), "positions must be contiguous"
        self._rope(
            *(q.data_ptr(), q_row, q_head, q_heads),
            *(k.data_ptr(), k_row, k_head, k_heads),
            *(cos_sin.data_ptr(), positions.data_ptr(), tokens, dim, torch.get_num_threads()),
        )
        return q, k

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        _check(gate_up)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty((rows, width))
        self._silu_mul(gate_up.data_ptr(), rows, width, out.data_ptr(), torch.get_num_threads())
        return out
