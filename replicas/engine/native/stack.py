"""All layers of a decoder in one foreign call: CPU, float32."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from replicas.engine.attention import LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.model_config import ModelConfig
from replicas.engine.native.library import (
    AttentionBatch,
    AttentionShape,
    CachePointers,
    Library,
    StackLayer,
    StackWeights,
    pointer,
)
from replicas.engine.native.linear import NativeLinear
from replicas.engine.native.paged import describe_batch, describe_cache
from replicas.engine.ops import Linear
from replicas.engine.stack import Layer, Weights


class NativeStack:
    """See `replicas.engine.stack.Stack` for the contract; not for two threads at once."""

    def __init__(self, library: Library, weights: Weights, config: ModelConfig) -> None:
        self.library = library
        self._weights = weights  # keeps alive what the structures below point to
        self.hidden = config.hidden_size
        self._layers = (StackLayer * len(weights.layers))(*map(_describe_layer, weights.layers))
        self.structure = StackWeights(
            ctypes.addressof(self._layers),
            pointer("final norm", weights.final_norm, torch.float32),
            pointer("rotary table", weights.cos_sin, torch.float32),
            len(weights.layers),
            config.hidden_size,
            config.intermediate_size,
            config.rms_norm_eps,
        )
        self._shape = AttentionShape()
        self._shape.q_heads, self._shape.scale = config.num_heads, 1.0 / math.sqrt(config.head_dim)
        self._batch = AttentionBatch()
        self._caches: Sequence[LayerCache] | None = None

    def __call__(self, embeddings: Tensor, batch: StepBatch, caches: Sequence[LayerCache]) -> Tensor:
        described, shape = self.describe(batch, caches)
        rows = batch.logits_rows
        out = torch.empty((len(rows), self.hidden))
        self.library.stack(
            *(ctypes.byref(part) for part in (self.structure, described, shape)),
            *(pointer("positions", batch.positions, torch.int64), self.inputs(embeddings, batch)),
            *(pointer("logits_rows", rows, torch.int64), len(rows), out.data_ptr()),
        )
        return out

    def describe(self, batch: StepBatch, caches: Sequence[LayerCache]) -> tuple[AttentionBatch, AttentionShape]:
        """For the kernels; valid until the next call, while the caller keeps batch and caches alive."""
        if caches is not self._caches:
            self._use(caches)
        describe_batch(batch, self._batch)
        self._shape.threads = torch.get_num_threads()
        return self._batch, self._shape

    def inputs(self, rows: Tensor, batch: StepBatch) -> int:
        """Where `rows` lie; AssertionError unless they are one of hidden size for each token of the batch."""
        assert rows.shape == (len(batch.positions), self.hidden), f"inputs of shape {tuple(rows.shape)}"
        return pointer("inputs", rows, torch.float32)

    def _use(self, caches: Sequence[LayerCache]) -> None:
        for layer, cache in zip(self._layers, caches, strict=True):
            layer.cache = describe_cache(cache, self._shape)
        stride = caches[0].keys.stride()
        assert all(cache.keys.stride() == stride for cache in caches), "all layers' caches have the same strides"
        self._caches = caches


def _describe_layer(layer: Layer) -> StackLayer:
    def linear(held: Linear) -> int:
        assert isinstance(held, NativeLinear), f"a native stack takes native linear layers, got {type(held).__name__}"
        return held.address

    def norm(weight: Tensor | None) -> int | None:
        return None if weight is None else pointer("norm weights", weight, torch.float32)

    assert (layer.q_norm is None) == (layer.k_norm is None), "queries and keys are normed both or not at all"
    return StackLayer(
        *(norm(layer.input_norm), norm(layer.q_norm), norm(layer.k_norm), norm(layer.post_norm)),
        *(linear(layer.qkv), linear(layer.o), linear(layer.gate_up), linear(layer.down)),
        *(CachePointers(), layer.window or 0),
    )
