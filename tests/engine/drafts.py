"""Artefacts for the tiny model's speculation: heads that are sometimes right, a noised copy, a draft of its layers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from replicas.engine.model_config import ModelConfig
from replicas.engine.spec.draft_layers import FUSE, STATES, DraftConfig, layer_tensors, save_draft
from replicas.engine.spec.heads import HeadsConfig, save_heads
from replicas.engine.weights import open_checkpoint

PROPOSERS = ("ngram", "suffix", "medusa", "hydra", "layers", "states", "noised copy", "several")


def write_heads(folder: Path, model: Path, *, sequential: bool, **changed: Any) -> Path:
    """Heads near the identity: they guess that the next token is followed by itself, which now and then is right."""
    checkpoint = open_checkpoint(model)
    config = HeadsConfig(
        **{
            "num_heads": 3,
            "hidden_size": checkpoint.config.hidden_size,
            "vocab_size": checkpoint.config.vocab_size,
            "base_revision": checkpoint.revision,
            "sequential": sequential,
            **changed,
        }
    )
    generator = torch.Generator().manual_seed(3)
    tensors = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in config.shapes().items()}
    tensors["targets"] = torch.arange(0, config.vocab_size)
    save_heads(folder, config, tensors)
    return folder


def write_layers_draft(folder: Path, model: Path, layers: tuple[int, ...] = (0,), **changed: Any) -> Path:
    """With fed_with="states" the layers get the states and hardly anything of the tokens: likely the same again."""
    checkpoint = open_checkpoint(model)
    shape: ModelConfig = checkpoint.config
    config = DraftConfig(
        **{
            "layers": layers,
            "base_revision": checkpoint.revision,
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            **changed,
        }
    )
    tensors = layer_tensors(checkpoint, layers)
    if config.fed_with == STATES:
        eye = torch.eye(shape.hidden_size)
        tensors[FUSE] = torch.cat((0.1 * eye, eye), dim=1)
    save_draft(folder, config, tensors, torch.arange(shape.vocab_size - 2))
    return folder


def write_noised_copy(folder: Path, model: Path, noise: float = 0.05) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder)
    generator = torch.Generator().manual_seed(4)
    tensors = load_file(folder / "model.safetensors")
    for tensor in tensors.values():
        tensor += noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def settings_of(name: str, folder: Path, model: Path) -> dict[str, Any]:
    """`speculative` settings of one of PROPOSERS; what it needs is written to `folder` first."""
    if name == "medusa" or name == "hydra":
        return {"method": "medusa", "heads": str(write_heads(folder / name, model, sequential=name == "hydra"))}
    if name == "layers":
        return {"method": "draft_model", "model": str(write_layers_draft(folder / name, model))}
    if name == "states":
        draft = write_layers_draft(folder / name, model, fed_with=STATES)
        return {"method": "draft_model", "model": str(draft), "draft_kv_tokens": 512}
    if name == "noised copy":
        return {
            "method": "draft_model",
            "model": str(write_noised_copy(folder / "copy", model)),
            "draft_kv_tokens": 512,
        }
    if name == "several":
        heads = write_heads(folder / "several", model, sequential=True)
        return {"method": ("ngram", "medusa"), "heads": str(heads)}
    return {"method": name, "min_match": 1}
