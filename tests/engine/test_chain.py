"""A draft's guesses in one native call, against the same arithmetic step by step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.engine.native.chain import NativeChain
from replicas.engine.sequence import Sequence
from replicas.engine.spec import build
from replicas.engine.spec.chain import StepByStep
from replicas.engine.spec.config import Speculative
from replicas.engine.spec.draft_layers import STATES
from replicas.engine.spec.state_draft import StateDraft
from tests.engine.drafts import write_layers_draft
from tests.engine.native_builds import needs_compiler
from tests.small_model import EOS, write_byte_tokenizer

HIDDEN, VOCABULARY = 48, 257


def write_model(folder: Path, *, tied: bool) -> Path:
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_byte_tokenizer(folder)
    return folder


def proposer(config: EngineConfig, engine: Engine) -> StateDraft:
    [source] = build.build_speculation(config, engine.loaded, engine.max_model_len)._sources
    assert isinstance(source.proposer, StateDraft)
    return source.proposer


@needs_compiler
@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_one_call_guesses_what_step_by_step_guesses(
    tied: bool, quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", tied=tied)
    draft = write_layers_draft(tmp_path / "draft", model, (0, 1), fed_with=STATES)
    engine = Engine(EngineConfig(model=str(model), num_blocks=64, block_size=4, quantization=quantization))
    config = EngineConfig(
        model=str(model),
        block_size=4,
        max_num_seqs=5,
        speculative=Speculative(
            method="draft_model", model=str(draft), draft_kv_tokens=160, max_draft_tokens=6, any_revision=True
        ),
    )
    native = proposer(config, engine)
    monkeypatch.setattr(build, "choose_chain", StepByStep)
    plain = proposer(config, engine)
    assert isinstance(native._chain, NativeChain)
    assert isinstance(plain._chain, StepByStep)
    chance, generator = random.Random(7), torch.Generator().manual_seed(8)
    sequences = [Sequence(str(i), 0, [1, 2, 3], 3, SamplingParams(max_tokens=200), 0, b"") for i in range(5)]
    told, right = 0, 0
    for _ in range(60):
        for seq in sequences:
            new = chance.randrange(4)
            if new:
                seq.tokens += [chance.randrange(VOCABULARY) for _ in range(new)]
                states = torch.randn((new, HIDDEN), generator=generator)
                for side in (native, plain):
                    side.observe(seq, states)
        asked, depth = chance.sample(sequences, chance.randint(1, 5)), chance.randint(1, 6)
        answers = [side.propose(asked, depth) for side in (native, plain)]
        for ours, theirs in zip(*answers, strict=True):
            assert list(ours.tokens) == list(theirs.tokens)
            assert max((abs(a - b) for a, b in zip(ours.levels, theirs.levels, strict=True)), default=0) <= 1
            told += len(ours.tokens)
            right += len(set(ours.tokens))
        for side in (native, plain):
            side.check_integrity(sequences)
        if chance.random() < 0.1:
            gone = sequences[chance.randrange(5)]
            for side in (native, plain):
                side.forget(gone)
    assert told > 300
    assert right > 100, "guesses are all alike: anything would agree"
