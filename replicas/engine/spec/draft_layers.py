"""A draft made of some of the target's own layers: draft.json and draft.safetensors.

    draft.json         format, layers (which of the target's they began as, or are shaped like), base_revision,
                       hidden_size, vocab_size, fed_with: "tokens", or "states" if the layers read the target's last
                       states beside the tokens
    draft.safetensors  targets                     int32 [N]: the token ids that it can name
                       model.layers.I.*            as in the target's checkpoint, but in int8 with a float16 scale a row
                       NAME.scale                       (vectors: float16)
                       model.norm.weight
                       fuse.weight                 [H, 2 H], of a draft fed with states (like EAGLE: Li et al. 2024,
                                                   arXiv:2401.15077): [embedding; state] -> what its layers take

Embedding and output layer are the target's own, so the artefact holds nothing but layers. It is a `Checkpoint` of a
shallower model to the decoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicas.engine.gguf_file import GGUFFile
from replicas.engine.model import Decoder
from replicas.engine.model_config import ModelConfig
from replicas.engine.ops import Linear, Ops
from replicas.engine.quantized.rounding import int8
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.spec.heads import check_targets
from replicas.engine.spec.proposer import likeliest
from replicas.engine.tensor_files import check_numbers, read_tensors, write_tensors
from replicas.engine.weights import Checkpoint, expected_tensors, read_json
from replicas.protocol import ConfigError

FORMAT = "signalbox-draft-1"
CONFIG, _WEIGHTS = "draft.json", "draft.safetensors"
FUSE = "fuse.weight"
TOKENS, STATES = "tokens", "states"
_PARAM = "speculative.model"
_SHARED = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftConfig:
    layers: tuple[int, ...]
    base_revision: str
    hidden_size: int
    vocab_size: int
    fed_with: str = TOKENS
    format: str = FORMAT


def own_tensors(model: ModelConfig, num_layers: int, fed_with: str) -> dict[str, tuple[int, ...]]:
    """Shapes of what a draft of `num_layers` of the model's layers brings itself, by name."""
    shapes = expected_tensors(shallow(model, tuple(range(num_layers))))
    own = {name: shape for name, shape in shapes.items() if name not in _SHARED}
    return own | {FUSE: (model.hidden_size, 2 * model.hidden_size)} if fed_with == STATES else own


def shallow(model: ModelConfig, layers: tuple[int, ...]) -> ModelConfig:
    """A model of these layers only."""
    return replace(model, num_layers=len(layers), windows=tuple(model.windows[layer] for layer in layers))


def save_draft(folder: Path, config: DraftConfig, tensors: Mapping[str, Tensor], targets: Tensor) -> None:
    """Matrices in int8, to the nearest of 255 levels of each row's own range."""
    held: dict[str, Tensor] = {"targets": targets.to(torch.int32).contiguous()}
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            scale = (tensor.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-8).half().float()
            held[name] = (tensor / scale).round().clamp(-127, 127).to(torch.int8).contiguous()
            held[name + ".scale"] = scale.half().contiguous()
        else:
            held[name] = tensor.half().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / _WEIGHTS, held)
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n")


class DraftCheckpoint:
    """The artefact in `folder` for a target; ConfigError naming file and tensor where it does not fit to it.

    codes: give matrices as they are stored, in 8 bits.
    """

    gguf: GGUFFile | None = None
    quantization: str | None = None
    kv_scales: Tensor | None = None

    def __init__(
        self, folder: Path, target: ModelConfig, revision: str, *, any_revision: bool, codes: bool = False
    ) -> None:
        self.folder, self._codes = folder, codes
        draft = _parse(read_json(folder / CONFIG))
        for name in ("hidden_size", "vocab_size"):
            ours, wanted = getattr(draft, name), getattr(target, name)
            if ours != wanted:
                raise _refused(f"{CONFIG}: {name} is {ours}, the model's is {wanted}")
        if draft.base_revision != revision and not any_revision:
            raise _refused(
                f"{CONFIG}: this draft was made from weights {draft.base_revision}, the model's are {revision} "
                "(speculative.any_revision takes it anyway)"
            )
        if not all(0 <= layer < target.num_layers for layer in draft.layers):
            raise _refused(f"{CONFIG}: layers {list(draft.layers)} are not all in 0..{target.num_layers - 1}")
        self.config, self.fed_with = shallow(target, draft.layers), draft.fed_with
        self.revision = f"{revision}-draft"
        self._tensors = read_tensors(folder / _WEIGHTS, _PARAM)
        for name, shape in own_tensors(target, len(draft.layers), draft.fed_with).items():
            self._check(name, shape)
        check_targets(self._tensors.get("targets"), target.vocab_size, _WEIGHTS, _PARAM)
        self.targets = self._tensors["targets"].long()

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._tensors:
            raise _refused(f"{_WEIGHTS}: tensor {name!r} is missing")
        if tuple(self._tensors[name].shape) != shape:
            raise _refused(
                f"{_WEIGHTS}: tensor {name!r} has shape {tuple(self._tensors[name].shape)}, expected {shape}"
            )
        if len(shape) == 2 and self._tensors[name].dtype is torch.int8:
            name += ".scale"
            if name not in self._tensors or tuple(self._tensors[name].shape) != (shape[0], 1):
                raise _refused(f"{_WEIGHTS}: tensor {name!r} is missing or not of shape {(shape[0], 1)}")
        check_numbers(self._tensors[name], f"{_WEIGHTS}: tensor {name!r}", _PARAM)

    def tensor(self, name: str) -> Tensor:
        held = self._tensors[name]
        return held.float() * self._tensors[name + ".scale"].float() if held.dtype is torch.int8 else held.float()

    def matrix(self, module: str) -> Tensor | QuantizedWeight:
        weight = self.tensor(f"{module}.weight")
        return int8(weight) if self._codes else weight


