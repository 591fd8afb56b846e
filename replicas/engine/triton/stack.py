"""The decoder's layers with one kernel fewer each: rotary embeddings and the cache's write together."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from replicas.engine.attention import Attention, LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.model_config import ModelConfig
from replicas.engine.ops import Ops
from replicas.engine.stack import Layer, LayerByLayer, Weights
from replicas.engine.triton.cache import rope_and_write


class WrittenAttention(Attention, Protocol):
    """An attention that can also be given a cache in which the step's keys and values are already."""

    def attend(self, q: Tensor, cache: LayerCache, batch: StepBatch, *, scale: float, window: int | None) -> Tensor: ...


class TritonStack(LayerByLayer):
    """`LayerByLayer` for operations that run on a GPU and an attention that takes a written cache."""

    def __init__(self, weights: Weights, config: ModelConfig, ops: Ops, attention: WrittenAttention) -> None:
        super().__init__(weights, config, ops, attention)
        self._written = attention

    def _attend(self, layer: Layer, x: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        q, k, v = self._heads(layer, x)
        rope_and_write(q, k, v, self._weights.cos_sin, batch.positions, batch.slot_mapping, cache)
        return self._written.attend(q, cache, batch, scale=self._scale, window=layer.window).flatten(1)
