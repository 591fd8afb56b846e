"""Paged attention behind one narrow interface. Nothing above it knows which backend runs.

Layout of one layer's cache, the same for all backends (FlashAttention's paged layout, keys and values apart):

    keys, values: [num_blocks, block_size, num_kv_heads, head_dim]
    slot = block * block_size + offset   addresses one token's row of either

The inside of a block is contiguous; from one block to the next it may be any distance (`stride(0)`). Formats that keep
8 bits bring a scale for each row and KV head, or for each KV head (`kv_format.py`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from replicas.engine import flash, native
from replicas.engine.backend import native_obstacle, pick
from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import KVFormat
from replicas.engine.kv_format import LayerCache as LayerCache
from replicas.engine.triton import attention as triton_attention
from replicas.engine.triton import device as triton_device
from replicas.engine.triton.crossover import device_crossover


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
        cache.write(batch.slot_mapping, k, v)
        block_size = cache.keys.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        starts, lens = batch.query_start.tolist(), batch.context_lens.tolist()
        for i, length in enumerate(lens):
            begin, end = starts[i], starts[i + 1]
            if begin == end:  # padding of a recorded step
                continue
            blocks = batch.block_tables[i, : -(-length // block_size)].long()
            seq_k, seq_v = cache.read(blocks, length, q.dtype)
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


def obstacles(
    device: torch.device, dtype: torch.dtype, head_dim: int, kv: KVFormat | None = None, block_size: int = 16
) -> dict[str, str]:
    """Every backend, best first for this device, with why it cannot be used or "". `kv`: how keys and values are kept,
    None for `dtype`."""
    found = {
        "flash_attn": flash.obstacle(flash.installed(), flash.wanted(device, dtype, head_dim, block_size, kv)),
        "triton": triton_device.obstacle(device, dtype) or triton_attention.obstacle(block_size),
        "native": native_obstacle(device, dtype) or _native_kv_obstacle(kv),
        "torch": "",
    }
    # On a CPU Triton only runs in its interpreter, which nobody wants unasked.
    order = ("native", "torch", "flash_attn", "triton") if device.type == "cpu" else tuple(found)
    return {name: found[name] for name in order}


def _native_kv_obstacle(kv: KVFormat | None) -> str:
    """Why the C++ kernels cannot keep keys and values so; "" if they can."""
    return (
        f"keeps a scale of each token, and kv_cache_dtype {kv.name} has none" if kv is not None and kv.per_head else ""
    )


def choose_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    kv: KVFormat | None = None,
    block_size: int = 16,
    heads: tuple[int, int] | None = None,
) -> Attention:
    """`name`: "auto", "flash_attn", "triton", "native" or "torch"; ConfigError if it cannot be had here.

    heads: query and KV heads of a layer, for which kernels may be measured. `.name` of the result says which it is.
    """
    chosen = pick("attention", name, obstacles(device, dtype, head_dim, kv, block_size))
    if chosen == "native":
        from replicas.engine.native.paged import NativeAttention

        kernels = native.library()
        assert kernels is not None, "native_obstacle found the kernels and now they are gone"
        return NativeAttention(kernels)
    if chosen == "triton" and device.type == "cuda" and heads is not None:
        from replicas.engine.triton.attention_sizes import measured_attention

        return measured_attention(device, dtype, heads, head_dim, kv, block_size, device_crossover())
    if chosen == "triton":
        return triton_attention.TritonAttention(device)
    if chosen == "flash_attn":
        found = flash.installed()
        assert found is not None, "FlashAttention was found and now it is gone"
        return flash.FlashAttention(found, device, dtype)
    return TorchAttention()