class SubsetHead:
    """The target's output layer over `targets` only: a draft that may not name rare tokens costs a fraction of one that
    may. See `draft_model.Head`."""

    def __init__(self, target: Decoder, targets: Tensor, ops: Ops) -> None:
        self.targets = targets.to(target.device, torch.int64)
        self.output = rounded_linear(target.head_rows(self.targets).to(target.dtype), None, ops)

    def likeliest(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        at, sure = likeliest(self.output(hidden).float())
        return self.targets[at], sure


def rounded_linear(weight: Tensor, bias: Tensor | None, ops: Ops) -> Linear:
    """A layer that only guesses: in 8 bits where a CPU multiplies with codes, for reading it is what a guess costs."""
    if ops.multiplies_quantized and weight.device.type == "cpu":
        return ops.quantized_linear(int8(weight), bias)
    return ops.linear(weight, bias)


def _parse(given: Mapping[str, Any]) -> DraftConfig:
    if given.get("format") != FORMAT:
        raise _refused(f"{CONFIG}: format {given.get('format')!r} is not supported; use {FORMAT}")
    try:
        config = DraftConfig(**{**given, "layers": tuple(given.get("layers", ()))})
    except TypeError as error:
        raise _refused(f"{CONFIG}: {error}") from error
    if config.fed_with not in (TOKENS, STATES):
        raise _refused(f"{CONFIG}: fed_with {config.fed_with!r} is unknown; use {TOKENS} or {STATES}")
    if not config.layers or not all(isinstance(layer, int) for layer in config.layers):
        raise _refused(f"{CONFIG}: layers must name at least one layer by number")
    return config


def _refused(why: str) -> ConfigError:
    return ConfigError(why, param=_PARAM)


def state_tensors(checkpoint: Checkpoint, num_layers: int, seed: int = 0) -> dict[str, Tensor]:
    """What a draft fed with states begins as: random layers of the model's shape, which learn faster than copies do.

    Behind `fuse` both halves of the input have the same size; a quarter of the model's final norm keeps the first
    logits small.
    """
    config, generator = checkpoint.config, torch.Generator().manual_seed(seed)
    norm = checkpoint.tensor("model.norm.weight").float()
    tensors = {}
    for name, shape in own_tensors(config, num_layers, STATES).items():
        if name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        elif len(shape) == 1:
            tensors[name] = torch.ones(shape)
        else:
            tensors[name] = 0.02 * torch.randn(shape, generator=generator)
    embed = checkpoint.tensor("model.embed_tokens.weight").float().square().mean().sqrt()
    state = norm.square().mean().sqrt()
    halves = [
        torch.randn(config.hidden_size, config.hidden_size, generator=generator) / size for size in (embed, state)
    ]
    tensors[FUSE] = torch.cat(halves, dim=1) / (2 * config.hidden_size**0.5)
    tensors["model.norm.weight"] = norm / 4
    return tensors


def layer_tensors(checkpoint: Checkpoint, layers: tuple[int, ...]) -> dict[str, Tensor]:
    """The chosen layers of a checkpoint, renumbered from 0, and the final norm; float32."""
    renamed = {"model.norm.weight": checkpoint.tensor("model.norm.weight").float()}
    for name in own_tensors(checkpoint.config, len(layers), TOKENS):
        if name.startswith("model.layers."):
            _, _, index, rest = name.split(".", 3)
            renamed[name] = checkpoint.tensor(f"model.layers.{layers[int(index)]}.{rest}").float()
    return renamed
