"""A random model of two layers on disk, and a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from replicas.engine.model_config import config_from_hf
from replicas.engine.weights import expected_tensors

EOS = 256


def write_byte_tokenizer(folder: Path, eos: int = EOS) -> None:
    """One token a byte, ids 0..eos-1 in the byte's own order, and <eos>: of 256 bytes, or of the first few."""
    from replicas.engine.tokenizer import _byte_alphabet

    vocab = {byte: i for byte, i in _byte_alphabet().items() if i < eos} | {"<eos>": eos}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))


def write_small_model(folder: Path) -> Path:
    """In full precision; every layer has multiples of 32 inputs and outputs, as 2-bit words want them."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "eos_token_id": EOS,
    }
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * 0.3
        for name, shape in expected_tensors(config_from_hf(config)).items()
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    write_byte_tokenizer(folder)
    return folder
