"""A draft's guesses in one native call: against the same arithmetic step by step, and against all of it anew."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.engine.kv_format import allocate_kv, plain_format
from replicas.engine.layout import Layout
from replicas.engine.native.chain import NativeChain
from replicas.engine.sequence import Sequence
from replicas.engine.spec import build
from replicas.engine.spec.chain import StepByStep
from replicas.engine.spec.config import Speculative
from replicas.engine.spec.draft_layers import STATES
from replicas.engine.spec.state_draft import StateDraft
from tests.engine.drafts import write_layers_draft
from tests.engine.native_builds import needs_compiler
from tests.engine.random_models import SHAPE, save_model
from tests.small_model import EOS, write_byte_tokenizer

HIDDEN, VOCABULARY = SHAPE["hidden_size"], EOS + 1
LAYERS = (0, 2)


def proposer(config: EngineConfig, engine: Engine) -> StateDraft:
    [source] = build.build_speculation(config, engine.loaded, engine.max_model_len)._sources
    assert isinstance(source.proposer, StateDraft)
    return source.proposer


def from_scratch(draft: StateDraft, tokens: list[int], states: Tensor, depth: int) -> list[int]:
    """The guesses after `tokens`, computed with none of the draft's bookkeeping, in blocks of another size."""
    decoder, blocks = draft._decoder, -(-(len(tokens) + depth) // 5)
    layout = Layout(1, 5 * blocks, 5, decoder.device)
    caches = allocate_kv(
        blocks,
        5,
        num_layers=len(LAYERS),
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        kv=plain_format(torch.float32),
        device=decoder.device,
    ).layers
    seq = Sequence("x", 0, tokens, 0, SamplingParams(), 0, b"", blocks=list(range(blocks)))
    batch = layout([(seq, len(tokens))], more_places=depth - 1)
    return [row[0] for row in draft._chain(batch, states, caches, depth)[0]]


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "quantization", "block_size"),
    [
        ("llama tied", "none", 4),
        ("llama tied", "int8", 3),
        ("llama", "none", 1),
        ("qwen3", "none", 7),
        ("mistral window", "none", 4),
        ("qwen2 layer types", "none", 16),
    ],
)
def test_one_call_guesses_what_step_by_step_guesses(
    kind: str, quantization: str, block_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    save_model(model, kind, vocab_size=VOCABULARY, eos_token_id=EOS, bos_token_id=None)
    write_byte_tokenizer(model)
    draft = write_layers_draft(tmp_path / "draft", model, LAYERS, fed_with=STATES)
    engine = Engine(EngineConfig(model=str(model), num_blocks=64, block_size=4, quantization=quantization))
    config = EngineConfig(
        model=str(model),
        block_size=block_size,
        max_num_seqs=5,
        speculative=Speculative(
            method="draft_model", model=str(draft), draft_kv_tokens=160, max_draft_tokens=6, any_revision=True
        ),
    )
    native = proposer(config, engine)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(build, "choose_chain", StepByStep)
        plain = proposer(config, engine)
    assert isinstance(native._chain, NativeChain)
    assert isinstance(plain._chain, StepByStep)
    chance, generator = random.Random(7), torch.Generator().manual_seed(8)
    sequences = [Sequence(str(i), 0, [1, 2, 3], 3, SamplingParams(max_tokens=200), 0, b"") for i in range(5)]
    history: dict[Sequence, list[Tensor]] = {seq: [] for seq in sequences}
    told, different = 0, 0
    for _ in range(60):
        for seq in sequences:
            if new := chance.randrange(4):
                seq.tokens += [chance.randrange(VOCABULARY) for _ in range(new)]
                states = torch.randn((new, HIDDEN), generator=generator)
                history[seq].append(states)
                for side in (native, plain):
                    side.observe(seq, states)
        asked, depth = chance.sample(sequences, chance.randint(1, 5)), chance.randint(1, 6)
        answers = [side.propose(asked, depth) for side in (native, plain)]
        for seq, ours, theirs in zip(asked, *answers, strict=True):
            assert list(ours.tokens) == list(theirs.tokens)
            assert max((abs(a - b) for a, b in zip(ours.levels, theirs.levels, strict=True)), default=0) <= 1
            if ours.tokens:
                length = len(native._shadows[seq].tokens)
                states = torch.cat(history[seq])[-length:]
                assert from_scratch(native, seq.tokens[-length:], states, depth) == list(ours.tokens)
            told += len(ours.tokens)
            different += len(set(ours.tokens))
        for side in (native, plain):
            side.check_integrity(sequences)
        if chance.random() < 0.1:
            gone = chance.choice(sequences)
            for side in (native, plain):
                side.forget(gone)
    assert told > 300
    assert different > 100, "guesses are all alike: anything would agree"
