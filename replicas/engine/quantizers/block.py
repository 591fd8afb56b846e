"""One decoder layer for calibration: float32, whole windows, in stages whose weights may be exchanged on the way.

x ─ norm ─ [q k v] ─ attention ─ [o] ─ + ─ norm ─ [gate up] ─ silu(gate) · up ─ [down] ─ + ─▶
            stage 0               1                stage 2                        3
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from replicas.engine.model_config import ModelConfig
from replicas.engine.ops import TorchOps
from replicas.engine.weights import Checkpoint

STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
LINEARS = tuple(name for stage in STAGES for name in stage)
_OPS = TorchOps()


class Block:
    """tensors: this layer's by their names without `model.layers.N.`, float32; exchange them at will."""

    def __init__(self, config: ModelConfig, index: int, tensors: Mapping[str, Tensor], cos_sin: Tensor) -> None:
        self.config, self.tensors = config, dict(tensors)
        self._index, self._window, self._cos_sin = index, config.windows[index], cos_sin

    @classmethod
    def read(cls, checkpoint: Checkpoint, index: int, cos_sin: Tensor, names: list[str]) -> Block:
        """`names`: of all tensors of a checkpoint."""
        prefix = f"model.layers.{index}."
        own = [name for name in names if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): checkpoint.tensor(name).float() for name in own}
        return cls(checkpoint.config, index, tensors, cos_sin)

    def stages(self, states: list[Tensor]) -> Iterator[tuple[tuple[str, ...], list[Tensor]]]:
        """Each stage's linear layers and their inputs, one tensor [B, T, K] for each of `states` [B, T, H].

        What the caller does to the stage's weights counts from there on. When the last stage is done, `states` holds
        the layer's outputs (new tensors: the old ones stay as they were).
        """
        inputs = [self._norm(x, "input_layernorm") for x in states]
        yield STAGES[0], inputs
        inputs = [self._attend(x) for x in inputs]
        yield STAGES[1], inputs
        for i, x in enumerate(inputs):
            states[i] = states[i] + self._linear(x, "self_attn.o_proj")
        inputs = [self._norm(x, "post_attention_layernorm") for x in states]
        yield STAGES[2], inputs
        inputs = [self._inner(x) for x in inputs]
        yield STAGES[3], inputs
        for i, x in enumerate(inputs):
            states[i] = states[i] + self._linear(x, "mlp.down_proj")

    def run(self, states: list[Tensor]) -> None:
        """Brings `states` to the layer's outputs."""
        for _ in self.stages(states):
            pass

    def copy(self) -> Block:
        return Block(self.config, self._index, self.tensors, self._cos_sin)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return _OPS.rms_norm(x, self.tensors[f"{name}.weight"], self.config.rms_norm_eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _inner(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(self._linear(x, "mlp.gate_proj")) * self._linear(x, "mlp.up_proj")

    def _attend(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            self._linear(x, f"self_attn.{name}_proj").view(batch * length, -1, self.config.head_dim) for name in "qkv"
        )
        if self.config.qk_norm:
            q, k = self._norm(q, "self_attn.q_norm"), self._norm(k, "self_attn.k_norm")
        q, k = _OPS.rope(q, k, self._cos_sin, torch.arange(length).repeat(batch))
        q, k, v = (part.view(batch, length, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
        mask = None
        if self._window is not None:
            visible = torch.ones(length, length, dtype=torch.bool).tril()
            mask = visible & ~visible.tril(-self._window)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=1 / math.sqrt(self.config.head_dim), enable_gqa=True
        )
        return out.transpose(1, 2).flatten(2)


def second_moment(inputs: list[Tensor], others: list[Tensor] | None = None) -> Tensor:
    """Mean of x y' over all rows x of the inputs, each [..., K], and y of the others (x itself): float32 [K, K]."""
    width, rows = inputs[0].shape[-1], 0
    total = torch.zeros(width, width)
    for x, y in zip(inputs, others or inputs, strict=True):
        flat = x.flatten(0, -2)
        total.addmm_(flat.T, y.flatten(0, -2))
        rows += len(flat)
    return total / rows


def mean_magnitude(inputs: list[Tensor]) -> Tensor:
    """Mean |x| of each input: float32 [K]."""
    rows = sum(x.shape[:-1].numel() for x in inputs)
    return torch.stack([x.abs().flatten(0, -2).sum(0) for x in inputs]).sum(0) / rows
