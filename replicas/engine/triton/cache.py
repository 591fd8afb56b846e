"""Keys and values into a paged cache in one kernel, with or without rotary embeddings on the way; queries in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import LayerCache
from replicas.engine.triton.device import next_power_of_2
from replicas.engine.triton.overlap import options

_TILE = 512  # numbers of one half of the heads that a program takes
_MOST_QUERIES = 64  # (token, query head) pairs of one sequence and KV head that a program takes at once
_CODES = {"int8": 1, "fp8_e4m3": 2, "fp8_e4m3_head": 2}


def code_of(cache: LayerCache) -> int:
    """The kernels' number for how keys and values are stored."""
    return _CODES[cache.format.name] if cache.format is not None and cache.format.scaled else 0


def write_cache(cache: LayerCache, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """`LayerCache.write`, the same bits: k, v [T, Hk, D], rows perhaps strided, to slots int64 [T]."""
    _launch(None, k, v, None, None, slots, cache)


def rope_and_write(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, positions: Tensor, slots: Tensor, cache: LayerCache
) -> None:
    """Rotate q [T, Hq, D] in place (`Ops.rope`) and write rotated k and v [T, Hk, D] to the cache; k itself stays."""
    _launch(q, k, v, cos_sin, positions, slots, cache)


def round_queries(q: Tensor, batch: StepBatch, kv_heads: int) -> tuple[Tensor, Tensor]:
    """`rounded_queries.round_queries`, the same bits, in one kernel."""
    from replicas.engine.triton.kernels.cache import round_queries as kernel

    group, dim = q.shape[1] // kv_heads, q.shape[2]
    rows = min(next_power_of_2(group * batch.max_query_len), _MOST_QUERIES)
    assert q.stride(2) == 1, "the last dimension of q must be contiguous"
    # Zeros: rows of padding that no sequence owns are read as any others.
    codes = torch.zeros(q.shape, dtype=torch.int8, device=q.device)
    scales = torch.empty(len(batch.context_lens), kv_heads, device=q.device)
    kernel[(len(batch.context_lens), kv_heads)](
        *(q, codes, scales, batch.query_start, q.stride(0), q.stride(1)),
        LARGEST=448.0,
        GROUP=group,
        ROWS=rows,
        HEAD_DIM=dim,
        BLOCK_D=next_power_of_2(dim),
        num_warps=4,
    )
    return codes.view(torch.float8_e4m3fn), scales


def _launch(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor | None,
    positions: Tensor | None,
    slots: Tensor,
    cache: LayerCache,
) -> None:
    from replicas.engine.triton.kernels.cache import rope_and_write as kernel

    tokens, kv_heads, dim = k.shape
    assert dim % 2 == 0, f"head_dim must be even, got {dim}"
    assert k.stride(2) == v.stride(2) == 1, "the last dimension of k and v must be contiguous"
    assert cache.keys.stride()[1:] == cache.values.stride()[1:], "keys and values must have the same layout"
    if not tokens:
        return
    rotate = q is not None and cos_sin is not None and positions is not None
    half = next_power_of_2(dim // 2)
    heads = min(max(_TILE // half, 1), next_power_of_2(max(kv_heads, 1)))
    q_heads = 0 if q is None else q.shape[1]
    programs = (-(-q_heads // heads) if rotate else 0) + 2 * -(-kv_heads // heads)
    scales = cache.key_scales
    query = k if q is None else q
    kernel[(tokens, programs)](
        *(query, k, v, k if cos_sin is None else cos_sin, slots if positions is None else positions, slots),
        *(cache.keys, cache.values),
        cache.keys if scales is None else scales,
        cache.values if cache.value_scales is None else cache.value_scales,
        *(q_heads, kv_heads),
        *(query.stride(0), query.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1)),
        *(cache.keys.stride(0), cache.values.stride(0), cache.keys.stride(1), cache.keys.stride(2)),
        *((0, 0) if scales is None else (scales.stride(0), scales.stride(1))),
        ROTATE=rotate,
        CODE=code_of(cache),
        FIXED=cache.format is not None and cache.format.per_head,
        LARGEST=1.0 if cache.format is None else cache.format.largest or 1.0,
        BLOCK_SIZE=cache.keys.shape[1],
        HALF_DIM=dim // 2,
        HALF=half,
        HEADS=heads,
        num_warps=4 if heads * half >= 256 else 1,
        **options(),
    )
