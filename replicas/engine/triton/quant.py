"""Linear layers on weights of 2, 4 or 8 bits, in Triton. See kernels/quant.py for the layout and the arithmetic.

Three kernels, chosen by the number of rows: `few` multiplies without tensor cores, `some` with them, its inputs split
over programs; `dequantise` writes the weight out in full and leaves the product to cuBLAS. On a GPU the borders between
them are measured at load (crossover.py); in the interpreter they are fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from replicas.engine.native.compiler import cache_dir
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.triton.attention import dot_type
from replicas.engine.triton.crossover import BUCKETS, Crossover, bucket_of
from replicas.engine.triton.device import multiprocessors, next_power_of_2

KERNELS = {"few": 4, "some": 64, "dequantise": BUCKETS[-1]}
_FIXED = {rows: "few" if rows <= 4 else "some" if rows <= 64 else "dequantise" for rows in BUCKETS}
_PLANES = (64, 32, 16)


def obstacle(weight: QuantizedWeight) -> str:
    """Why the kernels cannot multiply with this weight; "" if they can."""
    if _plane(weight) is None:
        return f"groups of {weight.group_size} inputs are not a multiple of {_PLANES[-1]}"
    return ""


def _plane(weight: QuantizedWeight) -> int | None:
    """Inputs of one tile: no tile reaches into a second group."""
    if weight.group_size >= weight.shape[1]:
        return _PLANES[0]
    return next((plane for plane in _PLANES if weight.group_size % plane == 0), None)


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [N, K] as the kernels read it; `origin`: 0 none, 1 zero points, 2 minima."""

    bits: int
    plane: int
    group: int
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    origins: Tensor | None
    origin: int

    @property
    def steps(self) -> int:
        return self.codes.shape[1] // self.plane

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.origins is None else self.origins.nbytes)


def pack(weight: QuantizedWeight, device: torch.device) -> Packed:
    """Repack once, on `device`."""
    plane = _plane(weight)
    assert plane is not None, obstacle(weight)
    rows, columns = weight.shape
    per_byte = 8 // weight.bits
    codes = weight.codes.to(device)
    short = -columns % (plane * per_byte)
    if short:
        codes = torch.nn.functional.pad(codes, (0, short))  # meets inputs that are 0
    tiles = codes.view(rows, -1, per_byte, plane)
    packed = tiles[:, :, 0].clone()
    for place in range(1, per_byte):
        packed |= tiles[:, :, place] << (place * weight.bits)
    origins = weight.zeros if weight.zeros is not None else weight.mins
    return Packed(
        weight.bits,
        plane,
        weight.group_size,
        (rows, columns),
        packed.flatten(1).contiguous(),
        weight.scales.to(device).T.contiguous(),
        None if origins is None else origins.to(device).T.contiguous(),
        0 if origins is None else 1 if weight.zeros is not None else 2,
    )


