"""Linear layers on weights of 2, 4 or 8 bits, in Triton. See kernels/quant.py for the layout and the arithmetic.

Three kernels: `few` multiplies without tensor cores, `some` with them, `dequantise` writes the weight out in full and
leaves the product to cuBLAS. `some` comes in several sizes, and for few outputs the inputs are split over programs.
On a GPU, what is fastest for a number of rows is measured at load (crossover.py); in the interpreter it is fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.triton.attention import dot_type
from replicas.engine.triton.crossover import BUCKETS, Crossover, bucket_of
from replicas.engine.triton.device import interpreting, multiprocessors, next_power_of_2
from replicas.engine.triton.overlap import options

_OUTPUTS, _HALVES = 64, 1024  # of a unit of codes: outputs, and numbers of 16 bits
_TAKEN = 128  # inputs that a program takes at once
_MOST_FEW, _MOST_BLOCKS, _MOST_SPLITS = 4, 16, 8


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel in one size. rows, outputs: of a program's part of the result. stages: loads that are under way at once.
    most: rows that it is tried with, at most."""

    kernel: str
    most: int
    rows: int = 1
    outputs: int = _OUTPUTS
    warps: int = 4
    stages: int = 1

    @property
    def name(self) -> str:
        return self.kernel if self.kernel != "some" else f"some {self.rows}x{self.outputs}w{self.warps}s{self.stages}"

    def fits(self, rows: int, outputs: int, dtype: torch.dtype) -> bool:
        """Whether it is worth trying on `rows` rows of a weight with so many outputs (rounded up to units)."""
        if rows > self.most or -(-outputs // _OUTPUTS) * _OUTPUTS % self.outputs:
            return False
        # Without tensor cores for float32, larger parts than these would not fit into registers.
        tight = self.rows <= max(16, next_power_of_2(rows)) and rows <= self.rows * 4
        return self.kernel != "some" or (tight and (dtype is not torch.float32 or self.rows <= 32))


# Found by what compilers make of them (docs/gpu.md): all of these keep their sums in registers on compute capability
# 9.0.
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("few", _MOST_FEW),
        Variant("some", 512, 16, 64, 4, 4),
        Variant("some", 512, 16, 128, 4, 4),
        Variant("some", 512, 32, 128, 8, 4),
        Variant("some", 512, 64, 64, 4, 3),
        Variant("some", 512, 64, 128, 8, 4),
        Variant("some", 512, 128, 128, 8, 3),
        Variant("dequantise", BUCKETS[-1]),
    )
}


