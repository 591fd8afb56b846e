"""A draft's steps replayed for padded numbers of sequences guess what they guess one by one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from replicas.engine import Engine, SamplingParams
from replicas.engine.graphs import EagerGraph
from replicas.engine.spec import build
from replicas.engine.spec.chain import StepByStep
from replicas.engine.spec.config import Speculative
from replicas.engine.spec.draft_model import DraftModel
from replicas.engine.spec.further import Further, Places
from replicas.engine.spec.state_draft import StateDraft
from tests.engine.conftest import MakeEngine
from tests.engine.drafts import settings_of


def further_of(engine: Engine) -> Further:
    [source] = engine.speculation._sources
    assert isinstance(source.proposer, DraftModel | StateDraft)
    holder = source.proposer if isinstance(source.proposer, DraftModel) else source.proposer._chain
    assert isinstance(holder, DraftModel | StepByStep)
    assert holder._further is not None
    return holder._further


@pytest.mark.parametrize("name", ["layers", "noised copy", "states"])
def test_recorded_guesses_are_those_of_single_steps(
    name: str, make_engine: MakeEngine, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "choose_chain", StepByStep)
    speculative = Speculative(**settings_of(name, tmp_path, tiny_model), max_draft_tokens=5, adaptive=False)
    chance = random.Random(4)
    asked = [[chance.randrange(60) for _ in range(chance.randrange(4, 30))] for _ in range(9)]
    sampling = [SamplingParams(max_tokens=chance.randrange(6, 24), temperature=0, ignore_eos=True) for _ in asked]
    told = []
    for graphs in ("off", "eager"):
        engine = make_engine(step_graphs=graphs, max_num_seqs=7, speculative=speculative)
        completions = engine.generate(asked, sampling)
        told.append(([c.outputs[0].token_ids for c in completions], engine.speculation.accepted_per_position))
    assert told[0] == told[1]
    assert sum(told[0][1]) > 0, "no guess was ever right: wrong ones would not show"
    assert further_of(engine).replays > 20


def test_padding_touches_nothing_but_the_scratch_block() -> None:
    seen: list[torch.Tensor] = []

    def guess(batch: object, states: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        places = batch
        seen.append(places.slot_mapping)  # type: ignore[attr-defined]
        tokens = places.token_ids + 1  # type: ignore[attr-defined]
        return tokens, torch.ones(len(tokens)), torch.empty(0)

    further = Further(guess, EagerGraph, max_seqs=8, max_blocks=3, block_size=4, scratch=9)
    tables = torch.tensor([[0, 1, 2], [5, 6, 7], [3, 4, 8]], dtype=torch.int32)
    for _ in range(3):
        seen.clear()
        found, _ = further(torch.tensor([10, 20, 30]), None, tables, torch.tensor([3, 0, 6], dtype=torch.int32), 4)
        assert [tokens.tolist() for tokens in found] == [[11 + i, 21 + i, 31 + i] for i in range(4)]
        steps = seen[-4:]
        assert [step[:3].tolist() for step in steps] == [[3, 20, 18], [4, 21, 19], [5, 22, 32], [6, 23, 33]]
        assert all(36 <= slot < 40 for step in steps for slot in step[3:].tolist())
    assert further.replays == 8


class Full:
    def record(self, work: object) -> None:
        raise torch.OutOfMemoryError("no memory for a graph")

    def replay(self) -> None:
        raise AssertionError("replayed what was never recorded")


def test_guesses_go_on_where_nothing_can_be_recorded() -> None:
    def guess(batch: object, states: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = batch.token_ids + 1  # type: ignore[attr-defined]
        return tokens, torch.ones(len(tokens)), torch.empty(0)

    made: list[Full] = []
    further = Further(guess, lambda: made.append(Full()) or made[-1], max_seqs=4, max_blocks=1, block_size=8, scratch=3)
    tables, lens = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    for _ in range(4):
        found, _ = further(torch.tensor([1, 5]), None, tables, lens, 2)
        assert [tokens.tolist() for tokens in found] == [[2, 6], [3, 7]]
    assert len(made) == 1, "what could not be recorded once is tried again"
    assert not further.replays
    assert not lens.any(), "what was given is not what is counted on"


def test_a_step_lies_where_its_tokens_do() -> None:
    tables = torch.tensor([[7, 2], [1, 0]], dtype=torch.int32)
    places = Places(torch.tensor([5, 6]), torch.tensor([3, 4], dtype=torch.int32), tables, None, torch.zeros(2))
    batch = places.batch(4)
    assert batch.positions.tolist() == [3, 4]
    assert batch.slot_mapping.tolist() == [31, 0]
    assert batch.context_lens.tolist() == [4, 5]
    assert batch.query_start.tolist() == [0, 1, 2]
