"""The small operations of a decoder layer, behind one narrow interface so that a device may bring faster ones.

`TorchOps` is the reference and runs anywhere torch does; `replicas.engine.native` has the same in C++ for CPUs.
`choose_ops(device, dtype)` picks the best for a device.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from replicas.engine import native
from replicas.engine.backend import native_obstacle, pick
from replicas.engine.triton import device as triton_device


class Linear(Protocol):
    """y = x @ weight.T (+ bias): x [M, K] -> [M, N]. The weight is held in whatever layout the device likes."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids int64 [T] -> [T, K]. A head tied to the embedding needs no second copy of it."""
        ...


class Ops(Protocol):
    """All tensors are contiguous unless said otherwise; T is the number of tokens in the step."""

    name: str

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare (perhaps repack) weight [N, K] once; the caller drops its own reference to it."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, H] (or any [..., H]) -> same shape; the mean square is taken in float32."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); both may reuse their inputs' memory."""
        ...

    def rope(self, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate halves (NeoX / Hugging Face convention). q [T, Hq, D], k [T, Hk, D], rows may be strided (views into
        a fused QKV); cos_sin float32 [max_position, D]: first half cosines, second half sines. May work in place."""
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2F] -> silu(gate) * up [T, F]."""
        ...


class TorchLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.weight)


class TorchOps:
    name = "torch"

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TorchLinear(weight, bias)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * wide.to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return self.rms_norm(total, weight, eps), total

    def rope(self, q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.float().chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

        return rotate(q), rotate(k)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up


def choose_ops(device: torch.device, dtype: torch.dtype, name: str = "auto") -> Ops:
    """`name`: "auto", "native", "triton" or "torch"; ConfigError if it cannot be had. `.name` of the result says which
    it is."""
    found = {"native": native_obstacle(device, dtype), "triton": triton_device.obstacle(device, dtype), "torch": ""}
    # On a CPU Triton only runs in its interpreter, which nobody wants unasked.
    order = ("native", "torch", "triton") if device.type == "cpu" else tuple(found)
    chosen = pick("ops", name, {name: found[name] for name in order})
    if chosen == "native":
        from replicas.engine.native.ops import NativeOps

        kernels = native.library()
        assert kernels is not None, "native_obstacle found the kernels and now they are gone"
        return NativeOps(kernels)
    if chosen == "triton":
        from replicas.engine.triton.ops import TritonOps

        return TritonOps(device)
    return TorchOps()
