"""A model as a Hugging Face folder: config.json, tokenizer files, model.safetensors. Complete or not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from replicas.engine.model_config import ModelConfig
from replicas.engine.tensor_files import write_tensors
from replicas.engine.weights import Checkpoint, read_json
from replicas.protocol import ConfigError

_KEPT = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
_MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def hf_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json of a checkpoint: its own, or one written from what its GGUF says."""
    own = checkpoint.folder / "config.json"
    if checkpoint.gguf is None:
        return read_json(own)
    config = checkpoint.config
    raw: dict[str, Any] = {
        "architectures": [config.architecture],
        "model_type": _MODEL_TYPES[config.architecture],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _one_or_all(config.eos_token_ids),
        **_scaling(config),
    }
    if config.architecture == "LlamaForCausalLM":
        raw |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    if any(window is not None for window in config.windows):
        raise ConfigError("the sliding window of a GGUF cannot be written as config.json")
    return raw


def _one_or_all(ids: tuple[int, ...]) -> int | list[int] | None:
    return None if not ids else ids[0] if len(ids) == 1 else list(ids)


def _scaling(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    if scaling.kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": scaling.factor}}
    raise ConfigError(f"rope scaling {scaling.kind!r} of a GGUF cannot be written as config.json")


def write_folder(out: Path, checkpoint: Checkpoint, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Write the folder `out`, which appears whole or not at all; bytes of model.safetensors."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    part.mkdir(parents=True)
    for name in _KEPT:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, part / name)
    if not (part / "tokenizer.json").exists() and checkpoint.gguf is not None:
        from replicas.engine.tokenizer import write_tokenizer_files

        write_tokenizer_files(checkpoint.gguf.path, part)
    write_tensors(part / "model.safetensors", tensors)
    (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    os.replace(part, out)
    return (out / "model.safetensors").stat().st_size


def check_out(out: Path) -> None:
    """ConfigError if something is there already: nothing is overwritten."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{str(out)!r} is not a folder", param="out")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{str(out)!r} is not empty; name another folder or remove it", param="out")
