"""The naive oracle: the whole sequence is computed anew for each token, in float32, one matrix product at a time.

No cache, no paging, no batching, no fused weights and none of the engine's operations: it shares with them only the
reading of files. Everything fast is compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from replicas.engine.kv_format import KVFormat
from replicas.engine.model_config import ModelConfig, RopeScaling
from replicas.engine.weights import expected_tensors, open_checkpoint


class Reference:
    """One model; `load` opens what `open_checkpoint` opens. kv: rounds keys and values as its caches do, with kv_scales
    [layers, 2, KV heads] where it takes any."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        kv: KVFormat | None = None,
        kv_scales: Tensor | None = None,
    ) -> None:
        self.config = config
        self._kv, self._kv_scales = kv, kv_scales
        self._weights = weights

    @classmethod
    def load(cls, path: str | Path, kv: KVFormat | None = None, kv_scales: Tensor | None = None) -> Reference:
        checkpoint = open_checkpoint(path)
        names = expected_tensors(checkpoint.config)
        return cls(checkpoint.config, {name: checkpoint.tensor(name).float() for name in names}, kv, kv_scales)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after each of the T tokens: float32 [T, V]."""
        x = self._weights["model.embed_tokens.weight"][list(token_ids)]
        for layer in range(self.config.num_layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(prefix + "self_attn.", self._norm(x, prefix + "input_layernorm"), layer)
            x = x + self._mlp(prefix + "mlp.", self._norm(x, prefix + "post_attention_layernorm"))
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self._linear(self._norm(x, "model.norm"), head)

    def generate(self, prompt_ids: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
        """Greedy continuation, at most max_tokens ids; an end-of-sequence id ends it and is its last."""
        ids = list(prompt_ids)
        for _ in range(max_tokens):
            ids.append(int(self.logits(ids)[-1].argmax()))
            if ids[-1] in self.config.eos_token_ids and not ignore_eos:
                break
        return ids[len(prompt_ids) :]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self._weights[f"{name}.weight"].T
        bias = self._weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean_square = (x * x).mean(dim=-1, keepdim=True)
        return x / torch.sqrt(mean_square + self.config.rms_norm_eps) * self._weights[f"{name}.weight"]

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self._linear(x, prefix + "gate_proj"), self._linear(x, prefix + "up_proj")
        return self._linear(gate * torch.sigmoid(gate) * up, prefix + "down_proj")

    def _attention(self, prefix: str, x: Tensor, layer: int) -> Tensor:
        length, head_dim, window = len(x), self.config.head_dim, self.config.windows[layer]
        q = self._linear(x, prefix + "q_proj").view(length, -1, head_dim)
        k = self._linear(x, prefix + "k_proj").view(length, -1, head_dim)
        v = self._linear(x, prefix + "v_proj").view(length, -1, head_dim)
        if self.config.qk_norm:
            q, k = self._norm(q, prefix + "q_norm"), self._norm(k, prefix + "k_norm")
        angles = torch.arange(length).unsqueeze(1) * rotary_frequencies(self.config)
        q, k = _rotate(q, angles), _rotate(k, angles)
        k, v = self._stored(k, layer, 0), self._stored(v, layer, 1)
        visible = torch.ones(length, length, dtype=torch.bool).tril()
        if window is not None:
            visible &= ~torch.ones(length, length, dtype=torch.bool).tril(-window)
        heads = []
        for head in range(self.config.num_heads):
            kv_head = head * self.config.num_kv_heads // self.config.num_heads
            scores = q[:, head] @ k[:, kv_head].T / math.sqrt(head_dim)
            heads.append(scores.masked_fill(~visible, -math.inf).softmax(dim=-1) @ v[:, kv_head])
        return self._linear(torch.cat(heads, dim=-1), prefix + "o_proj")

    def _stored(self, x: Tensor, layer: int, which: int) -> Tensor:
        """Keys (which 0) or values (1) as a cache gives them back."""
        if self._kv is None:
            return x
        scales = None if self._kv_scales is None else self._kv_scales[layer, which]
        return self._kv.decode(*self._kv.encode(x, scales))


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of every head of [T, heads, D] by angles [T, D/2]."""
    half = x.shape[-1] // 2
    cos, sin = angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs."""
    base = [config.rope_theta ** (-2 * pair / config.head_dim) for pair in range(config.head_dim // 2)]
    if config.rope_scaling is None:
        return torch.tensor(base)
    return torch.tensor([_scaled(frequency, pair, config.rope_scaling) for pair, frequency in enumerate(base)])


def _scaled(frequency: float, pair: int, scaling: RopeScaling) -> float:
    if scaling.kind == "factors":
        return frequency / scaling.factors[pair]
    if scaling.kind == "linear":
        return frequency / scaling.factor
    wavelength = 2 * math.pi / frequency
    if wavelength < scaling.original_max_position / scaling.high_freq_factor:
        return frequency
    if wavelength > scaling.original_max_position / scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
    smooth /= scaling.high_freq_factor - scaling.low_freq_factor
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
