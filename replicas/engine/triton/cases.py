"""One launch of every kernel in every form that models in use ask for, to be compiled ahead or checked on a device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import LayerCache, allocate_caches, choose_kv_format
from replicas.engine.triton.attention import TritonAttention


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """sequences: (new tokens, context). A model's heads, a cache's format."""

    name: str
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv: str = "auto"
    window: int | None = None
    block_size: int = 16
    sequences: tuple[tuple[int, int], ...] = ((1, 700), (1, 33), (1, 1500))

    def make(self, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fresh normal q, k, v of the step's tokens."""
        generator = torch.Generator(device).manual_seed(seed)
        total = sum(new for new, _ in self.sequences)
        return (
            torch.randn(total, self.q_heads, self.dim, generator=generator, device=device).to(self.dtype),
            torch.randn(total, self.kv_heads, self.dim, generator=generator, device=device).to(self.dtype),
            torch.randn(total, self.kv_heads, self.dim, generator=generator, device=device).to(self.dtype),
        )

    def cache(self, device: torch.device, seed: int = 1) -> LayerCache:
        """Every sequence's past is in it, as fresh normal numbers."""
        generator = torch.Generator(device).manual_seed(seed)
        blocks = sum(-(-context // self.block_size) for _, context in self.sequences) + 1
        [cache] = allocate_caches(
            blocks,
            self.block_size,
            num_layers=1,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            kv=choose_kv_format(self.kv, self.dtype),
            device=device,
        )
        everything = torch.arange(blocks * self.block_size, device=device)
        k, v = torch.randn(
            2, len(everything), self.kv_heads, self.dim, generator=generator, device=device, dtype=self.dtype
        )
        cache.write(everything, k, v)
        return cache

    def batch(self, device: torch.device) -> StepBatch:
        """Pages in reverse, so that a kernel that takes them to be in order is wrong."""
        news, contexts = zip(*self.sequences, strict=True)
        counts = [-(-context // self.block_size) for context in contexts]
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        top = sum(counts)
        for row, count in zip(tables, counts, strict=True):
            row[:count] = torch.arange(top, top - count, -1)
            top -= count
        positions = [torch.arange(context - new, context) for new, context in self.sequences]
        slots = [
            tables[i][at // self.block_size].long() * self.block_size + at % self.block_size
            for i, at in enumerate(positions)
        ]
        return StepBatch(
            token_ids=torch.zeros(sum(news), dtype=torch.int64, device=device),
            positions=torch.cat(positions).to(device),
            slot_mapping=torch.cat(slots).to(device),
            query_start=torch.tensor([0, *news]).cumsum(0).to(torch.int32).to(device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            logits_rows=torch.zeros(0, dtype=torch.int64, device=device),
            max_query_len=max(news),
            max_context_len=max(contexts),
        )


_MIXED = ((300, 300), (1, 900), (65, 400))
ATTENTION = (
    AttentionCase(name="llama-3-8b decode"),
    AttentionCase(name="llama-3-8b prefill", sequences=_MIXED),
    AttentionCase(name="llama-3-8b decode int8", kv="int8"),
    AttentionCase(name="llama-3-8b decode fp8", kv="fp8_e4m3"),
    AttentionCase(name="llama-3-8b prefill fp8", kv="fp8_e4m3", sequences=_MIXED),
    AttentionCase(name="llama-3-8b verify", sequences=((5, 700), (5, 40))),
    AttentionCase(name="llama-3-70b decode", q_heads=64),
    AttentionCase(name="mistral windows", window=256, sequences=_MIXED),
    AttentionCase(name="smollm2 float32 decode", q_heads=9, kv_heads=3, dim=64, dtype=torch.float32),
    AttentionCase(name="smollm2 float32 prefill", q_heads=9, kv_heads=3, dim=64, dtype=torch.float32, sequences=_MIXED),
    AttentionCase(name="float32 int8", q_heads=9, kv_heads=3, dim=64, dtype=torch.float32, kv="int8", sequences=_MIXED),
    AttentionCase(name="float16, head of 80", q_heads=8, kv_heads=8, dim=80, dtype=torch.float16, sequences=_MIXED),
    AttentionCase(name="head of 256", q_heads=8, kv_heads=4, dim=256, sequences=_MIXED),
)


def attention_launches(device: torch.device) -> Iterator[str]:
    for case in ATTENTION:
        q, k, v = case.make(device)
        TritonAttention(device)(
            q, k, v, case.cache(device), case.batch(device), scale=case.dim**-0.5, window=case.window
        )
        yield case.name


def launch_everything(device: torch.device) -> list[str]:
    """Launch each kernel; the names of what was launched."""
    return [*attention_launches(device)]
