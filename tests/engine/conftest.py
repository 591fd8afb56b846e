"""A tiny random model with a byte-level tokenizer: every engine path in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from replicas.engine import Engine, EngineConfig
from replicas.engine.reference import Reference
from tests.small_model import EOS, write_byte_tokenizer, write_small_model

MakeEngine = Callable[..., Engine]


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
    return write_small_model(tmp_path_factory.mktemp("small"))


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
