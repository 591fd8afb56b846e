"""An engine as it runs on a GPU, of nothing but Triton kernels, interpreted: the oracle's tokens come out."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from replicas.engine import Engine, SamplingParams, engine, forward, loading
from replicas.engine.ops import TorchOps
from replicas.engine.reference import Reference
from replicas.engine.spec import build
from replicas.engine.spec.config import Speculative
from replicas.engine.stack import LayerByLayer
from replicas.engine.triton import steps
from replicas.engine.triton.crossover import BUCKETS
from replicas.engine.triton.ops import TritonOps
from replicas.engine.triton.sampling import GumbelDraw
from replicas.engine.triton.stack import TritonStack
from tests.engine.conftest import MakeEngine
from tests.engine.drafts import settings_of

CPU = torch.device("cpu")
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


class TakesTurns:
    """In place of measured times: every number of rows gets another of the kernels that take it."""

    def choose(
        self, key: str, candidates: Callable[[int], Sequence[str]], run: Callable[[str, int], Any]
    ) -> dict[int, str]:
        return {rows: candidates(rows)[place % len(candidates(rows))] for place, rows in enumerate(BUCKETS)}


@pytest.fixture
def make_gpu_like(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> MakeEngine:
    """As on a GPU but for the recording of steps, which are padded and run again."""
    monkeypatch.setattr(TritonOps, "_crossover", lambda self: TakesTurns())
    for module in (loading, build):
        monkeypatch.setattr(module, "choose_ops", lambda device, dtype: TritonOps(device, dtype))
    monkeypatch.setattr(engine, "choose_draw", GumbelDraw)
    monkeypatch.setattr(forward, "choose_padding", lambda device: steps.pad_into)

    def make(**settings: Any) -> Engine:
        made = make_engine(
            **{
                "attention": "triton",
                "step_graphs": "eager",
                "max_num_seqs": 3,
                "max_num_batched_tokens": 20,
                **settings,
            }
        )
        assert isinstance(made._decoder.stack, TritonStack)
        return made

    return make


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    chance = random.Random(3)
    return [[chance.randrange(250) for _ in range(length)] for length in lengths]


def outputs(of: Engine, asked: list[list[int]], sampling: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    return [list(completion.outputs[0].token_ids) for completion in of.generate(asked, sampling)]


@pytest.mark.parametrize("ahead", [False, True])
def test_greedy_output_is_the_oracles(make_gpu_like: MakeEngine, oracle: Reference, ahead: bool) -> None:
    asked = prompts((5, 23, 3))
    made = make_gpu_like(async_scheduling=ahead)
    assert outputs(made, asked, GREEDY) == [oracle.generate(prompt, 6, ignore_eos=True) for prompt in asked]
    assert made._graphs is not None
    assert made._graphs.replays > 1


def test_rounded_weights_give_what_torch_gives(
    make_gpu_like: MakeEngine, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts((7, 22))
    found = outputs(make_gpu_like(quantization="int8"), asked, GREEDY)
    monkeypatch.undo()
    monkeypatch.setattr(loading, "choose_ops", lambda device, dtype: TorchOps(device))
    plain = make_engine(quantization="int8", attention="torch")
    assert type(plain._decoder.stack) is LayerByLayer
    assert found == outputs(plain, asked, GREEDY)


def test_drafts_change_nothing(make_gpu_like: MakeEngine, oracle: Reference, tiny_model: Path, tmp_path: Path) -> None:
    speculative = Speculative(**settings_of("states", tmp_path, tiny_model), max_draft_tokens=3, adaptive=False)
    made = make_gpu_like(speculative=speculative)
    asked = prompts((4, 9))
    assert outputs(made, asked, GREEDY) == [oracle.generate(prompt, 6, ignore_eos=True) for prompt in asked]
    assert made.speculation.num_draft_tokens > 0


def test_a_seed_draws_the_same_whatever_shares_its_batch(make_gpu_like: MakeEngine) -> None:
    asked = prompts((6, 14, 5))
    limits = [{}, {"top_k": 5}, {"top_p": 0.8, "min_p": 0.02}]
    sampling = [
        replace(GREEDY, temperature=0.9, seed=7 + i, **more)  # type: ignore[arg-type]
        for i, more in enumerate(limits)
    ]
    together = outputs(make_gpu_like(), asked, sampling)
    alone = make_gpu_like()
    assert together == [outputs(alone, [prompt], params)[0] for prompt, params in zip(asked, sampling, strict=True)]
    assert together != outputs(alone, asked, GREEDY)
