"""The small operations of a decoder layer, behind one narrow interface so that a device may bring faster ones.

`TorchOps` is the reference and runs anywhere torch does; `replicas.engine.native` has the same in C++ for CPUs.
`choose_ops(device, dtype)` picks the best for a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from replicas.engine import native
from replicas.engine.backend import native_obstacle, pick
from replicas.engine.quantized.torch_linear import TorchQuantizedLinear
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.triton import device as triton_device


class Linear(Protocol):
    """y = x @ weight.T (+ bias): x [M, K] -> [M, N]. The weight is held in whatever layout the device likes; the kernel
    is chosen by x's shape. A new format or device is one more class that does this."""

    nbytes: int  # that the weight takes, with everything that a quantised one needs

    def __call__(self, x: Tensor) -> Tensor: ...

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight: ids int64 [T] -> [T, K]. A head tied to the embedding needs no second copy of it."""
        ...


class Ops(Protocol):
    """All tensors are contiguous unless said otherwise; T is the number of tokens in the step."""

    name: str
    multiplies_quantized: bool  # with codes as they are; else every call dequantises a quantised weight first

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """Prepare (perhaps repack) weight [N, K] once; the caller drops its own reference to it."""
        ...

    def quantized_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        """The same for a weight that stays quantised. `weight` lies on the CPU, a bias where the device computes.

        What it multiplies with are the numbers of `weight.dequantise()`, rounded to the device's type.
        """
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
        self.nbytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def rows(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.weight)


class JoinedLinear:
    """Layers that read the same input and cannot be one matrix, since they are stored in different ways."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = parts
        self.nbytes = sum(part.nbytes for part in parts)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self._parts], dim=-1)

    def rows(self, ids: Tensor) -> Tensor:
        raise NotImplementedError("joined layers are not looked up by row: only an embedding is, which is one matrix")


class TorchOps:
    """device: where quantised weights are held."""

    name = "torch"
    multiplies_quantized = False

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device or torch.device("cpu")

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        return TorchLinear(weight, bias)

    def quantized_linear(self, weight: QuantizedWeight, bias: Tensor | None) -> Linear:
        return TorchQuantizedLinear(weight.to(self._device), bias)

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

        return TritonOps(device, dtype)
    return TorchOps(device)
