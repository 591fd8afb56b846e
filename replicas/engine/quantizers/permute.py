"""A seeded permutation of channels that changes no result: the same function, its weights in another order.

Why: a checkpoint that was quantised before (a GGUF's Q4_1 holds groups of 32 neighbouring inputs) lies on that grid,
and rounding it again on the same grid loses almost nothing. Compared like that, every method looks perfect. Permuted,
each new group draws from several old ones, and methods can be told apart. What may change places:

    residual stream   hidden units, everywhere at once: columns of the embedding (and of a head of its own), norms,
                      inputs of q, k, v, gate and up, outputs of o and down
    values            within a KV head: outputs of v, and inputs of o for every query head that reads it (queries and
                      keys stay: rotary embeddings tie their places)
    MLP               inner units: outputs of gate and up, inputs of down

In exact arithmetic logits are the same; in float32 sums are taken in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from replicas.engine.model_config import ModelConfig
from replicas.engine.quantizers.folder import check_out, hf_config, write_folder
from replicas.engine.weights import expected_tensors, open_checkpoint

_READS_HIDDEN = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
_WRITES_HIDDEN = ("o_proj", "down_proj")


def permute(source: str | Path, out: Path, *, seed: int = 0) -> int:
    """Write `source` with permuted channels as a float32 Hugging Face folder; bytes of its weights.

    ConfigError if the source cannot be read or `out` already holds a model.
    """
    check_out(out)
    checkpoint = open_checkpoint(source)
    config = {**hf_config(checkpoint), "dtype": "float32", "torch_dtype": "float32"}
    plan = _Plan(checkpoint.config, seed)
    tensors = {name: plan.apply(name, checkpoint.tensor(name).float()) for name in expected_tensors(checkpoint.config)}
    return write_folder(out, checkpoint, config, tensors)


class _Plan:
    def __init__(self, config: ModelConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._config = config
        self._hidden = torch.randperm(config.hidden_size, generator=generator)
        self._values, self._inner = [], []
        for _ in range(config.num_layers):
            heads = [torch.randperm(config.head_dim, generator=generator) for _ in range(config.num_kv_heads)]
            self._values.append(torch.stack(heads))
            self._inner.append(torch.randperm(config.intermediate_size, generator=generator))

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        rows, columns = self._orders(name)
        if rows is not None:
            tensor = tensor[rows]
        return (tensor if columns is None else tensor[:, columns]).contiguous()

    def _orders(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Which row, and which column, of the old tensor stands at each place of the new."""
        if not name.startswith("model.layers."):
            return (self._hidden, None) if name == "model.norm.weight" else (None, self._hidden)
        index, own = name.removeprefix("model.layers.").split(".", 1)
        if own.endswith("layernorm.weight"):
            return self._hidden, None
        rows = next(self._rows(int(index), own), None)
        if not own.endswith(".weight") or "norm" in own:
            return rows, None
        return rows, self._columns(int(index), own)

    def _rows(self, layer: int, own: str) -> Iterator[Tensor]:
        if any(part in own for part in _WRITES_HIDDEN):
            yield self._hidden
        if "v_proj" in own:
            yield self._spread(self._values[layer])
        if "gate_proj" in own or "up_proj" in own:
            yield self._inner[layer]

    def _columns(self, layer: int, own: str) -> Tensor | None:
        if own.endswith(_READS_HIDDEN):
            return self._hidden
        if "o_proj" in own:
            group = self._config.num_heads // self._config.num_kv_heads
            return self._spread(self._values[layer].repeat_interleave(group, dim=0))
        return self._inner[layer] if "down_proj" in own else None

    @staticmethod
    def _spread(heads: Tensor) -> Tensor:
        """Orders within heads [heads, head_dim] -> one order of all channels."""
        return (heads + torch.arange(len(heads)).unsqueeze(1) * heads.shape[1]).flatten()
