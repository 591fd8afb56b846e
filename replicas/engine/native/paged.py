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
        # All layers of a step pass the same StepBatch: it is described to the kernel once. Holding the object keeps its
        # tensors alive and its identity from being reused.
        self._batch: StepBatch | None = None
        self._batch_struct = AttentionBatch()
        self._batch_pointer = ctypes.pointer(self._batch_struct)
        self._shape = AttentionShape()
        self._shape_pointer = ctypes.pointer(self._shape)
        self._shape_key: tuple[object, ...] = ()

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
        if batch is not self._batch:
            self._describe_batch(batch)
        keys, values = cache.keys, cache.values
        key = (q.shape[1:], keys.shape, keys.stride(), values.stride(), q.dtype, keys.dtype, scale, window)
        if key != self._shape_key:
            self._describe_shape(q, k, v, cache, scale, window)
            self._shape_key = key
        self._shape.threads = torch.get_num_threads()
        out = torch.empty(q.shape)
        (q_row, q_head, _), (k_row, k_head, _), (v_row, v_head, _) = q.stride(), k.stride(), v.stride()
        self._attention(
            *(self._batch_pointer, self._shape_pointer),
            *(q.data_ptr(), q_row, q_head),
            *(k.data_ptr(), k_row, k_head),
            *(v.data_ptr(), v_row, v_head),
            *(keys.data_ptr(), values.data_ptr(), out.data_ptr()),
        )
        return out

    def _describe_batch(self, batch: StepBatch) -> None:
        for name, dtype in (
            ("slot_mapping", torch.int64),
            ("query_start", torch.int32),
            ("context_lens", torch.int32),
            ("block_tables", torch.int32),
        ):
            tensor: Tensor = getattr(batch, name)
            assert tensor.dtype is dtype, f"{name} must be {dtype}, got {tensor.dtype}"
            assert tensor.is_contiguous(), f"{name} must be contiguous"
            setattr(self._batch_struct, name, tensor.data_ptr())
        self._batch_struct.block_table_ld = batch.block_tables.shape[1]
        self._batch_struct.sequences = batch.context_lens.shape[0]
        self._batch_struct.tokens = batch.slot_mapping.shape[0]
        self._batch = batch

    def _describe_shape(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, scale: float, window: int | None
    ) -> None:
        keys, values = cache.keys, cache.values
        _, block_size, kv_heads, head_dim = keys.shape
        inner = (kv_heads * head_dim, head_dim, 1)
        for tensor in (q, k, v, keys, values):
            assert tensor.dtype is torch.float32, f"native attention computes in float32, got {tensor.dtype}"
            assert tensor.stride(-1) == 1, "the last dimension of q, k, v and the cache must be contiguous"
        assert keys.stride()[1:] == values.stride()[1:] == inner, "the inside of a cache block must be contiguous"
        assert keys.stride(0) == values.stride(0), "keys and values must have the same block stride"
        assert q.shape[1] % kv_heads == 0, f"{q.shape[1]} query heads do not divide among {kv_heads} KV heads"
        assert window is None or window > 0, f"window must be positive, got {window}"
        shape = self._shape
        shape.block_size, shape.block_stride = block_size, keys.stride(0)
        shape.q_heads, shape.kv_heads, shape.head_dim = q.shape[1], kv_heads, head_dim
        shape.window, shape.scale = window or 0, scale
