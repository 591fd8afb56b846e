"""Medusa heads as a folder: heads.json and heads.safetensors, checked against the model they are to guess for.

    heads.json          format, num_heads, hidden_size, vocab_size, base_revision, sequential
    heads.safetensors   targets                 int32 [N]: the token ids that the heads can name
                        heads.I.state.weight    [H, H], heads.I.state.bias [H]
                        heads.I.token.weight    [H, H], where sequential

Head I guesses the token I + 1 places after the target's next one. With the last hidden state h and W, U, b of the head:

    Medusa (Cai et al. 2024, arXiv:2401.10774)        z_I = h + silu(W h + b)
    sequential (Hydra: Ankner et al. 2024,            z_I = z_{I-1} + silu(W z_{I-1} + U e(previous token) + b),
                arXiv:2402.05109)                     z_{-1} = h

and the guess is the target whose row of the model's own output layer has the greatest product with z_I. That layer and
the embedding e are the model's, so a head is only one or two H x H matrices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicas.engine.tensor_files import check_numbers, read_tensors, write_tensors
from replicas.engine.weights import read_json
from replicas.protocol import ConfigError

FORMAT = "signalbox-heads-1"
_CONFIG, _WEIGHTS = "heads.json", "heads.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig:
    num_heads: int
    hidden_size: int
    vocab_size: int
    base_revision: str
    sequential: bool
    format: str = FORMAT

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor but `targets`."""
        hidden = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(self.num_heads):
            shapes[f"heads.{i}.state.weight"], shapes[f"heads.{i}.state.bias"] = (hidden, hidden), (hidden,)
            if self.sequential:
                shapes[f"heads.{i}.token.weight"] = (hidden, hidden)
        return shapes


def save_heads(folder: Path, config: HeadsConfig, tensors: Mapping[str, Tensor]) -> None:
    """Weights in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {
        name: (t.to(torch.int32) if name == "targets" else t.half()).contiguous().clone() for name, t in tensors.items()
    }
    write_tensors(folder / _WEIGHTS, half)
    (folder / _CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n")


def open_heads(
    folder: str, *, hidden_size: int, vocab_size: int, revision: str, any_revision: bool
) -> tuple[HeadsConfig, dict[str, Tensor]]:
    """The heads in `folder`, in float32. ConfigError naming file and tensor where they are not for such a model."""
    root = Path(folder).expanduser()
    if not (root / _CONFIG).is_file():
        raise ConfigError(f"speculative.heads {folder!r} holds no {_CONFIG}", param="speculative.heads")
    config = _parse(read_json(root / _CONFIG))
    for name, wanted in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        if getattr(config, name) != wanted:
            raise _refused(f"{_CONFIG}: {name} is {getattr(config, name)}, the model's is {wanted}")
    if config.base_revision != revision and not any_revision:
        raise _refused(
            f"{_CONFIG}: these heads were trained for weights {config.base_revision}, the model's are {revision} "
            "(speculative.any_revision takes them anyway)"
        )
    tensors = read_tensors(root / _WEIGHTS, "speculative.heads")
    for name, shape in config.shapes().items():
        if name not in tensors:
            raise _refused(f"{_WEIGHTS}: tensor {name!r} is missing")
        if tuple(tensors[name].shape) != shape:
            raise _refused(f"{_WEIGHTS}: tensor {name!r} has shape {tuple(tensors[name].shape)}, expected {shape}")
        check_numbers(tensors[name], f"{_WEIGHTS}: tensor {name!r}", "speculative.heads")
    check_targets(tensors.get("targets"), vocab_size, _WEIGHTS, "speculative.heads")
    return config, {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def check_targets(targets: Tensor | None, vocab_size: int, file: str, param: str) -> None:
    """`targets`: the token ids, each once, that a guess may name."""
    if targets is None:
        raise ConfigError(f"{file}: tensor 'targets' is missing", param=param)
    whole = targets.dim() == 1 and len(targets) > 0 and targets.dtype in (torch.int32, torch.int64)
    ids = set(targets.tolist()) if whole else set()
    if not whole or len(ids) < len(targets) or not 0 <= min(ids) <= max(ids) < vocab_size:
        raise ConfigError(f"{file}: tensor 'targets' must hold different token ids in 0..{vocab_size - 1}", param=param)


def _parse(given: Mapping[str, Any]) -> HeadsConfig:
    if given.get("format") != FORMAT:
        raise _refused(f"{_CONFIG}: format {given.get('format')!r} is not supported; use {FORMAT}")
    try:
        config = HeadsConfig(**given)
    except TypeError as error:
        raise _refused(f"{_CONFIG}: {error}") from error
    for name in ("num_heads", "hidden_size", "vocab_size"):
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise _refused(f"{_CONFIG}: {name} must be a whole number above 0, got {value!r}")
    return config


def _refused(why: str) -> ConfigError:
    return ConfigError(why, param="speculative.heads")