class TritonQuantizedLinear:
    """See `replicas.engine.ops.Linear`. dtype: of the inputs. crossover: None takes fixed borders between kernels."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        crossover: Crossover | None = None,
    ) -> None:
        self._packed, self._bias, self._dtype = pack(weight, device), bias, dtype
        self._order = None if weight.order is None else weight.order.to(device)
        self._sms = multiprocessors(device)
        self.nbytes = self._packed.nbytes + (0 if self._order is None else self._order.nbytes)
        self._kernels = _FIXED if crossover is None else self._measured(crossover, device)

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        if not rows:
            return torch.empty(0, self._packed.shape[0], dtype=x.dtype, device=x.device)
        kernel = self._kernels[bucket_of(rows)] if rows <= BUCKETS[-1] else "dequantise"
        return self.run(kernel, x if self._order is None else x[:, self._order])

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [T, K]."""
        packed = self._packed
        per_byte = 8 // packed.bits
        tiles = packed.codes[ids].view(len(ids), packed.steps, 1, packed.plane)
        shifts = torch.arange(per_byte, device=ids.device, dtype=torch.uint8).view(-1, 1) * packed.bits
        codes = ((tiles >> shifts) & (2**packed.bits - 1)).reshape(len(ids), packed.steps * per_byte * packed.plane)[
            :, : packed.shape[1]
        ]
        origins = None if packed.origins is None else packed.origins.T[ids]
        zeros, mins = (origins if packed.origin == kind else None for kind in (1, 2))
        scales = packed.scales.T[ids]
        return QuantizedWeight(packed.bits, packed.group, codes, scales, zeros, mins, self._order).dequantise()

    def _measured(self, crossover: Crossover, device: torch.device) -> dict[int, str]:
        packed = self._packed
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        shape = f"{packed.bits} bits, groups of {packed.group}, origin {packed.origin}, {packed.shape}"

        def run(kernel: str, rows: int) -> Callable[[], object]:
            x = torch.randn(rows, packed.shape[1], device=device).to(self._dtype)
            return lambda: self.run(kernel, x)

        return crossover.choose(f"{name}, {str(self._dtype).removeprefix('torch.')}, {shape}", KERNELS, run)

    # ---------------------------------------------------------------- the kernels

    def run(self, kernel: str, x: Tensor) -> Tensor:
        if kernel == "dequantise":
            return torch.nn.functional.linear(x, self._dequantised(x.dtype), self._bias)
        assert x.stride(1) == 1, "the last dimension of x must be contiguous"
        return self._few(x) if kernel == "few" else self._some(x)

    def _few(self, x: Tensor) -> Tensor:
        from replicas.engine.triton.kernels.quant import few_rows

        packed, rows = self._packed, len(x)
        padded = next_power_of_2(rows)
        if padded != rows:
            x = torch.nn.functional.pad(x, (0, 0, 0, padded - rows))
        block_n = 16 if padded == 4 else 32
        splits = self._splits(block_n)
        parts = torch.empty(splits, padded, packed.shape[0], dtype=torch.float32, device=x.device)
        few_rows[(-(-packed.shape[0] // block_n), splits)](
            *(x, *self._tensors(), parts, x.stride(0), *self._sizes()),
            **self._constants(),
            ROWS=padded,
            BLOCK_N=block_n,
            num_warps=4,
        )
        return self._sum(parts, rows, x.dtype)

    def _some(self, x: Tensor) -> Tensor:
        from replicas.engine.triton.kernels.quant import some_rows

        packed, rows = self._packed, len(x)
        block_m, block_n = max(16, next_power_of_2(rows)), 64
        splits = self._splits(block_n)
        parts = torch.empty(splits, rows, packed.shape[0], dtype=torch.float32, device=x.device)
        some_rows[(-(-packed.shape[0] // block_n), splits)](
            *(x, *self._tensors(), parts, x.stride(0), rows, *self._sizes()),
            **self._constants(),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            DOT=dot_type(x.dtype),
            PRECISION="ieee",
            num_warps=4,
            num_stages=4,
        )
        return self._sum(parts, rows, x.dtype)

    def _sum(self, parts: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
        from replicas.engine.triton.kernels.quant import add_parts

        splits, padded, width = parts.shape
        out = torch.empty(rows, width, dtype=dtype, device=parts.device)
        bias = parts if self._bias is None else self._bias
        add_parts[(rows, -(-width // 1024))](
            *(parts, bias, out, splits, padded, width), BIASED=self._bias is not None, BLOCK=1024, num_warps=4
        )
        return out

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        from replicas.engine.triton.kernels.quant import dequantise

        packed = self._packed
        out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
        dequantise[(-(-packed.shape[0] // 64), packed.steps)](
            *(*self._tensors(), out, *self._sizes(steps=False)), **self._constants(), BLOCK_N=64, num_warps=4
        )
        return out

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        packed = self._packed
        return packed.codes, packed.scales, packed.scales if packed.origins is None else packed.origins

    def _sizes(self, *, steps: bool = True) -> tuple[int, ...]:
        packed = self._packed
        return (
            *packed.shape,
            *((packed.steps,) if steps else ()),
            *(packed.codes.shape[1], packed.scales.shape[0]),
        )

    def _constants(self) -> dict[str, Any]:
        packed = self._packed
        return {"BITS": packed.bits, "PLANE": packed.plane, "GROUP": packed.group, "ORIGIN": packed.origin}

    def _splits(self, block_n: int) -> int:
        """Parts of the inputs, so that programs fill the device twice and none has less than four steps."""
        programs, splits = -(-self._packed.shape[0] // block_n), 1
        while splits * 2 * programs <= 2 * self._sms and splits * 8 <= self._packed.steps:
            splits *= 2
        return splits


@cache
def device_crossover() -> Crossover:
    """Times on the current CUDA device, kept in the user's cache beside the C++ kernels."""
    from triton.testing import do_bench

    def measure(call: Callable[[], object]) -> float:
        call()  # compiles
        return float(do_bench(call, warmup=5, rep=25, return_mode="median"))

    return Crossover(cache_dir() / "triton" / "crossover.json", measure)
