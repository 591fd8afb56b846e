"""Paged attention on the C++ kernel: CPU, float32. One foreign call per layer, whatever the batch holds."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from replicas.engine.attention import LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.native.library import AttentionBatch, AttentionShape, CachePointers, Library, pointer

_FORMATS = {"float32": 0, "int8": 1, "fp8_e4m3": 2}  # `Format` in kv_codes.h


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
        pointers = describe_cache(cache, shape)
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
            *(ctypes.byref(pointers), out.data_ptr()),
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
        setattr(into, name, pointer(name, getattr(batch, name), dtype))
    into.block_table_ld = batch.block_tables.shape[1]
    into.sequences = batch.context_lens.shape[0]
    into.tokens = batch.slot_mapping.shape[0]


def describe_cache(cache: LayerCache, into: AttentionShape) -> CachePointers:
    """Blocks and KV heads as the cache has them; the caller keeps the cache alive."""
    keys, values = cache.keys, cache.values
    _, block_size, kv_heads, head_dim = keys.shape
    kind = cache.format.name if cache.format is not None and cache.scaled else "float32"
    assert kind in _FORMATS, f"native attention keeps {', '.join(_FORMATS)}, got {kind}"
    stored = torch.int8 if cache.scaled else torch.float32
    for tensor in (keys, values):
        assert tensor.dtype is stored, f"a cache in {kind} is of {stored}, got {tensor.dtype}"
        assert tensor.stride()[1:] == (kv_heads * head_dim, head_dim, 1), "the inside of a block must be contiguous"
    assert keys.stride(0) == values.stride(0), "keys and values must have the same block stride"
    into.block_size, into.block_stride = block_size, keys.stride(0)
    into.kv_heads, into.head_dim = kv_heads, head_dim
    into.format = _FORMATS[kind]
    if cache.key_scales is None or cache.value_scales is None:
        return CachePointers(keys.data_ptr(), values.data_ptr(), None, None)
    for scales in (cache.key_scales, cache.value_scales):
        assert scales.dtype is torch.float32, f"scales are float32, got {scales.dtype}"
        assert scales.stride()[1:] == (kv_heads, 1), "the scales of a block must be contiguous"
    assert cache.key_scales.stride(0) == cache.value_scales.stride(0), "all scales must have the same block stride"
    into.scale_stride = cache.key_scales.stride(0)
    return CachePointers(*(t.data_ptr() for t in (keys, values, cache.key_scales, cache.value_scales)))
