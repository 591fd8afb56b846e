"""Models of well-known shapes with random weights, made on the device that runs them: to measure without a download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from replicas.engine.gguf_file import GGUFFile
from replicas.engine.model_config import ModelConfig, config_from_hf
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.tokenizer import Tokenizer
from replicas.engine.weights import expected_tensors
from replicas.protocol import ConfigError

_LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "eos_token_id": 128001,
    "bos_token_id": 128000,
}
# From the models' own config.json.
SHAPES: Mapping[str, Mapping[str, object]] = {
    "llama-3-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama-3-70b": {
        **_LLAMA_3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
        "bos_token_id": 1,
    },
}
QUANTS = ("int4", "int8")
_STD = 0.02  # as transformers initialises these models: activations stay in range through all layers
_GROUPS = (128, 64, 32)


def shape_config(name: str) -> ModelConfig:
    if name not in SHAPES:
        raise ConfigError(f"shape {name!r} is unknown; use {', '.join(SHAPES)}", param="shape")
    return config_from_hf(dict(SHAPES[name]))


def check(shape: str, quant: str | None) -> None:
    """ConfigError for names that are not known."""
    shape_config(shape)
    _check_quant(quant)


def _check_quant(quant: str | None) -> None:
    if quant is not None and quant not in QUANTS:
        raise ConfigError(f"quant {quant!r} is not supported; use {', '.join(QUANTS)}", param="quant")


class RandomCheckpoint:
    """A `weights.Checkpoint` whose tensors are drawn when asked for; the same seed draws the same ones on one device.

    quant "int4": codes of 4 bits with a zero point and a float16 scale for each group of 128 inputs (64 or 32 where the
    inputs are not divisible), as AWQ has them. "int8": codes of 8 bits with one scale a row. Embedding and head stay in
    full, as in published checkpoints.
    """

    gguf: GGUFFile | None = None
    kv_scales: Tensor | None = None
    folder = Path()

    def __init__(
        self, config: ModelConfig, device: torch.device, dtype: torch.dtype, *, quant: str | None = None, seed: int = 0
    ) -> None:
        _check_quant(quant)
        self.config, self.quantization = config, quant
        self.revision = f"random-{seed}"
        self._device, self._dtype, self._quant = device, dtype, quant
        self._shapes = expected_tensors(config)
        self._seeds = {name: seed + index for index, name in enumerate(self._shapes)}

    def tensor(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=self._device, dtype=self._dtype)
        return torch.randn(shape, generator=self._generator(name), device=self._device, dtype=self._dtype).mul_(_STD)

    def matrix(self, module: str) -> Tensor | QuantizedWeight:
        name = f"{module}.weight"
        if self._quant is None or module in ("lm_head", "model.embed_tokens"):
            return self.tensor(name)
        rows, columns = self._shapes[name]
        bits = 4 if self._quant == "int4" else 8
        group = columns if bits == 8 else next(size for size in _GROUPS if columns % size == 0)
        generator, device = self._generator(name), self._device
        codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, device=device, dtype=torch.uint8)
        # Evenly drawn codes have a standard deviation of 2^bits / sqrt(12) steps.
        spread = torch.rand(rows, columns // group, generator=generator, device=device) * 0.4 + 0.8
        scales = (spread * (_STD * 12**0.5 / 2**bits)).half()
        zeros = torch.randint(7, 9, scales.shape, generator=generator, device=device, dtype=torch.uint8)
        return QuantizedWeight(bits, group, codes, scales, zeros if bits == 4 else None)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(self._seeds[name])


def byte_tokenizer() -> Tokenizer:
    """One token a byte: random weights have no vocabulary of their own."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(json.dumps(json.loads(backend.to_str())), "", {})
