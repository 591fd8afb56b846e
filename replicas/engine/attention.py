"""Paged attention behind one narrow interface. Nothing above it knows which backend runs.

Layout of one layer's cache, the same for all backends (FlashAttention's paged layout, keys and values apart):

    keys, values: [num_blocks, block_size, num_kv_heads, head_dim]
    slot = block * block_size + offset   addresses one token's row of either

The inside of a block is contiguous; from one block to the next it may be any distance (`stride(0)`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from replicas.engine import native
from replicas.engine.backend import NOT_BUILT_YET, native_obstacle, pick
from replicas.engine.batch import StepBatch


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, each [num_blocks, block_size, num_kv_heads, head_dim]."""

    keys: Tensor
    values: Tensor


class Attention(Protocol):
    name: str

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
        """Write k, v [T, Hk, D] to batch.slot_mapping, then attend causally over each sequence's own blocks.

        q [T, Hq, D] -> [T, Hq, D]; query head h reads KV head h // (Hq // Hk). `window`: a query at position p sees
        positions p - window + 1 .. p; None sees all. q, k, v may be strided views with a contiguous last dimension.
        """
        ...


class TorchAttention:
    """The reference: one gather and one scaled_dot_product_attention a sequence. Correct anywhere, fast nowhere."""

    name = "torch"

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
        block_size = cache.keys.shape[1]
        where = batch.slot_mapping // block_size, batch.slot_mapping % block_size
        cache.keys[where] = k.to(cache.keys.dtype)
        cache.values[where] = v.to(cache.values.dtype)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        starts, lens = batch.query_start.tolist(), batch.context_lens.tolist()
        for i, length in enumerate(lens):
            begin, end = starts[i], starts[i + 1]
            blocks = batch.block_tables[i, : -(-length // block_size)].long()
            seq_k = cache.keys[blocks].flatten(0, 1)[:length].to(q.dtype)
            seq_v = cache.values[blocks].flatten(0, 1)[:length].to(q.dtype)
            rows = torch.arange(length - (end - begin), length, device=q.device).unsqueeze(1)
            cols = torch.arange(length, device=q.device).unsqueeze(0)
            mask = cols <= rows
            if window is not None:
                mask &= cols > rows - window
            out[begin:end] = torch.nn.functional.scaled_dot_product_attention(
                q[begin:end].transpose(0, 1).unsqueeze(0),
                seq_k.transpose(0, 1).unsqueeze(0),
                seq_v.transpose(0, 1).unsqueeze(0),
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
        return out


def choose_attention(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Attention:
    """`name`: "auto", "native", "torch", "triton" or "flash_attn"; ConfigError if it cannot be had here.

    `.name` of the result says which it is. `head_dim` may be anything for the backends there are now.
    """
    obstacles = {
        "flash_attn": NOT_BUILT_YET,
        "triton": NOT_BUILT_YET,
        "native": native_obstacle(device, dtype),
        "torch": "",
    }
    if pick("attention", name, obstacles) == "native":
        from replicas.engine.native.paged import NativeAttention

        kernels = native.library()
        assert kernels is not None, "native_obstacle found the kernels and now they are gone"
        return NativeAttention(kernels)
    return TorchAttention()
