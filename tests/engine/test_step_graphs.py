"""An engine whose decodes go through buckets and replays writes the oracle's tokens, and nothing leaks."""

from __future__ import annotations

import random

import pytest
import torch

from replicas.engine import SamplingParams
from replicas.engine.graphs import CudaGraphs, EagerGraph, choose_graphs
from replicas.engine.reference import Reference
from replicas.engine.spec.config import Speculative
from replicas.protocol import ConfigError, GenerateRequest
from tests.engine.conftest import MakeEngine

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def prompts(count: int, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


@pytest.mark.parametrize("attention", ["native", "torch", "triton"])
def test_replayed_decodes_are_the_oracles_tokens(make_engine: MakeEngine, oracle: Reference, attention: str) -> None:
    few = attention == "triton"
    sampling = SamplingParams(max_tokens=4 if few else 12, temperature=0, ignore_eos=True)
    engine = make_engine(step_graphs="eager", attention=attention, max_num_seqs=6, max_num_batched_tokens=24)
    asked = prompts(2 if few else 9)
    completions = engine.generate(asked, sampling)
    for prompt, completion in zip(asked, completions, strict=True):
        wanted = oracle.generate(prompt, sampling.max_tokens, ignore_eos=True)
        assert completion.outputs[0].token_ids == wanted
    assert engine._graphs is not None
    assert engine._graphs.replays > 0


def test_preemption_forks_and_aborts_between_replays(make_engine: MakeEngine, oracle: Reference) -> None:
    """Few blocks, random arrivals, a request that leaves: whoever shares a bucket changes from step to step."""
    engine = make_engine(step_graphs="eager", num_blocks=24, max_model_len=64, max_num_seqs=5, watermark=0.0)
    rng, asked = random.Random(1), prompts(12, seed=8)
    got: dict[str, list[int]] = {}
    waiting = list(range(len(asked)))
    while waiting or engine.has_work():
        if waiting and (rng.random() < 0.4 or not engine.has_work()):
            at = waiting.pop()
            n = 2 if at % 4 == 0 else 1
            sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, n=n)
            engine.add(GenerateRequest(request_id=str(at), prompt_token_ids=tuple(asked[at]), sampling=sampling))
        for chunk in engine.step():
            assert chunk.error is None
            got.setdefault(f"{chunk.request_id}.{chunk.index}", []).extend(chunk.token_ids)
        if "7.0" in got:
            engine.abort("7")
        engine.check_integrity()
    assert engine.stats().num_preemptions > 0
    got = {name: tokens for name, tokens in got.items() if not name.startswith("7.")}
    assert len(got) == 11 + 3
    for name, tokens in got.items():
        assert tokens == oracle.generate(asked[int(name.split(".")[0])], 12, ignore_eos=True), name


def test_scratch_is_no_block_of_the_pool(make_engine: MakeEngine) -> None:
    engine = make_engine(step_graphs="eager", num_blocks=8, max_model_len=32)
    assert engine.pool.num_blocks == 8
    assert len(engine._kv.data) == 9


def test_who_gets_graphs() -> None:
    assert isinstance(choose_graphs("auto", CUDA, "triton"), CudaGraphs)
    assert choose_graphs("auto", CUDA, "torch") is None, "the torch backend asks the device for lengths"
    assert choose_graphs("auto", CPU, "native") is None
    assert choose_graphs("off", CUDA, "triton") is None
    assert choose_graphs("eager", CPU, "native") is EagerGraph
    with pytest.raises(ConfigError, match="step_graphs 'on' is not supported; use auto, off or eager"):
        choose_graphs("on", CUDA, "triton")


@pytest.mark.parametrize("attention", ["native", "torch"])
def test_drafts_of_any_number_share_a_bucket(make_engine: MakeEngine, oracle: Reference, attention: str) -> None:
    speculative = Speculative(method="ngram", max_draft_tokens=4, min_match=1, adaptive=False)
    engine = make_engine(step_graphs="eager", attention=attention, max_num_seqs=5, speculative=speculative)
    rng = random.Random(2)
    asked = [[rng.randrange(8) for _ in range(rng.randrange(6, 20))] * 2 for _ in range(6)]
    completions = engine.generate(asked, SamplingParams(max_tokens=14, temperature=0, ignore_eos=True))
    for prompt, completion in zip(asked, completions, strict=True):
        assert completion.outputs[0].token_ids == oracle.generate(prompt, 14, ignore_eos=True)
    assert engine._graphs is not None
    assert engine._graphs.replays > 0
    assert engine.speculation.num_draft_tokens > 0
