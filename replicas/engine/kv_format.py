"""How keys and values are kept: as they are computed, or rounded to 8 bits and multiplied by a scale.

A *vector* is one token's key (or value) of one KV head, head_dim numbers. int8 and fp8_e4m3 keep one float32 scale per
vector, taken from the vector itself when it is written:

    scale = max|x| / largest        largest: 127 for int8, 448 for fp8_e4m3 (1 where the vector is all zeros)
    code  = round(x / scale)        to the nearest, ties to even, in the format's own grid

So nothing needs calibrating, an outlier costs precision only where it stands, and what is stored of a token depends on
nothing but the token: prefix blocks can be shared and prompts be cut anywhere. A scale adds 4 bytes to head_dim bytes.
fp8_e4m3 is the OCP 8-bit format (4 exponent and 3 mantissa bits, no infinities: Micikevicius et al. 2022,
arXiv:2209.05433).

fp8_e4m3_head has the same codes with one scale for all keys of a layer and KV head, and one for all its values, fixed
before the first token (`kv_scales.py` says where they come from). Numbers beyond 448 scales become the largest code.
What is stored still depends on the token alone, nothing lies beside the codes, and FlashAttention 3 can multiply them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.host_memory import host_zeros
from replicas.protocol import ConfigError

NAMES = ("auto", "fp8_e4m3", "fp8_e4m3_head", "int8")
_SMALLEST_SCALE = 2.0**-120  # a vector of denormals must not be divided by zero


@dataclass(frozen=True, slots=True)
class KVFormat:
    """name: part of every prefix hash. dtype: of what is stored. largest: greatest code, None: there are no scales.
    per_head: scales are given, one a KV head, and not taken from each vector.

    8-bit codes are stored as int8, whatever they mean: torch cannot index float8 tensors everywhere.
    """

    name: str
    dtype: torch.dtype
    largest: float | None = None
    per_head: bool = False

    @property
    def scaled(self) -> bool:
        return self.largest is not None

    def bytes_per_vector(self, head_dim: int) -> int:
        return head_dim * self.dtype.itemsize + (4 if self.scaled and not self.per_head else 0)

    def scales_for(self, largest: Tensor) -> Tensor:
        """The scales, float32, with which numbers up to `largest` become codes up to the greatest."""
        assert self.largest is not None, f"{self.name} has no scales"
        wide = largest.float()
        # By a tensor: CUDA divides by a number as a product with its reciprocal, which may round the other way.
        scales = wide / torch.full_like(wide, self.largest)
        return torch.where(scales == 0, 1.0, scales.clamp_min(_SMALLEST_SCALE))

    def encode(self, x: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [..., D] -> codes int8 [..., D] and their scales float32 [...].

        scales: to round with, of a shape that broadcasts to x's without its last dimension; numbers beyond their range
        become the greatest code. None: each vector's own, for formats that keep those.
        """
        assert self.largest is not None, f"{self.name} has no scales"
        assert self.per_head == (scales is not None), f"{self.name} rounds with other scales than it was given"
        wide = x.float()
        if scales is None:
            scales = self.scales_for(wide.abs().amax(dim=-1))
            codes = wide / scales.unsqueeze(-1)
        else:
            codes = (wide / scales.unsqueeze(-1)).clamp(-self.largest, self.largest)
        if self.name == "int8":
            return codes.round().to(torch.int8), scales
        return codes.to(torch.float8_e4m3fn).view(torch.int8), scales

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The float32 numbers [..., D] that codes and scales stand for."""
        plain = codes if self.name == "int8" else codes.view(torch.float8_e4m3fn)
        return plain.float() * scales.unsqueeze(-1)


def plain_format(dtype: torch.dtype) -> KVFormat:
    """Keys and values as the model computes them."""
    return KVFormat(str(dtype).removeprefix("torch."), dtype)


def choose_kv_format(name: str, dtype: torch.dtype) -> KVFormat:
    """`name`: one of NAMES; "auto" keeps the model's dtype. ConfigError for any other."""
    if name == "auto":
        return plain_format(dtype)
    if name == "int8":
        return KVFormat("int8", torch.int8, 127.0)
    if name == "fp8_e4m3":
        return KVFormat("fp8_e4m3", torch.int8, 448.0)
    if name == "fp8_e4m3_head":
        return KVFormat("fp8_e4m3_head", torch.int8, 448.0, per_head=True)
    raise ConfigError(f"kv_cache_dtype {name!r} is not supported; use {', '.join(NAMES)}", param="kv_cache_dtype")


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, each [num_blocks, block_size, num_kv_heads, head_dim].

    format None: stored in the tensors' own type. Scaled formats come with key_scales and value_scales, each float32
    [num_blocks, block_size, num_kv_heads]; where there is one a head, that is the same num_kv_heads numbers with
    strides of 0, which kernels that are given strides read as any others.
    """

    keys: Tensor
    values: Tensor
    format: KVFormat | None = None
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def scaled(self) -> bool:
        return self.format is not None and self.format.scaled

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [T, Hk, D] to slots int64 [T] (block * block_size + offset)."""
        block_size = self.keys.shape[1]
        where = slots // block_size, slots % block_size
        for stored, scales, x in ((self.keys, self.key_scales, k), (self.values, self.value_scales, v)):
            if scales is None:
                stored[where] = x.to(stored.dtype)
                continue
            assert self.format is not None, "scales without a format"
            if self.format.per_head:
                stored[where], _ = self.format.encode(x, scales[0, 0])
            else:
                stored[where], scales[where] = self.format.encode(x)

    def read(self, blocks: Tensor, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The first `length` keys and values in `blocks` (int64 [B]), each [length, Hk, D] in `dtype`."""
        found = []
        for stored, scales in ((self.keys, self.key_scales), (self.values, self.value_scales)):
            rows = stored[blocks].flatten(0, 1)[:length]
            if scales is not None:
                assert self.format is not None, "scales without a format"
                rows = self.format.decode(rows, scales[blocks].flatten(0, 1)[:length])
            found.append(rows.to(dtype))
        return found[0], found[1]


@dataclass(frozen=True, slots=True)
class KVTensors:
    """Keys and values of all layers: data [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], and scales
    of the same shape without the last dimension where each vector has one. Block by block, in any memory layout.

    layers: the same memory, as each layer's attention sees it.
    """

    data: Tensor
    scales: Tensor | None
    layers: list[LayerCache]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there is of every block, one row a block."""
        return (self.data,) if self.scales is None else (self.data, self.scales)

    def copy_blocks(self, source: Tensor, target: Tensor) -> None:
        """Blocks `source` (int64 [B]) over blocks `target`."""
        for tensor in self.tensors:
            tensor[target] = tensor[source]


def allocate_kv(
    num_blocks: int,
    block_size: int,
    *,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    kv: KVFormat,
    device: torch.device,
    scales: Tensor | None = None,
) -> KVTensors:
    """Zeroed keys and values of every layer. scales: float32 [num_layers, 2, num_kv_heads] for formats with one a head.

    On a CPU all layers of one block lie together, so that memory is taken from the system in proportion to the blocks
    that were ever used; on a GPU, where all of it is taken at once, each layer's cache is contiguous.
    """

    def pool(dtype: torch.dtype, *inner: int) -> Tensor:
        """[num_blocks, num_layers, 2, *inner]"""
        if device.type != "cpu":
            return torch.zeros(num_layers, 2, num_blocks, *inner, dtype=dtype, device=device).movedim(2, 0)
        raw = host_zeros(num_blocks * num_layers * 2 * math.prod(inner) * dtype.itemsize)
        return raw.view(dtype).view(num_blocks, num_layers, 2, *inner)

    data = pool(kv.dtype, block_size, num_kv_heads, head_dim)
    if not kv.scaled:
        return KVTensors(data, None, [LayerCache(data[:, i, 0], data[:, i, 1]) for i in range(num_layers)])
    assert kv.per_head == (scales is not None), f"{kv.name} needs other scales than it was given"
    if scales is None:
        own = each = pool(torch.float32, block_size, num_kv_heads)
    else:
        assert scales.shape == (num_layers, 2, num_kv_heads), f"{tuple(scales.shape)} scales for every KV head"
        fixed = scales.to(device, torch.float32).contiguous()
        own, each = None, fixed.view(num_layers, 2, 1, num_kv_heads).expand(num_blocks, -1, -1, block_size, -1)
    layers = [LayerCache(data[:, i, 0], data[:, i, 1], kv, each[:, i, 0], each[:, i, 1]) for i in range(num_layers)]
    return KVTensors(data, own, layers)
