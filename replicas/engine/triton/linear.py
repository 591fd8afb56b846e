"""Linear layers on weights as they are: cuBLAS, and for a row or a few our own kernel where it is measured faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.triton.crossover import BUCKETS, Crossover, bucket_of
from replicas.engine.triton.overlap import options

_LIBRARY = "cublas"


@dataclass(frozen=True, slots=True)
class Variant:
    """outputs, inputs: of the part of the weight that a program takes at once."""

    outputs: int
    inputs: int
    warps: int

    @property
    def name(self) -> str:
        return f"single {self.outputs}x{self.inputs}w{self.warps}"


VARIANTS = {v.name: v for v in (Variant(4, 1024, 4), Variant(8, 512, 4), Variant(2, 2048, 4), Variant(16, 256, 4))}
MOST_ROWS = 4


class TritonLinear:
    """See `replicas.engine.ops.Linear`. weight [N, K]; crossover: None leaves everything to cuBLAS."""

    def __init__(self, weight: Tensor, bias: Tensor | None, crossover: Crossover | None = None) -> None:
        assert weight.is_contiguous(), "the weight must be contiguous"
        self.weight, self.bias = weight, bias
        self.nbytes = weight.nbytes
        self._kernels = dict.fromkeys(BUCKETS, _LIBRARY) if crossover is None else self._measured(crossover)

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        return self.run(self._kernels[bucket_of(rows)] if 0 < rows <= MOST_ROWS else _LIBRARY, x)

    def rows(self, ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(ids, self.weight)

    def run(self, kernel: str, x: Tensor) -> Tensor:
        """The product by the kernel of that name, whatever was measured. x [T, K] -> [T, N]."""
        if kernel == _LIBRARY:
            return torch.nn.functional.linear(x, self.weight, self.bias)
        from replicas.engine.triton.kernels.linear import single_rows

        assert x.stride(1) == 1, "the last dimension of x must be contiguous"
        variant, (outputs, inputs) = VARIANTS[kernel], self.weight.shape
        out = torch.empty(len(x), outputs, dtype=x.dtype, device=x.device)
        single_rows[(-(-outputs // variant.outputs), len(x))](
            *(x, self.weight, out if self.bias is None else self.bias, out, x.stride(0), outputs, inputs),
            BIASED=self.bias is not None,
            WHOLE=outputs % variant.outputs == 0 and inputs % variant.inputs == 0,
            BLOCK_N=variant.outputs,
            BLOCK_K=variant.inputs,
            num_warps=variant.warps,
            **options(),
        )
        return out

    def _measured(self, crossover: Crossover) -> dict[int, str]:
        weight = self.weight
        device = weight.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        shape = tuple(weight.shape)

        def run(kernel: str, rows: int) -> Callable[[], object]:
            x = torch.randn(rows, shape[1], device=device).to(weight.dtype)
            return lambda: self.run(kernel, x)

        def candidates(rows: int) -> list[str]:
            return [_LIBRARY, *VARIANTS] if rows <= MOST_ROWS else [_LIBRARY]

        key = f"{name}, {str(weight.dtype).removeprefix('torch.')}, {shape}"
        return crossover.choose(key, candidates, run)
