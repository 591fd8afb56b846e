"""Paged attention on our Triton kernels: any head size, any block size that is a power of two, plain or 8-bit caches.

A step in which every sequence brings few tokens (decodes, or drafts to verify) runs the `decode` kernel: one program a
sequence, KV head and part of the context. Neither its grid nor its arguments depend on how long contexts are, so a
captured CUDA graph stays right while they grow. Any other step runs `prefill`: one program for every few tokens and KV
head, whatever sequences the tokens belong to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import LayerCache
from replicas.engine.triton.cache import code_of, write_cache
from replicas.engine.triton.device import interpreting, multiprocessors, next_power_of_2
from replicas.engine.triton.overlap import options

_LOG2E = 1.4426950408889634
_MOST_SPLITS = 64
_WIDEST_DECODE = 64  # rows (tokens times query heads of a KV head) of one program of the split kernel


def obstacle(block_size: int) -> str:
    """Why the kernels cannot use pages of this many tokens; "" if they can."""
    return "" if block_size & (block_size - 1) == 0 else f"block_size must be a power of two, got {block_size}"


def dot_type(dtype: torch.dtype) -> Any:
    """The Triton type in which products of `dtype` are taken."""
    import triton.language as tl

    if interpreting() and dtype is torch.bfloat16:
        return tl.float32  # the interpreter multiplies the bit patterns of bfloat16
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def num_splits(programs: int, sms: int, most_tiles: int) -> int:
    """Into how many parts (a power of two) contexts are cut so that `programs` sequences and heads fill `sms` twice."""
    splits = 1
    while splits * 2 * programs <= 2 * sms and splits * 2 <= min(_MOST_SPLITS, max(most_tiles, 1)):
        splits *= 2
    return splits


@dataclass(frozen=True, slots=True)
class Size:
    """keys: that a program takes at once; rows, of a prefill's tile. stages: loads that are under way at once."""

    keys: int
    warps: int
    stages: int
    rows: int = 0

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.keys}w{self.warps}s{self.stages}"


def _named(*sizes: Size) -> dict[str, Size]:
    return {size.name: size for size in sizes}


# The first is taken where nothing was measured. None of them spills on compute capability 9.0 in bfloat16 with heads of
# 128 and unrounded keys and values (`ahead`); for wider heads and float32 there is one that fits.
DECODE = _named(Size(64, 4, 3), Size(128, 4, 2), Size(64, 2, 3), Size(32, 1, 3), Size(32, 4, 3))
PREFILL = _named(Size(64, 8, 3, 128), Size(128, 8, 2, 128), Size(32, 8, 4, 128), Size(64, 4, 3, 64))


@dataclass(frozen=True, slots=True)
class _Tiles:
    """What a launch compiles for, beside the cache's own strides."""

    group: int
    block_m: int
    block_n: int
    block_d: int
    warps: int
    stages: int

    @property
    def queries(self) -> int:
        """Query tokens in one program."""
        return self.block_m // self.group


