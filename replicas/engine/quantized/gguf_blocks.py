"""GGUF blocks that are kept as they are (format: ggml's ggml-common.h): 32 weights along the input share a block.

    Q4_0   d f16 | 16 bytes        w = (q - 8) * d
    Q4_1   d f16 | m f16 | 16 bytes    w = q * d + m
    Q8_0   d f16 | 32 signed bytes  w = q * d

Low nibbles of the 16 bytes are the first 16 weights, high nibbles the last 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from replicas.engine.quantized.weight import QuantizedWeight

_BLOCK = 32


def _halves(columns: Tensor, rows: int) -> Tensor:
    """[N * G, 2] bytes -> float16 [N, G]."""
    return columns.contiguous().view(torch.float16).view(rows, -1)


def _nibbles(packed: Tensor, rows: int) -> Tensor:
    return torch.cat((packed & 15, packed >> 4), dim=1).view(rows, -1)


def _q4_0(raw: Tensor, rows: int) -> QuantizedWeight:
    blocks = raw.view(-1, 18)
    return QuantizedWeight(4, _BLOCK, _nibbles(blocks[:, 2:], rows), _halves(blocks[:, :2], rows))


def _q4_1(raw: Tensor, rows: int) -> QuantizedWeight:
    blocks = raw.view(-1, 20)
    scales, mins = _halves(blocks[:, :2], rows), _halves(blocks[:, 2:4], rows)
    return QuantizedWeight(4, _BLOCK, _nibbles(blocks[:, 4:], rows), scales, mins=mins)


def _q8_0(raw: Tensor, rows: int) -> QuantizedWeight:
    blocks = raw.view(-1, 34)
    codes = (blocks[:, 2:] ^ 128).reshape(rows, -1)
    return QuantizedWeight(8, _BLOCK, codes, _halves(blocks[:, :2], rows))


# ggml's name of a type -> reader of its bytes (uint8, flat) for a matrix with so many rows.
KEPT: Mapping[str, Callable[[Tensor, int], QuantizedWeight]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
