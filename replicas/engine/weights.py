"""A model's tensors by their Hugging Face names, from safetensors or GGUF, checked against its config before use.

Matrices may be stored quantised (replicas/engine/quantized): `matrix` gives them as they are, `tensor` in full.

`open_checkpoint(source)` reads headers only; weights come from mmap'd files when `tensor(name)` asks for them. What a
checkpoint lacks, holds too much of or holds in a wrong shape is a ConfigError naming file and tensor, raised before the
first weight is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from replicas.engine.gguf_file import GGUFFile
from replicas.engine.model_config import ModelConfig, config_from_gguf, config_from_hf
from replicas.engine.quantized.gguf_blocks import KEPT
from replicas.engine.quantized.kv_scales import is_kv_scale, stored_kv_scales
from replicas.engine.quantized.stored import Held, StoredMatrices, weight_format
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.protocol import ConfigError

_FLOATS = ("F32", "F16", "BF16", "F64")


class Checkpoint(Protocol):
    """One model's files, opened and checked.

    folder: where tokenizer files may lie. gguf: the GGUF file if it is one. revision: short hash identifying the
    weights. quantization: what matrices are stored in (a quant_method, or "gguf"), None if all are plain floats.
    kv_scales: float32 [layers, 2, KV heads] for keys and values in e4m3, None if it brings none.
    """

    folder: Path
    config: ModelConfig
    revision: str
    gguf: GGUFFile | None
    quantization: str | None
    kv_scales: Tensor | None

    def tensor(self, name: str) -> Tensor:
        """A tensor of `expected_tensors` on CPU, perhaps a view of a mapped file: as stored where that is a float type
        of safetensors, else float32."""
        ...

    def matrix(self, module: str) -> Tensor | QuantizedWeight:
        """The weight [N, K] of a linear layer or of an embedding, quantised if it is stored so."""
        ...


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a folder with config.json and *.safetensors, a *.gguf file, or a folder with exactly one *.gguf file."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if not path.is_dir():
        raise ConfigError(f"model {str(source)!r} is neither a folder nor a .gguf file")
    if (path / "config.json").is_file():
        return SafetensorsCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return GGUFCheckpoint(files[0])
    held = f"{len(files)} .gguf files: name one of them" if files else "neither config.json nor a .gguf file"
    raise ConfigError(f"model folder {str(source)!r} holds {held}")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the decoder reads, with its shape. A tied head is not listed."""
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    layer: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (hidden,))
    projections = (
        ("self_attn.q_proj", config.q_size, hidden, config.qkv_bias),
        ("self_attn.k_proj", config.kv_size, hidden, config.qkv_bias),
        ("self_attn.v_proj", config.kv_size, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, config.q_size, config.o_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    )
    for name, rows, columns, bias in projections:
        layer[f"{name}.weight"] = (rows, columns)
        if bias:
            layer[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        layer |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    table = (config.vocab_size, hidden)
    shapes = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def linear_matrices(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """The weights [N, K] of the decoder's linear layers by module, with a head that is not tied."""
    shapes = expected_tensors(config)
    del shapes["model.embed_tokens.weight"]
    return {name.removesuffix(".weight"): (shape[0], shape[1]) for name, shape in shapes.items() if len(shape) == 2}


class SafetensorsCheckpoint:
    """A Hugging Face folder: config.json, generation_config.json, model.safetensors or shards with an index."""

    gguf: GGUFFile | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        generation, raw = folder / "generation_config.json", read_json(folder / "config.json")
        self.config = config_from_hf(raw, read_json(generation) if generation.is_file() else None)
        form = weight_format(folder, raw, read_json)
        files = _shards(folder)
        self._files = {file.name: _open_safetensors(file) for file in files}
        self._held = {
            name: _describe(file, opened, name) for file, opened in self._files.items() for name in opened.keys()
        }
        all_files = " + ".join(self._files)
        self.quantization = None if form is None else form.name
        self._quantized = (
            None if form is None else StoredMatrices(form, linear_matrices(self.config), self._held, all_files)
        )
        self._check(all_files)
        self.kv_scales = stored_kv_scales(self.config, self._held, all_files, self._raw)
        self.revision = fingerprint([folder / "config.json", *files])

    def tensor(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if self._quantized is not None and module in self._quantized and name.endswith(".weight"):
            return self._quantized.read(module, self._raw).dequantise()
        return self._raw(name)

    def matrix(self, module: str) -> Tensor | QuantizedWeight:
        if self._quantized is not None and module in self._quantized:
            return self._quantized.read(module, self._raw)
        return self._raw(f"{module}.weight")

    def _raw(self, name: str) -> Tensor:
        found: Tensor = self._files[self._held[name].file].get_tensor(name)
        return found

    def _check(self, all_files: str) -> None:
        expected, shapes = expected_tensors(self.config), {name: held.shape for name, held in self._held.items()}
        for module in self._quantized or ():
            del expected[f"{module}.weight"]
        _check_shapes(
            self.config,
            expected,
            {name: shape for name, shape in shapes.items() if not self._is_known(name)},
            lambda name: self._held[name].file if name in self._held else all_files,
        )
        for name in expected:
            if self._held[name].kind not in _FLOATS:
                raise ConfigError(
                    f"{self._held[name].file}: tensor {name!r} has the unsupported type {self._held[name].kind}"
                )

    def _is_known(self, name: str) -> bool:
        """Whether the format of quantised matrices, or of 8-bit keys and values, accounts for this tensor.

        AutoGPTQ writes a bias with every layer it packs, zeros where the model has none.
        """
        if is_kv_scale(name, self.config.num_layers):
            return True
        if self._quantized is None:
            return False
        module = name.removesuffix(".bias")
        silent = module != name and module in self._quantized and name not in expected_tensors(self.config)
        return self._quantized.owns(name) or (silent and not bool(self._raw(name).any()))


class GGUFCheckpoint:
    """One GGUF file, its tensors under Hugging Face names and in Hugging Face row order."""

    kv_scales: Tensor | None = None

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.gguf: GGUFFile | None = GGUFFile(path)
        self._file = file = self.gguf
        if file.metadata.get("split.count", 1) not in (0, 1):
            raise ConfigError(f"{path.name} is one part of a split GGUF, which is not supported; merge the parts first")
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        freqs = tuple(file.read("rope_freqs.weight").tolist()) if "rope_freqs.weight" in shapes else ()
        self.config = config_from_gguf(file.metadata, shapes, freqs)
        self._gguf_names = _hf_names(self.config.num_layers)
        back = {gguf: name for name, gguf in self._gguf_names.items()}
        renamed = {back.get(name, name): shape for name, shape in shapes.items() if name != "rope_freqs.weight"}
        _check_shapes(self.config, expected_tensors(self.config), renamed, lambda _: path.name)
        self._permuted = file.metadata["general.architecture"] == "llama"
        kinds = {tensor.kind_name for tensor in file.tensors.values()}
        self.quantization = "gguf" if kinds & set(KEPT) else None
        self.revision = fingerprint([path])

    def tensor(self, name: str) -> Tensor:
        raw = self._file.read(self._gguf_names[name])
        heads = self._interleaved_heads(name)
        return _unpermute(raw, heads) if heads else raw

    def matrix(self, module: str) -> Tensor | QuantizedWeight:
        name = f"{module}.weight"
        stored = self._file.tensors[self._gguf_names[name]]
        if stored.kind_name not in KEPT:
            return self.tensor(name)
        weight = KEPT[stored.kind_name](self._file.raw(stored), stored.shape[0])
        for numbers in (weight.scales, weight.mins):
            if numbers is not None and not bool(numbers.isfinite().all()):
                raise ConfigError(f"{self._file.path.name}: tensor {stored.name!r} holds scales that are not finite")
        heads = self._interleaved_heads(name)
        return weight.rows(_unpermute(torch.arange(stored.shape[0]), heads)) if heads else weight

    def _interleaved_heads(self, name: str) -> int:
        """Heads whose rows llama.cpp's converter interleaved; 0 if this tensor's rows lie as Hugging Face has them."""
        if not self._permuted:
            return 0
        return {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}.get(name.split(".")[-2], 0)


def _unpermute(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's converter stores each head's rows interleaved (0, D/2, 1, D/2 + 1, …) for its own rotary layout."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


_GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _hf_names(num_layers: int) -> dict[str, str]:
    """Hugging Face tensor name -> GGUF tensor name."""
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for layer in range(num_layers):
        for hf, gguf in _GGUF_LAYER_NAMES.items():
            for suffix in ("weight", "bias"):
                names[f"model.layers.{layer}.{hf}.{suffix}"] = f"blk.{layer}.{gguf}.{suffix}"
    return names


def _check_shapes(
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    file_of: Callable[[str], str],
) -> None:
    for name, shape in expected.items():
        if name not in shapes:
            raise ConfigError(f"{file_of(name)}: tensor {name!r} is missing")
        if tuple(shapes[name]) != shape:
            raise ConfigError(f"{file_of(name)}: tensor {name!r} has shape {tuple(shapes[name])}, expected {shape}")
    for name in shapes:
        if name not in expected and not _harmless(name, config):
            raise ConfigError(f"{file_of(name)}: tensor {name!r} is unexpected for {config.architecture}")


def _harmless(name: str, config: ModelConfig) -> bool:
    """Tensors that transformers ignores too: a stored copy of a tied head, and rotary tables of old checkpoints."""
    return (config.tie_word_embeddings and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq")


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map", {})
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) > 1 and folder / "model.safetensors" in files:
            files = [folder / "model.safetensors"]
    if not files:
        raise ConfigError(f"model folder {folder.name!r} holds no *.safetensors (pickled weights are not read)")
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file.name} is missing though {index.name} names it")
    return files


def _open_safetensors(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file.name} is truncated or corrupt: {error}") from error


def _describe(file: str, opened: Any, name: str) -> Held:
    view = opened.get_slice(name)
    return Held(file, tuple(view.get_shape()), view.get_dtype())


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; ConfigError naming the file if there is none."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file.name} must hold a JSON object")
    return value


def fingerprint(files: list[Path], samples: int = 64, sample_bytes: int = 4096) -> str:
    """16 hex digits over each file's size, its head and `samples` pieces spread evenly over it.

    A fine-tune shares header, size and often the embeddings at the front with its base, so the pieces must reach into
    every part of the file; reading all of it would cost seconds at start.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(65536))
            for index in range(1, samples + 1):
                file.seek(max(0, size * index // samples - sample_bytes), os.SEEK_SET)
                digest.update(file.read(sample_bytes))
    return digest.hexdigest()
