"""The run: calibrate and quantise layer after layer, keep each as it is done, then write the checkpoint.

Every layer is calibrated on what the quantised layers before it put out, so later layers correct earlier ones. Within
a layer GPTQ goes on the same way from stage to stage (`true_sequential`).

A run that finds layers of an earlier one (parts.py) computes only their outputs and goes on.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from replicas.engine.model import rope_table
from replicas.engine.quantizers import awq, gptq, rtn
from replicas.engine.quantizers.block import LINEARS, STAGES, Block, mean_magnitude, second_moment
from replicas.engine.quantizers.folder import check_out, hf_config, write_folder
from replicas.engine.quantizers.grid import Codes, Grid
from replicas.engine.quantizers.layouts import LAYOUTS, check_layout, check_shape, usual_layout
from replicas.engine.quantizers.parts import Parts
from replicas.engine.weights import Checkpoint, expected_tensors, open_checkpoint
from replicas.protocol import ConfigError

Progress = Callable[[int, int], None]

METHODS = ("rtn", "awq", "gptq")
_BITS = {"rtn": (2, 4, 8), "awq": (4,), "gptq": (2, 4, 8)}
_BATCH_WINDOWS = 8  # calibration windows computed together
_VERSIONS = {"rtn": 1, "awq": 1, "gptq": 2}  # of what codes depend on beside the settings: raise it with any change


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the codes depend on, beside the model and the calibration text.

    group_size: -1 for one scale a row. samples, window: calibration windows, evenly spaced, and their tokens.
    damping, order: GPTQ's (see gptq.py).
    """

    method: str = "awq"
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    samples: int = 64
    window: int = 512
    damping: float = 0.01
    order: str = "static"

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.symmetric)

    @property
    def calibrated(self) -> bool:
        return self.method != "rtn"

    def check(self) -> None:
        """ConfigError naming the setting that cannot be."""
        if self.method not in METHODS:
            raise ConfigError(f"method {self.method!r} is not known; use {', '.join(METHODS)}", param="method")
        if self.bits not in _BITS[self.method]:
            held = ", ".join(map(str, _BITS[self.method]))
            raise ConfigError(f"method {self.method!r} makes {held} bits, not {self.bits}", param="bits")
        if self.group_size != -1 and self.group_size < 8:
            raise ConfigError(f"group_size must be -1 or at least 8, got {self.group_size}", param="group_size")
        if self.order not in gptq.ORDERS:
            raise ConfigError(f"act_order {self.order!r} is not known; use {', '.join(gptq.ORDERS)}", param="act_order")
        if not 0 < self.damping < 1:
            raise ConfigError(f"damping must be between 0 and 1, got {self.damping}", param="damping")
        if min(self.samples, self.window) < 2:
            raise ConfigError("calibration needs at least 2 windows of 2 tokens", param="calibration")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Bytes of the quantised layers' tensors, of the same weights in 16 bits, and of the whole weights file."""

    layer_bytes: int
    layer_bytes_16_bit: int
    file_bytes: int
    resumed_layers: int

    @property
    def times_smaller(self) -> float:
        return self.layer_bytes_16_bit / self.layer_bytes


