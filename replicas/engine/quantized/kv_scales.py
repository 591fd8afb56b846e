"""Scales for 8-bit keys and values that a safetensors folder brings.

llm-compressor writes them beside a layer's projections (compressed-tensors, `kv_cache_scheme`) under names that vLLM
reads too:

    model.layers.N.self_attn.k_scale, v_scale             one number, or one a KV head: [heads] or [heads, 1, 1]
    model.layers.N.self_attn.k_zero_point, v_zero_point   zeros, where they are written at all
    model.layers.N.self_attn.q_scale                      of queries; not used, as queries are scaled by what they are

A key of code c (e4m3) is c * k_scale. Older versions stored an `output_scale` of the layer k_proj, taken before rotary
embeddings; checkpoints that do state `output_activations` and are refused (`compressed.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from replicas.engine.model_config import ModelConfig
from replicas.engine.quantized.settings import FLOATS, Settings
from replicas.protocol import ConfigError

if TYPE_CHECKING:  # it imports the readers of formats, and one of them this file
    from replicas.engine.quantized.stored import Held

_NAME = re.compile(r"model\.layers\.(\d+)\.self_attn\.([qkv])_(scale|zero_point)")


def check_scheme(scheme: Settings) -> None:
    """ConfigError for a `kv_cache_scheme` other than e4m3 with scales fixed beforehand."""
    scheme.choice("num_bits", (8,))
    scheme.choice("type", ("float",))
    scheme.choice("dynamic", (False,), False)
    scheme.choice("symmetric", (True,), True)
    scheme.choice("strategy", ("tensor", "attn_head"), "tensor")


def is_kv_scale(name: str, num_layers: int) -> bool:
    """Whether a tensor of this name belongs to the scales of a model's keys and values."""
    found = _NAME.fullmatch(name)
    return found is not None and int(found[1]) < num_layers


def stored_kv_scales(
    config: ModelConfig, held: Mapping[str, Held], files: str, tensor: Callable[[str], Tensor]
) -> Tensor | None:
    """Float32 [num_layers, 2, num_kv_heads], keys first; None where the folder has none.

    held: its tensors by name; files: what they lie in; `tensor(name)` reads one. ConfigError, naming file and tensor,
    for a layer without, for shapes and types that are none of the above, and for numbers that are no scales.
    """
    parts = [found for name in held if (found := _NAME.fullmatch(name)) and is_kv_scale(name, config.num_layers)]
    for found in parts:
        name = found[0]
        if found[3] == "zero_point" and bool(tensor(name).float().any()):
            raise ConfigError(
                f"{held[name].file}: tensor {name!r} is not zero, and keys and values have no zero points"
            )
    if not any(found[3] == "scale" and found[2] in "kv" for found in parts):
        return None
    scales = torch.empty(config.num_layers, 2, config.num_kv_heads)
    for layer in range(config.num_layers):
        for which, kind in enumerate("kv"):
            name = f"model.layers.{layer}.self_attn.{kind}_scale"
            if name not in held:
                raise ConfigError(f"{files}: tensor {name!r} is missing, other layers have theirs")
            scales[layer, which] = _checked(name, held[name], config.num_kv_heads, tensor)
    return scales


def _checked(name: str, held: Held, heads: int, tensor: Callable[[str], Tensor]) -> Tensor:
    if held.kind not in FLOATS:
        raise ConfigError(f"{held.file}: tensor {name!r} has the type {held.kind}, expected {' or '.join(FLOATS)}")
    scale = tensor(name).float().flatten()
    if len(scale) not in (1, heads):
        raise ConfigError(f"{held.file}: tensor {name!r} has shape {held.shape}, expected one number or {heads}")
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ConfigError(f"{held.file}: tensor {name!r} holds scales that are not finite and greater than 0")
    return scale
