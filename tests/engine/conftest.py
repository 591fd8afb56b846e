"""A tiny random model with a byte-level tokenizer: every engine path in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from replicas.engine import Engine, EngineConfig
from replicas.engine.reference import Reference

EOS = 256
MakeEngine = Callable[..., Engine]


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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.3,  # wide enough that greedy output varies and top-2 gaps are far from rounding
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, in full precision; every layer has multiples of 32 inputs and outputs, as 2-bit words want them."""
    folder = tmp_path_factory.mktemp("small")
    from safetensors.torch import save_file

    from replicas.engine.model_config import config_from_hf
    from replicas.engine.weights import expected_tensors

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


@pytest.fixture(scope="session")
def oracle(tiny_model: Path) -> Reference:
    return Reference.load(tiny_model)


@pytest.fixture
def make_engine(tiny_model: Path) -> Iterator[MakeEngine]:
    """Engines on the tiny model; at teardown none may have a block, a row or a request left."""
    made: list[Engine] = []

    def make(**settings: Any) -> Engine:
        engine = Engine(EngineConfig(model=str(tiny_model), **{"block_size": 4, "num_blocks": 128, **settings}))
        made.append(engine)
        return engine

    yield make
    for engine in made:
        assert not engine.has_work(), "a request was left running"
        engine.check_integrity()
        assert engine.pool.num_free == engine.pool.num_blocks, "a block leaked"
