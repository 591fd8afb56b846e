"""Unsigned integers of 2, 4 or 8 bits in bytes and in little-endian 32-bit words, lowest bits first."""

from __future__ import annotations

import torch
from torch import Tensor


def words_for(count: int, bits: int) -> int:
    """32-bit words that hold `count` integers without a gap."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """words int32 [R, W] -> uint8 [R, count]: each row is one run of bits."""
    return unpack_bytes(words.contiguous().view(torch.uint8), bits, count)


def unpack_bytes(packed: Tensor, bits: int, count: int) -> Tensor:
    """packed uint8 [R, B] -> uint8 [R, count]."""
    mask = (1 << bits) - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :count]


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """codes uint8 [R, C] -> uint8 [R, ceil(C * bits / 8)]; what is left of the last byte is zero."""
    per_byte = 8 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).view(len(codes), -1, per_byte)
    packed = codes[..., 0].clone()
    for place in range(1, per_byte):
        packed |= codes[..., place] << (bits * place)
    return packed
