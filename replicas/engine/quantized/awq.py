"""AWQ checkpoints (Lin et al. 2023, arXiv:2306.00978) as AutoAWQ and its successors write them, 4 bits.

version "gemm"   qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N]
                 nibble i of word c holds column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
version "gemv"   qweight int32 [N, K/8], qzeros int32 [N, Z], scales [N, 8Z], nibbles in order
                 Z: G in words of 8, filled up to what a kernel reads at once

w = (q - z) * s
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from replicas.engine.quantized.packing import unpack
from replicas.engine.quantized.settings import FLOATS, Need, Settings, finite, whole_groups, whole_words
from replicas.engine.quantized.weight import QuantizedWeight

_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)  # the inverse of (0, 2, 4, 6, 1, 3, 5, 7)


def parse(settings: Settings) -> Awq:
    settings.choice("bits", (4,), settings.get("w_bit"))
    settings.choice("zero_point", (True, False), True)  # without: qzeros are there all the same, 8 everywhere
    return Awq(
        settings.group_size(settings.get("q_group_size", 128)), settings.choice("version", ("gemm", "gemv"), "gemm")
    )


@dataclass(frozen=True, slots=True)
class Awq:
    group_size: int
    version: str
    name: str = "awq"
    bits: int = 4

    def needs(self, module: str, rows: int, columns: int) -> Mapping[str, Need]:
        groups = whole_groups(module, columns, self.group_size)
        if self.version == "gemm":
            words = whole_words(module, "outputs", rows, 4)
            return {
                "qweight": Need(((columns, words),), ("I32",)),
                "qzeros": Need(((groups, words),), ("I32",)),
                "scales": Need(((groups, rows),), FLOATS),
            }
        widths = self._zero_words(columns, groups)
        return {
            "qweight": Need(((rows, whole_words(module, "inputs", columns, 4)),), ("I32",)),
            "qzeros": Need(tuple((rows, width) for width in widths), ("I32",)),
            "scales": Need(tuple((rows, width) for width in (*(8 * width for width in widths), groups)), FLOATS),
        }

    def _zero_words(self, columns: int, groups: int) -> tuple[int, ...]:
        """Words of zeros in a row: as AutoAWQ fills them up (128 inputs' worth at a time), and without filling."""
        size = columns // groups
        step = 1 if size >= 128 else 2 if size == 64 else 4
        tight = -(-groups // 8)
        return tuple(dict.fromkeys((-(-tight // step) * step, tight)))

    def read(self, module: str, tensors: Mapping[str, Tensor], rows: int, columns: int) -> QuantizedWeight:
        words, zero_words, scales = tensors["qweight"], tensors["qzeros"], finite("scales", tensors["scales"])
        groups = columns if self.group_size == -1 else self.group_size
        if self.version == "gemm":
            codes, zeros = (_interleaved(packed, rows).T.contiguous() for packed in (words, zero_words))
            return QuantizedWeight(4, groups, codes, scales.T.contiguous(), zeros)
        count = columns // groups
        codes, zeros = unpack(words, 4, columns), unpack(zero_words, 4, count)
        return QuantizedWeight(4, groups, codes.contiguous(), scales[:, :count].contiguous(), zeros.contiguous())


def _interleaved(words: Tensor, columns: int) -> Tensor:
    nibbles = unpack(words, 4, columns).view(len(words), -1, 8)
    return nibbles[..., torch.tensor(_NIBBLE_OF_COLUMN)].flatten(1)
