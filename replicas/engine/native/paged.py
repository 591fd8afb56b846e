"""Paged attention on the C++ kernel: CPU, float32. One foreign call per layer, whatever the batch holds."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from replicas.engine.attention import LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.native.library import AttentionBatch, AttentionShape, Library


class NativeAttention:
    """See `replicas.engine.attention.Attention` for the contract; not for two threads at once."""

    name = "native"

    def __init__(self, library: Library) -> None:
        self._attention = library.attention
        self._batch, self._shape = AttentionBatch(), AttentionShape()

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
        for tensor in (q, k, v):
            assert tensor.dtype is torch.float32, f"native attention computes in float32, got {tensor.dtype}"
            assert tensor.stride(-1) == 1, "the last dimension of q, k and v must be contiguous"
        assert window is None or window > 0, f"window must be positive, got {window}"
        shape = self._shape
        describe_batch(batch, self._batch)
        describe_cache(cache, shape)
        assert q.shape[1] % shape.kv_heads == 0, (
            f"{q.shape[1]} query heads do not divide among {shape.kv_heads} KV heads"
        )
        shape.q_heads, shape.window, shape.scale = q.shape[1], window or 0, scale
        shape.threads = torch.get_num_threads()
        out = torch.empty(q.shape)
        (q_row, q_head, _), (k_row, k_head, _), (v_row, v_head, _) = q.stride(), k.stride(), v.stride()
        self._attention(
            *(ctypes.byref(self._batch), ctypes.byref(shape)),
            *(q.data_ptr(), q_row, q_head),
            *(k.data_ptr(), k_row, k_head),
            *(v.data_ptr(), v_row, v_head),
            *(cache.keys.data_ptr(), cache.values.data_ptr(), out.data_ptr()),
        )
        return out


def describe_batch(batch: StepBatch, into: AttentionBatch) -> None:
    """Point `into` at the batch's tensors; the caller keeps the batch alive."""
    for name, dtype in (
        ("slot_mapping", torch.int64),
        ("query_start", torch.int32),
        ("context_lens", torch.int32),
        ("block_tables", torch.int32),
    ):
        tensor: Tensor = getattr(batch, name)
        assert tensor.dtype is dtype, f"{name} must be {dtype}, got {tensor.dtype}"
        assert tensor.is_contiguous(), f"{name} must be contiguous"
        setattr(into, name, tensor.data_ptr())
    into.block_table_ld = batch.block_tables.shape[1]
    into.sequences = batch.context_lens.shape[0]
    into.tokens = batch.slot_mapping.shape[0]


def describe_cache(cache: LayerCache, into: AttentionShape) -> None:
    """Blocks and KV heads as the cache has them."""
    keys, values = cache.keys, cache.values
    _, block_size, kv_heads, head_dim = keys.shape
    for tensor in (keys, values):
        assert tensor.dtype is torch.float32, f"native attention computes in float32, got {tensor.dtype}"
        assert tensor.stride()[1:] == (kv_heads * head_dim, head_dim, 1), "the inside of a block must be contiguous"
    assert keys.stride(0) == values.stride(0), "keys and values must have the same block stride"
    into.block_size, into.block_stride = block_size, keys.stride(0)
    into.kv_heads, into.head_dim = kv_heads, head_dim
