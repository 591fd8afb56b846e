"""How large the parts of attention should be on this device: measured once for a model's heads, kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from replicas.engine.kv_format import KVFormat
from replicas.engine.triton.attention import DECODE, PREFILL, TritonAttention, has_sizes
from replicas.engine.triton.cases import AttentionCase
from replicas.engine.triton.crossover import Crossover

# More sequences than multiprocessors have places for, of contexts that caches do not hold; prompts of a usual length.
_DECODES, _PROMPTS = ((1, 1024),) * 32, ((1024, 1024),) * 4


def measured_attention(
    device: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    kv: KVFormat | None,
    block_size: int,
    crossover: Crossover,
) -> TritonAttention:
    """heads: query and KV heads of a layer. kv: None for `dtype`. Takes about a gigabyte while it measures, at most."""
    if not has_sizes(dtype, head_dim):
        return TritonAttention(device)
    case = AttentionCase(
        name="",
        q_heads=heads[0],
        kv_heads=heads[1],
        dim=head_dim,
        dtype=dtype,
        kv=kv.name if kv is not None and kv.scaled else "auto",
        block_size=block_size,
    )

    def fastest(kind: str, sequences: Sequence[tuple[int, int]], names: Sequence[str]) -> str:
        of = replace(case, sequences=tuple(sequences))
        (q, _, _), cache, batch = of.make(device), of.cache(device), of.batch(device)

        def run(name: str, _: int) -> Callable[[], object]:
            attention = TritonAttention(device, **{kind: name})
            return lambda: attention.attend(q, cache, batch, scale=head_dim**-0.5, window=None)

        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        held = f"{heads[0]} and {heads[1]} heads of {head_dim}, cache {case.kv}, pages of {block_size}"
        key = f"{name}, {kind}, {str(dtype).removeprefix('torch.')}, {held}"
        return crossover.choose(key, lambda _: names, run, buckets=(1,))[1]

    # With codes to be taken apart the largest tiles do not fit into registers.
    prefills = [name for name, size in PREFILL.items() if case.kv == "auto" or size.keys <= 64]
    return TritonAttention(device, fastest("decode", _DECODES, list(DECODE)), fastest("prefill", _PROMPTS, prefills))
