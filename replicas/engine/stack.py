"""The decoder's layers: from embeddings to the final norm. Plain tensors, no state between steps.

One step's tensors through one layer (T tokens, Hq query and Hk KV heads of size D, F inner units):

    x [T, H] ─ norm ─ qkv ─ [T, (Hq + 2 Hk) D] ─ (norm per head) ─ rope ─ attention over the paged cache ─ o ─┐
    residual ─────────────────────────────────────────────────────────────────────────────────────────────── + ─┐
                                                 norm ─ gate_up [T, 2F] ─ silu(gate) · up ─ down ─────────── + ─▶

The residual is added inside the next norm (`Ops.add_rms_norm`). How a product or an attention is computed is the
business of `Ops` and `Attention`; where both are the C++ kernels, one foreign call runs the same kernels through all
layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from replicas.engine import native
from replicas.engine.attention import Attention, LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.model_config import ModelConfig
from replicas.engine.ops import JoinedLinear, Linear, Ops


@dataclass(frozen=True, slots=True)
class Layer:
    """q_norm and k_norm: both or neither. window: tokens that a query sees, None for all."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None

    @property
    def matrices(self) -> tuple[Linear, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True, slots=True)
class Weights:
    """All layers and what they share: the norm after the last one and the rotary table of `Ops.rope`."""

    layers: Sequence[Layer]
    final_norm: Tensor
    cos_sin: Tensor


class Stack(Protocol):
    def __call__(self, embeddings: Tensor, batch: StepBatch, caches: Sequence[LayerCache]) -> Tensor:
        """embeddings [T, H], which may be overwritten -> normed hidden states [R, H] of batch.logits_rows.

        Every token's keys and values are written to `caches`, one a layer.
        """
        ...


class LayerByLayer:
    """The reference, for any `Ops` and `Attention`."""

    def __init__(self, weights: Weights, config: ModelConfig, ops: Ops, attention: Attention) -> None:
        self._weights, self._config = weights, config
        self._ops, self._attention = ops, attention
        self._scale = 1.0 / math.sqrt(config.head_dim)

    def __call__(self, embeddings: Tensor, batch: StepBatch, caches: Sequence[LayerCache]) -> Tensor:
        ops, eps, layers = self._ops, self._config.rms_norm_eps, self._weights.layers
        residual = embeddings
        x = ops.rms_norm(residual, layers[0].input_norm, eps)
        for index, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
            if index:
                x, residual = ops.add_rms_norm(x, residual, layer.input_norm, eps)
            x = self._attend(layer, x, cache, batch)
            if index == len(layers) - 1:
                # All keys and values are written: only rows that are wanted need to go on.
                x, residual = x[batch.logits_rows], residual[batch.logits_rows]
            x, residual = ops.add_rms_norm(layer.o(x), residual, layer.post_norm, eps)
            x = layer.down(ops.silu_mul(layer.gate_up(x)))
        x, _ = ops.add_rms_norm(x, residual, self._weights.final_norm, eps)
        return x

    def _attend(self, layer: Layer, x: Tensor, cache: LayerCache, batch: StepBatch) -> Tensor:
        q, k, v = self._heads(layer, x)
        q, k = self._ops.rope(q, k, self._weights.cos_sin, batch.positions)
        return self._attention(q, k, v, cache, batch, scale=self._scale, window=layer.window).flatten(1)

    def _heads(self, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> queries [T, Hq, D], keys and values [T, Hk, D], normed where the model does that, not turned."""
        config, eps = self._config, self._config.rms_norm_eps
        q, k, v = torch.split(layer.qkv(x), [config.q_size, config.kv_size, config.kv_size], dim=-1)
        q, k, v = (part.view(len(x), -1, config.head_dim) for part in (q, k, v))
        if layer.q_norm is not None and layer.k_norm is not None:
            q = self._ops.rms_norm(q.contiguous(), layer.q_norm, eps)
            k = self._ops.rms_norm(k.contiguous(), layer.k_norm, eps)
        return q, k, v


def _has_joined_layers(weights: Weights) -> bool:
    return any(
        isinstance(layer.qkv, JoinedLinear) or isinstance(layer.gate_up, JoinedLinear) for layer in weights.layers
    )


def choose_stack(weights: Weights, config: ModelConfig, ops: Ops, attention: Attention) -> Stack:
    """One native call for all layers where everything in them is native; the same bits as layer by layer."""
    if ops.name == attention.name == "native" and not _has_joined_layers(weights):
        from replicas.engine.native.stack import NativeStack

        kernels = native.library()
        assert kernels is not None, "native operations were chosen and now the kernels are gone"
        return NativeStack(kernels, weights, config)
    if ops.name == "triton":
        from replicas.engine.flash import FlashAttention
        from replicas.engine.triton.attention import TritonAttention
        from replicas.engine.triton.stack import TritonStack

        if isinstance(attention, TritonAttention | FlashAttention):
            return TritonStack(weights, config, ops, attention)
    return LayerByLayer(weights, config, ops, attention)
