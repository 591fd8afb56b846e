"""A GGUF file's header and tensors (format: ggml's docs/gguf.md, versions 2 and 3, little-endian).

Why not gguf.GGUFReader: it keeps several numpy views for each of a hundred thousand vocabulary strings and takes 3.5 s
over the default model's header; one pass with struct takes a twentieth of that. Its tables of quantisation types and
its dequantisers are used where they are fast enough.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from replicas.protocol import ConfigError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. `shape` is in torch's order (rows first); `kind` is ggml's type number."""

    name: str
    shape: tuple[int, ...]
    kind: int
    kind_name: str
    begin: int
    nbytes: int


class GGUFFile:
    """Metadata and lazily dequantised tensors of one file; ConfigError naming the file if it is not whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Read-only pages that the kernel may drop again: a tensor's bytes are touched once, when it is read.
                self._data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path.name} cannot be read: {error}") from error
        self.metadata, self.tensors = _Header(path.name, self._data).read()

    def read(self, name: str) -> Tensor:
        """Tensor `name` as float32 in torch's shape; ConfigError if its type has no dequantiser."""
        tensor = self.tensors[name]
        raw = self.raw(tensor)
        fast = _DEQUANTISERS.get(tensor.kind_name)
        if fast is not None:
            return fast(raw).view(tensor.shape)
        from gguf import GGMLQuantizationType, quants

        try:
            rows = raw.numpy().reshape(-1, tensor.nbytes // (int(np.prod(tensor.shape[:-1], dtype=np.int64)) or 1))
            wide = quants.dequantize(rows, GGMLQuantizationType(tensor.kind))
        except NotImplementedError as error:
            raise ConfigError(f"{self.path.name}: {name!r} has the unsupported type {tensor.kind_name}") from error
        return torch.from_numpy(np.ascontiguousarray(wide, dtype=np.float32)).view(tensor.shape)

    def raw(self, tensor: GGUFTensor) -> Tensor:
        """Its bytes as they lie in the file: uint8 [nbytes], a copy."""
        return torch.frombuffer(bytearray(self._data[tensor.begin : tensor.begin + tensor.nbytes]), dtype=torch.uint8)


class _Header:
    """One pass over the header, every length checked against the file before it is believed."""

    def __init__(self, file: str, data: memoryview) -> None:
        self._file, self._data, self._size = file, data, len(data)
        self._at = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
        if self._take(4) != b"GGUF":
            raise ConfigError(f"{self._file} is not a GGUF file: its first bytes are not 'GGUF'")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ConfigError(f"{self._file} has GGUF version {version}; supported: 2 and 3, little-endian")
        tensor_count, value_count = self._scalar("<Q"), self._scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(value_count):
            key = self._string()
            metadata[key] = self._value(self._scalar("<I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ConfigError(f"{self._file}: general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        return metadata, {name: self._place(name, shape, kind, start + at) for name, shape, kind, at in infos}

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > self._size:
            raise ConfigError(f"{self._file} is truncated or corrupt: its header runs past the end of the file")
        taken = bytes(self._data[self._at : end])
        self._at = end
        return taken

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("<Q")).decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._file} is corrupt: a string in its header is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise ConfigError(f"{self._file} is corrupt: unknown metadata type {kind}")
        item, count = self._scalar("<I"), self._scalar("<Q")
        if item == _STRING:
            return [self._string() for _ in range(count)]
        if item not in _SCALARS:
            raise ConfigError(f"{self._file}: unsupported array of metadata type {item}")
        form = _SCALARS[item]
        return [value for (value,) in struct.iter_unpack(form, self._take(count * struct.calcsize(form)))]

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if dimensions > 8:
            raise ConfigError(f"{self._file} is corrupt: tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))
        kind, offset = self._scalar("<I"), self._scalar("<Q")
        return name, shape[::-1], kind, offset

    def _place(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> GGUFTensor:
        try:
            from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError as error:
            raise ConfigError(f"reading {self._file} needs the package gguf") from error
        try:
            quant = GGMLQuantizationType(kind)
        except ValueError as error:
            raise ConfigError(f"{self._file}: tensor {name!r} has the unknown type {kind}") from error
        per_block, block_bytes = GGML_QUANT_SIZES[quant]
        if not shape or shape[-1] % per_block:
            raise ConfigError(f"{self._file}: tensor {name!r} of shape {shape} is not in {quant.name} blocks")
        elements = 1
        for size in shape:
            elements *= size
        nbytes = elements // per_block * block_bytes
        if begin + nbytes > self._size:
            raise ConfigError(
                f"{self._file} is truncated: tensor {name!r} ends at byte {begin + nbytes}, the file at {self._size}"
            )
        return GGUFTensor(name, shape, kind, quant.name, begin, nbytes)


# The types that hold most weights in practice, each as one pass of torch over [blocks, bytes]: bit for bit what
# gguf.quants computes, five to ten times faster because it is not cut into groups of 16 rows. 32 weights a block.


def _f16(column: Tensor) -> Tensor:
    return column.contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[blocks, 16] bytes -> [blocks, 32] float32: all low nibbles, then all high ones."""
    out = torch.empty(packed.shape[0], 32)
    out[:, :16] = packed & 15
    out[:, 16:] = packed >> 4
    return out


def _q4_0(raw: Tensor) -> Tensor:
    blocks = raw.view(-1, 18)
    return _nibbles(blocks[:, 2:]).sub_(8).mul_(_f16(blocks[:, :2]))


def _q4_1(raw: Tensor) -> Tensor:
    blocks = raw.view(-1, 20)
    scale_and_min = _f16(blocks[:, :4])
    return _nibbles(blocks[:, 4:]).mul_(scale_and_min[:, :1]).add_(scale_and_min[:, 1:])


def _q8_0(raw: Tensor) -> Tensor:
    blocks = raw.view(-1, 34)
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_f16(blocks[:, :2]))


_DEQUANTISERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "F32": lambda raw: raw.view(torch.float32),
    "F16": lambda raw: raw.view(torch.float16).float(),
    "BF16": lambda raw: raw.view(torch.bfloat16).float(),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q8_0": _q8_0,
}