def calibration_windows(token_ids: Sequence[int], samples: int, window: int) -> list[Tensor]:
    """Batches int64 [B, window] of evenly spaced windows; fewer samples where the text is short."""
    if len(token_ids) < window:
        raise ConfigError(f"the calibration text has {len(token_ids)} tokens, fewer than a window of {window}")
    count = min(samples, len(token_ids) // window)
    last = len(token_ids) - window
    starts = [last * i // max(count - 1, 1) for i in range(count)]
    tokens = torch.tensor([token_ids[start : start + window] for start in starts])
    return list(torch.split(tokens, _BATCH_WINDOWS))


@torch.inference_mode()
def quantize(
    source: str | Path,
    out: Path,
    settings: Settings,
    *,
    layout: str | None = None,
    calibration: Sequence[int] | None = None,
    progress: Progress = lambda done, total: None,
) -> Result:
    """Quantise every linear layer of the model `source` and write the folder `out`; embedding and head stay in 16 bits.

    `layout`: a name of LAYOUTS, None for the method's usual one. `calibration`: the token ids of a text, for methods
    that want one. `progress(done, layers)` is called once for what was found done and after each layer. ConfigError,
    before any work, for what cannot be.
    """
    settings.check()
    layout = layout or usual_layout(settings.method, settings.bits)
    check_layout(layout, settings.grid, settings.order if settings.method == "gptq" else "none")
    if settings.calibrated and calibration is None:
        raise ConfigError(f"method {settings.method!r} needs a calibration text", param="calibration")
    check_out(out)
    checkpoint = open_checkpoint(source)
    if checkpoint.quantization not in (None, "gguf"):
        raise ConfigError(
            f"{str(source)!r} is quantised already ({checkpoint.quantization}): take the model it came from"
        )
    shapes = expected_tensors(checkpoint.config)
    for index in range(checkpoint.config.num_layers):
        for name in LINEARS:
            full = f"model.layers.{index}.{name}.weight"
            check_shape(full, shapes[full], settings.grid)
    config = hf_config(checkpoint)
    batches: list[Tensor] = []
    if settings.calibrated and calibration is not None:
        batches = calibration_windows(calibration, settings.samples, settings.window)
    digest = hashlib.blake2b(b"".join(batch.numpy().tobytes() for batch in batches), digest_size=16).hexdigest()
    known = {
        "version": _VERSIONS[settings.method],
        "model": checkpoint.revision,
        "calibration": digest,
        **asdict(settings),
    }
    parts = Parts(out, known)
    resumed = _run(checkpoint, settings, batches, parts, progress)
    return _write(checkpoint, settings, layout, config, parts, out, resumed)


def _run(checkpoint: Checkpoint, settings: Settings, batches: list[Tensor], parts: Parts, progress: Progress) -> int:
    """Make every layer's file that is not there; how many were."""
    layers = checkpoint.config.num_layers
    names = list(expected_tensors(checkpoint.config))
    table = rope_table(checkpoint.config, settings.window)
    found = next((i for i in range(layers) if not parts.path(i).exists()), layers)
    progress(found, layers)
    if found == layers:
        return found
    embedding = checkpoint.tensor("model.embed_tokens.weight") if batches else None
    states = [] if embedding is None else [embedding[batch].float() for batch in batches]
    exact = list(states) if settings.method == "gptq" else []  # what the layers get where nothing is rounded
    for index in range(layers):
        block = Block.read(checkpoint, index, table, names)
        unrounded = block.copy()
        if index < found:
            parts.restore(index, block)
        elif settings.method == "gptq":
            parts.save(index, *_gptq(block, unrounded, states, exact, settings))
            progress(index + 1, layers)
            continue
        else:
            parts.save(index, *_one_by_one(block, states, settings))
            progress(index + 1, layers)
        if index + 1 < layers:
            block.run(states)
            unrounded.run(exact)
    return found


def _gptq(
    block: Block, unrounded: Block, states: list[Tensor], exact: list[Tensor], settings: Settings
) -> tuple[dict[str, Codes], dict[str, Tensor]]:
    """Codes of every linear layer, each made for what the rounded ones before it put out; the block then holds what
    they stand for. Brings `states` and `exact` to the layer's outputs."""
    codes: dict[str, Codes] = {}
    for (stage, inputs), (_, wanted) in zip(block.stages(states), unrounded.stages(exact), strict=True):
        moment = second_moment(inputs)
        weight = gptq.follow(_stacked(block, stage), moment, second_moment(wanted, inputs), damping=settings.damping)
        made = gptq.quantise(weight, settings.grid, moment, damping=settings.damping, order=settings.order)
        codes |= _by_name(block, stage, made)
    return codes, {}


def _one_by_one(block: Block, states: list[Tensor], settings: Settings) -> tuple[dict[str, Codes], dict[str, Tensor]]:
    """Codes of every linear layer, and other tensors that were changed. The block then holds what they stand for."""
    before = dict(block.tensors)
    codes: dict[str, Codes] = {}
    if settings.method == "awq":
        codes = _awq(block, list(states), settings.grid)
    else:
        for stage in STAGES:
            codes |= _by_name(block, stage, rtn.quantise(_stacked(block, stage), settings.grid))
    weights = {f"{name}.weight" for name in codes}
    changed = {
        name: tensor for name, tensor in block.tensors.items() if name not in weights and tensor is not before[name]
    }
    return codes, changed


def _awq(block: Block, states: list[Tensor], grid: Grid) -> dict[str, Codes]:
    moments, scales = {}, {}
    config = block.config
    sharing = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    for stage, inputs in block.stages(states):
        moments[stage] = second_moment(inputs)
        share = sharing if stage == STAGES[1] else ()
        scales[stage] = awq.search_scales(_stacked(block, stage), grid, moments[stage], mean_magnitude(inputs), share)
    _fold(block, scales)
    codes: dict[str, Codes] = {}
    for stage in STAGES:
        moment = moments[stage] / scales[stage].outer(scales[stage])
        codes |= _by_name(block, stage, awq.quantise(_stacked(block, stage), grid, moment))
    return codes


def _fold(block: Block, scales: dict[tuple[str, ...], Tensor]) -> None:
    """Multiply every stage's weights by its scales, and divide what makes its inputs."""
    tensors, config = block.tensors, block.config
    for stage, scale in scales.items():
        for name in stage:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * scale
    heads = scales[STAGES[1]].view(config.num_kv_heads, -1, config.head_dim)[:, 0].flatten()
    for name, divisor in (
        ("input_layernorm", scales[STAGES[0]]),
        ("self_attn.v_proj", heads),
        ("post_attention_layernorm", scales[STAGES[2]]),
        ("mlp.up_proj", scales[STAGES[3]]),
    ):
        for suffix in ("weight", "bias"):
            if (held := tensors.get(f"{name}.{suffix}")) is not None:
                tensors[f"{name}.{suffix}"] = held / (divisor.unsqueeze(1) if held.dim() == 2 else divisor)


def _stacked(block: Block, stage: tuple[str, ...]) -> Tensor:
    return torch.cat([block.tensors[f"{name}.weight"] for name in stage])


def _by_name(block: Block, stage: tuple[str, ...], codes: Codes) -> dict[str, Codes]:
    """Take a stage's codes apart and put what they stand for into the block."""
    rows = [len(block.tensors[f"{name}.weight"]) for name in stage]
    found = dict(zip(stage, codes.split(rows), strict=True))
    for name, part in found.items():
        block.tensors[f"{name}.weight"] = part.dequantise()
    return found


def _write(
    checkpoint: Checkpoint,
    settings: Settings,
    layout: str,
    config: dict[str, object],
    parts: Parts,
    out: Path,
    resumed: int,
) -> Result:
    form, grid = LAYOUTS[layout], settings.grid
    tensors: dict[str, Tensor] = {}
    layer_bytes = plain_bytes = 0
    for name in expected_tensors(checkpoint.config):
        if not name.startswith("model.layers."):
            tensors[name] = _half(name, checkpoint.tensor(name))
    for index in range(checkpoint.config.num_layers):
        codes, changed = parts.load(index)
        prefix = f"model.layers.{index}."
        for name in expected_tensors(checkpoint.config):
            own = name.removeprefix(prefix)
            if name.startswith(prefix) and own.removesuffix(".weight") not in codes:
                tensors[name] = _half(name, changed[own] if own in changed else checkpoint.tensor(name))
        for name, part in codes.items():
            for suffix, tensor in form.tensors(part, grid).items():
                tensors[f"{prefix}{name}.{suffix}"] = tensor.contiguous()
                layer_bytes += tensor.nbytes
            plain_bytes += part.codes.numel() * 2
    quantization = form.config(grid, settings.order if settings.method == "gptq" else "none")
    config = {**config, "dtype": "float16", "torch_dtype": "float16", "quantization_config": quantization}
    size = write_folder(out, checkpoint, config, tensors)
    shutil.rmtree(parts.folder)
    return Result(layer_bytes=layer_bytes, layer_bytes_16_bit=plain_bytes, file_bytes=size, resumed_layers=resumed)


def _half(name: str, tensor: Tensor) -> Tensor:
    held = tensor.half()
    if not bool(held.isfinite().all()):
        raise ConfigError(f"tensor {name!r} holds values that float16 cannot")
    return held.contiguous()