class TritonAttention:
    """See `replicas.engine.attention.Attention` for the contract."""

    name = "triton"

    def __init__(self, device: torch.device, decode: str = "", prefill: str = "") -> None:
        """decode, prefill: names of the sizes to use, of DECODE and PREFILL; "" for the first."""
        self._sms = multiprocessors(device)
        self._decode_size = DECODE[decode or next(iter(DECODE))]
        self._prefill_size = PREFILL[prefill or next(iter(PREFILL))]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        write_cache(cache, batch.slot_mapping, k, v)
        return self.attend(q, cache, batch, scale=scale, window=window)

    def attend(self, q: Tensor, cache: LayerCache, batch: StepBatch, *, scale: float, window: int | None) -> Tensor:
        """As a call, the step's keys and values being in the cache already."""
        assert q.stride(-1) == 1, "the last dimension of q must be contiguous"
        assert window is None or window > 0, f"window must be positive, got {window}"
        assert q.shape[1] % cache.keys.shape[2] == 0, f"{q.shape[1]} query heads on {cache.keys.shape[2]} KV heads"
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if not len(q):
            return out
        group = q.shape[1] // cache.keys.shape[2]
        if batch.max_query_len * group <= _WIDEST_DECODE:
            self._decode(q, out, cache, batch, scale, window)
        else:
            self._prefill(q, out, cache, batch, scale, window)
        return out

    def _prefill(
        self, q: Tensor, out: Tensor, cache: LayerCache, batch: StepBatch, scale: float, window: int | None
    ) -> None:
        from replicas.engine.triton.kernels.attention import prefill

        tiles = prefill_tiles(q, cache, self._prefill_size)
        num_seqs = len(batch.context_lens)
        grid = (len(q) // tiles.queries + num_seqs, cache.keys.shape[2])
        prefill[grid](
            *(q, out, *_tensors(cache), batch.block_tables, batch.query_start, batch.context_lens),
            *(scale * _LOG2E, window or 0, num_seqs),
            *_strides(q, out, cache, batch),
            **_constants(q, cache, tiles, window),
        )

    def _decode(
        self, q: Tensor, out: Tensor, cache: LayerCache, batch: StepBatch, scale: float, window: int | None
    ) -> None:
        from replicas.engine.triton.kernels.attention import decode, merge

        tiles = decode_tiles(q, cache, batch.max_query_len, self._decode_size)
        num_seqs, (block_size, kv_heads, dim) = len(batch.context_lens), cache.keys.shape[1:]
        most_tiles = -(-batch.block_tables.shape[1] * block_size // tiles.block_n)
        splits = num_splits(num_seqs * kv_heads, self._sms, most_tiles)
        rows, heads = q.shape[:2]
        parts = torch.empty((rows, heads, splits, dim) if splits > 1 else 1, dtype=torch.float32, device=q.device)
        sums = torch.empty((2, rows, heads, splits) if splits > 1 else (2, 1), dtype=torch.float32, device=q.device)
        decode[(num_seqs, kv_heads, splits)](
            *(q, out, parts, sums[0], sums[1]),
            *(*_tensors(cache), batch.block_tables, batch.query_start, batch.context_lens),
            *(scale * _LOG2E, window or 0),
            *_strides(q, out, cache, batch),
            WHOLE=splits == 1,
            **_constants(q, cache, tiles, window),
            **options(),
        )
        if splits > 1:
            merge[(rows, heads)](
                *(parts, sums[0], sums[1], out, batch.query_start, num_seqs, out.stride(0), splits),
                MOST_SPLITS=_MOST_SPLITS,
                HEAD_DIM=dim,
                BLOCK_D=tiles.block_d,
                num_warps=4,
                **options(),
            )


def prefill_tiles(q: Tensor, cache: LayerCache, size: Size) -> _Tiles:
    group, block_d = q.shape[1] // cache.keys.shape[2], max(16, next_power_of_2(q.shape[2]))
    if not has_sizes(q.dtype, q.shape[2]):
        size = Size(32, 4, 2, 32 if q.dtype is torch.float32 else 64)
    rows = 32 if interpreting() else size.rows
    block_m = max(next_power_of_2(group), rows)
    return _Tiles(group, block_m, size.keys, block_d, size.warps, size.stages)


def decode_tiles(q: Tensor, cache: LayerCache, max_query_len: int, size: Size) -> _Tiles:
    group, block_d = q.shape[1] // cache.keys.shape[2], max(16, next_power_of_2(q.shape[2]))
    block_m = max(16, next_power_of_2(group * max_query_len))
    if not has_sizes(q.dtype, q.shape[2]):
        size = Size(32, 4, 2)
    elif block_m > 16:  # drafts to verify: what was measured for one token a sequence may not fit into registers
        size = next(iter(DECODE.values()))
    return _Tiles(group, block_m, size.keys, block_d, size.warps, size.stages)


def has_sizes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is more than one size that fits."""
    return dtype is not torch.float32 and head_dim <= 128


def _tensors(cache: LayerCache) -> tuple[Tensor, ...]:
    """Keys, values and their scales; unscaled formats hand over something that is never read."""
    return (
        cache.keys,
        cache.values,
        cache.keys if cache.key_scales is None else cache.key_scales,
        cache.values if cache.value_scales is None else cache.value_scales,
    )


def _strides(q: Tensor, out: Tensor, cache: LayerCache, batch: StepBatch) -> tuple[int, ...]:
    keys, values, scales = cache.keys, cache.values, cache.key_scales
    assert keys.stride()[1:] == values.stride()[1:], "keys and values must have the same layout"
    return (
        *(q.stride(0), q.stride(1), out.stride(0), batch.block_tables.stride(0)),
        *(keys.stride(0), values.stride(0), keys.stride(1), keys.stride(2)),
        *((0, 0) if scales is None else (scales.stride(0), scales.stride(1))),
    )


def _constants(q: Tensor, cache: LayerCache, tiles: _Tiles, window: int | None) -> dict[str, Any]:
    return {
        "WINDOWED": window is not None,
        "CODE": code_of(cache),
        "BLOCK_SIZE": cache.keys.shape[1],
        "GROUP": tiles.group,
        "QUERIES": tiles.queries,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "HEAD_DIM": q.shape[2],
        "BLOCK_D": tiles.block_d,
        "DOT": dot_type(q.dtype),
        "PRECISION": "ieee",
        "ASM": not interpreting(),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }
