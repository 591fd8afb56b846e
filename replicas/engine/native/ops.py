"""The decoder's small operations and linear layers on the C++ kernels: CPU, float32.

Every result is the same bit for bit whatever other rows are in the call and whatever the number of threads.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from replicas.engine.host_memory import Arena
from replicas.engine.native.library import Library, LinearWeights


def _check(x: Tensor) -> None:
    assert x.dtype is torch.float32, f"native kernels compute in float32, got {x.dtype}"
    assert x.is_contiguous(), f"native kernels want contiguous input, got strides {x.stride()} for shape {x.shape}"


class NativeLinear:
    """The weight [N, K], kept only as packed panels: they serve one row at memory speed and many at GEMM speed."""

    def __init__(self, library: Library, arena: Arena, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        weight = weight.detach().contiguous()
        _check(weight)
        columns = -(-self.out_features // library.panel) * library.panel
        self._library = library
        self._packed = arena.floats(columns * self.in_features)
        self._bias = None
        if bias is not None:
            self._bias = torch.zeros(columns)
            self._bias[: self.out_features] = bias.detach()
        library.pack(
            weight.data_ptr(),
            self.in_features,
            self.out_features,
            self.in_features,
            self._packed.data_ptr(),
            torch.get_num_threads(),
        )
        self._weights = LinearWeights(
            self._packed.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            self.out_features,
            self.in_features,
        )
        self._pointer = ctypes.pointer(self._weights)
        self.address = ctypes.addressof(self._weights)  # of the kernels' `Linear`, valid while this object lives
        self._linear = library.linear

    def __call__(self, x: Tensor) -> Tensor:
        rows, width = x.shape
        assert width == self.in_features, f"input has {width} columns, the weight takes {self.in_features}"
        assert x.dtype is torch.float32, f"native kernels compute in float32, got {x.dtype}"
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty((rows, self.out_features))
        self._linear(self._pointer, x.data_ptr(), x.stride(0), y.data_ptr(), rows, torch.get_num_threads())
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, ids int64 [T] -> [T, K]: the embedding that a tied head shares, without a second copy."""
        ids = ids.contiguous()
        assert ids.dtype is torch.int64, f"row ids are int64, got {ids.dtype}"
        out = torch.empty((ids.numel(), self.in_features))
        if ids.numel():
            low, high = ids.aminmax()
            assert 0 <= int(low) <= int(high) < self.out_features, f"row ids reach {int(low)}..{int(high)}"
            self._library.unpack_rows(self._pointer, ids.data_ptr(), ids.numel(), out.data_ptr())
        return out


class NativeOps:
    """See `replicas.engine.ops.Ops` for the contract."""

    name = "native"

    def __init__(self, library: Library) -> None:
        self._library, self._arena = library, Arena()
        self._rms_norm, self._rope, self._silu_mul = library.rms_norm, library.rope, library.silu_mul

    def linear(self, weight: Tensor, bias: Tensor | None) -> NativeLinear:
        return NativeLinear(self._library, self._arena, weight, bias)

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
