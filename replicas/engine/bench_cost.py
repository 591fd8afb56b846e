"""What one token must cost: bytes that have to move and operations that have to be done, from a model's shape alone.

The figures are the least that the model as defined allows with this engine's data types, not what was executed:
achieved rates divided by a machine's ceilings then say how much better an implementation could still be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from replicas.engine.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class Cost:
    """bytes: weights once, keys and values once per sequence. flops: a multiply-add is two."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True, slots=True)
class Held:
    """What quantised weights and caches really take. weight_bytes: of all matrices that a token is multiplied with,
    scales and zero points included. kv_bytes: of one token's keys and values in one layer."""

    weight_bytes: int
    kv_bytes: int


def decode_step(config: ModelConfig, contexts: Sequence[int], element_size: int, held: Held | None = None) -> Cost:
    """One token for each sequence; contexts[i] is what sequence i attends to, its new token included.

    Weights (head included, a tied one counts as what it is: a product) are read once for all; each sequence reads its
    keys and values, the new ones come from its own registers and are written. held: None for all in element_size.
    """
    positions = sum(_attended(config, context) for context in contexts)
    held = held or Held(config.matmul_parameters * element_size, 2 * config.kv_size * element_size)
    return Cost(
        bytes=held.weight_bytes + positions * held.kv_bytes,
        flops=2 * config.matmul_parameters * len(contexts) + 4 * config.q_size * positions,
    )


def prompt(config: ModelConfig, tokens: int, element_size: int) -> Cost:
    """One prompt up to its first output token's logits, in one pass over the weights.

    Only the last token needs the head, and the last layer beyond its keys and values.
    """
    head = config.vocab_size * config.hidden_size
    per_layer = (config.matmul_parameters - head) // config.num_layers
    last_kv = 2 * config.hidden_size * config.kv_size
    rest_of_last = per_layer - last_kv
    products = tokens * (per_layer * (config.num_layers - 1) + last_kv) + rest_of_last + head
    attended = sum(
        _triangle(tokens, window) if layer < config.num_layers - 1 else min(tokens, window or tokens)
        for layer, window in enumerate(config.windows)
    )
    return Cost(
        bytes=config.matmul_parameters * element_size + tokens * config.kv_bytes_per_token(element_size),
        flops=2 * products + 4 * config.q_size * attended,
    )


def _attended(config: ModelConfig, context: int) -> int:
    """Positions that one query at the end of `context` sees, summed over the layers."""
    return sum(min(context, window or context) for window in config.windows)


def _triangle(tokens: int, window: int | None) -> int:
    """Positions that `tokens` causal queries see in one layer, in all."""
    full = min(tokens, window or tokens)
    return full * (full + 1) // 2 + (tokens - full) * full