def obstacle(weight: QuantizedWeight) -> str:
    """Why the kernels cannot multiply with this weight; "" if they can."""
    group = weight.group_size
    if group < weight.shape[1] and (group < 16 or group & (group - 1)):
        return f"groups of {group} inputs are not a power of two of 16 or more"
    return ""


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight [N, K] as the kernels read it. codes: int16 [N / 64, units, 1024], both rounded up; scales and origins
    [groups, N]. group: 0 where there is only one. origin: 0 none, 1 zero points, 2 minima."""

    bits: int
    group: int
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor
    origins: Tensor | None
    origin: int

    @property
    def taken(self) -> int:
        """Inputs that a program takes at once."""
        return _taken(self.bits, self.group, self.origin)

    @property
    def units_at_once(self) -> int:
        return self.taken * self.bits // 256

    @property
    def scaled(self) -> bool:
        """Whether weights are multiplied by their scales one by one, which costs as much as all the rest: where minima
        are added to them, where more than two groups are taken at once, and where codes of 8 bits have become float32
        anyway."""
        several = 0 < self.group < self.taken
        return self.origin == 2 or (several and (self.bits == 8 or 2 * self.group < self.taken))

    @property
    def steps(self) -> int:
        return self.codes.shape[1] // self.units_at_once

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.origins is None else self.origins.nbytes)


def _taken(bits: int, group: int, origin: int) -> int:
    """Not more inputs than a group has, or a unit, where sums can be scaled: those of one or two groups."""
    unit = 256 // bits
    fewest = max(unit, min(_TAKEN, group or _TAKEN))
    sums = bits != 8 and origin != 2 and (not group or 2 * group >= fewest)
    return fewest if sums else max(unit, _TAKEN)


def pack(weight: QuantizedWeight, device: torch.device) -> Packed:
    """Repack once, on `device`."""
    assert not obstacle(weight), obstacle(weight)
    (rows, columns), bits = weight.shape, weight.bits
    group = 0 if weight.group_size >= columns else weight.group_size
    origin = 1 if weight.zeros is not None else 2 if weight.mins is not None else 0
    taken = _taken(bits, group, origin)
    codes = torch.nn.functional.pad(weight.codes.to(device), (0, -columns % taken, 0, -rows % _OUTPUTS))
    pairs = 8 // bits
    places = codes.view(len(codes) // _OUTPUTS, 4, 2, 8, -1, 4, pairs, 4, 2)  # tile warp p%2 g unit w p//2 t half
    packed = None
    for place in range(2 * pairs):
        # What is shifted past the sign is cut off and comes back as it was.
        part = places[:, :, place % 2, :, :, :, place // 2].to(torch.int32) << (bits * place)
        packed = part if packed is None else packed | part
    assert packed is not None, "a half without places"
    ordered = packed.to(torch.int16).permute(0, 3, 1, 2, 5, 4, 6)  # tile unit warp g t w half
    origins = weight.zeros if weight.zeros is not None else weight.mins
    return Packed(
        bits,
        group,
        (rows, columns),
        ordered.reshape(len(places), -1, _HALVES).contiguous(),
        weight.scales.to(device).T.contiguous(),
        None if origins is None else origins.to(device).T.contiguous(),
        origin,
    )


def unpack_rows(packed: Packed, ids: Tensor) -> Tensor:
    """Codes uint8 [T, K] of outputs ids int64 [T]."""
    tiles = packed.codes.view(len(packed.codes), -1, 4, 8, 4, 4, 2)
    halves = tiles[ids // _OUTPUTS, :, ids % 64 // 16, ids % 8].to(torch.int32)  # [T, unit, t, w, half]
    first = packed.bits * (ids % 16 // 8).view(-1, 1, 1, 1, 1)
    pairs = [(halves >> (first + 2 * packed.bits * pair)) & (2**packed.bits - 1) for pair in range(8 // packed.bits)]
    codes = torch.stack(pairs, dim=3).permute(0, 1, 4, 3, 2, 5)  # unit w p//2 t half
    return codes.reshape(len(ids), -1)[:, : packed.shape[1]].to(torch.uint8)


class TritonQuantizedLinear:
    """See `replicas.engine.ops.Linear`. dtype: of the inputs. crossover: None takes fixed kernels."""

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
        self._counters = torch.zeros(len(self._packed.codes) * _MOST_BLOCKS, dtype=torch.int32, device=device)
        self.nbytes = self._packed.nbytes + (0 if self._order is None else self._order.nbytes)
        self._kernels = self._fixed() if crossover is None else self._measured(crossover, device)

    def __call__(self, x: Tensor) -> Tensor:
        rows = len(x)
        if not rows:
            return torch.empty(0, self._packed.shape[0], dtype=x.dtype, device=x.device)
        kernel = self._kernels[bucket_of(rows)] if rows <= BUCKETS[-1] else "dequantise"
        return self.run(kernel, x if self._order is None else x[:, self._order])

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [T, K]."""
        packed = self._packed
        origins = None if packed.origins is None else packed.origins.T[ids]
        zeros, mins = (origins if packed.origin == kind else None for kind in (1, 2))
        group = packed.group or packed.shape[1]
        codes, scales = unpack_rows(packed, ids), packed.scales.T[ids]
        return QuantizedWeight(packed.bits, group, codes, scales, zeros, mins, self._order).dequantise()

    # ---------------------------------------------------------------- which kernel

    def variants(self, rows: int) -> list[str]:
        """Names of what may be tried on so many rows."""
        outputs = self._packed.shape[0]
        return [name for name, variant in VARIANTS.items() if variant.fits(rows, outputs, self._dtype)]

    def _fixed(self) -> dict[int, str]:
        """The largest `some` that wastes no rows; `few` where there are no tensor cores for the type."""
        chosen = {}
        for rows in BUCKETS:
            some = [name for name in self.variants(rows) if name.startswith("some") and rows <= 256]
            few = rows <= _MOST_FEW and self._dtype is torch.float32
            chosen[rows] = "few" if few else some[-1] if some else "dequantise"
        return chosen

    def _measured(self, crossover: Crossover, device: torch.device) -> dict[int, str]:
        packed = self._packed
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        shape = f"{packed.bits} bits, groups of {packed.group}, origin {packed.origin}, {packed.shape}"

        def run(kernel: str, rows: int) -> Callable[[], object]:
            x = torch.randn(rows, packed.shape[1], device=device).to(self._dtype)
            return lambda: self.run(kernel, x)

        return crossover.choose(f"{name}, {str(self._dtype).removeprefix('torch.')}, {shape}", self.variants, run)

    # ---------------------------------------------------------------- the kernels

    def run(self, kernel: str, x: Tensor) -> Tensor:
        """The product by the variant of that name, whatever was measured. x [T, K] -> [T, N]."""
        if kernel == "dequantise":
            return torch.nn.functional.linear(x, self._dequantised(x.dtype), self._bias)
        assert x.stride(1) == 1, "the last dimension of x must be contiguous"
        return self._product(VARIANTS[kernel], x)

    def _product(self, variant: Variant, x: Tensor) -> Tensor:
        from replicas.engine.triton.kernels.quant import few_rows, some_rows

        packed, rows = self._packed, len(x)
        outputs, inputs = packed.shape
        blocks, programs = -(-rows // variant.rows), len(packed.codes) * _OUTPUTS // variant.outputs
        assert blocks <= _MOST_BLOCKS, f"{rows} rows are too many for {variant.name}"
        splits = self._splits(blocks * programs)
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
        parts = torch.empty((splits, rows, outputs) if splits > 1 else 1, dtype=torch.float32, device=x.device)
        arguments = (
            *(x, *self._tensors(), out if self._bias is None else self._bias, parts, self._counters, out),
            *(x.stride(0), rows, outputs, inputs, packed.codes.shape[1], len(packed.scales)),
        )
        constants = {
            **self._constants(),
            "WHOLE": inputs % packed.taken == 0,
            "BIASED": self._bias is not None,
            "SPLITS": splits,
            "num_warps": variant.warps,
            "num_stages": variant.stages,
            **options(),
        }
        grid = (blocks, programs, splits)
        if variant.kernel == "few":
            few_rows[grid](*arguments, **constants)
            return out
        some_rows[grid](
            *arguments,
            **constants,
            SCALED=packed.scaled,
            TILES=variant.outputs // _OUTPUTS,
            BLOCK_M=variant.rows,
            DOT=dot_type(x.dtype),
            NUMBER=_number_type(packed.bits, x.dtype),
            PRECISION="ieee",
        )
        return out

    def _dequantised(self, dtype: torch.dtype) -> Tensor:
        from replicas.engine.triton.kernels.quant import dequantise

        packed = self._packed
        out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
        dequantise[(len(packed.codes), packed.steps)](
            *(*self._tensors(), out, *packed.shape, packed.codes.shape[1], len(packed.scales)),
            **self._constants(),
            num_warps=4,
        )
        return out

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        packed = self._packed
        return packed.codes, packed.scales, packed.scales if packed.origins is None else packed.origins

    def _constants(self) -> dict[str, Any]:
        packed = self._packed
        return {
            "BITS": packed.bits,
            "GROUP": packed.group,
            "ORIGIN": packed.origin,
            "UNITS": packed.units_at_once,
            "ASM": not interpreting(),
        }

    def _splits(self, programs: int) -> int:
        """Parts of the inputs, so that programs fill the device four times over and each has four steps at least."""
        splits = 1
        while splits < _MOST_SPLITS and splits * 2 * programs <= 4 * self._sms and splits * 8 <= self._packed.steps:
            splits *= 2
        return splits


def _number_type(bits: int, dtype: torch.dtype) -> Any:
    """The type in which codes become numbers: one that tells all of them apart."""
    import triton.language as tl

    dot = dot_type(dtype)
    return tl.float32 if dot == tl.bfloat16 and bits == 8 else dot
