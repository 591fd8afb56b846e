"""An engine that runs ahead of what it computes writes the same tokens as one that waits, and nothing leaks."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.engine.flight import choose_async
from replicas.engine.reference import Reference
from replicas.protocol import Chunk, ConfigError, EngineFault, FinishReason, GenerateRequest
from tests.engine.conftest import MakeEngine

Tokens = dict[str, list[int]]


def prompts(count: int, seed: int = 3) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def ask(engine: Engine, name: str, prompt: list[int], **sampling: Any) -> None:
    params = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **sampling})
    engine.add(GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=params))


def finish(engine: Engine) -> list[Chunk]:
    chunks: list[Chunk] = []
    while engine.has_work():
        chunks += engine.step()
        engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks
    return chunks


def by_choice(chunks: list[Chunk]) -> Tokens:
    got: Tokens = {}
    for chunk in chunks:
        assert chunk.error is None
        got.setdefault(f"{chunk.request_id}.{chunk.index}", []).extend(chunk.token_ids)
    return got


@pytest.mark.parametrize("graphs", ["off", "eager"])
def test_random_arrivals_forks_preemption_and_aborts(make_engine: MakeEngine, oracle: Reference, graphs: str) -> None:
    engine = make_engine(
        async_scheduling=True, step_graphs=graphs, num_blocks=24, max_model_len=64, max_num_seqs=5, watermark=0.0
    )
    rng, asked = random.Random(1), prompts(14, seed=8)
    chunks: list[Chunk] = []
    waiting = list(range(len(asked)))
    while waiting or engine.has_work():
        if waiting and (rng.random() < 0.4 or not engine.has_work()):
            at = waiting.pop()
            ask(engine, str(at), asked[at], n=2 if at % 4 == 0 else 1)
        chunks += engine.step()
        if sum(len(chunk.token_ids) for chunk in chunks if chunk.request_id == "7") == 3:
            engine.abort("7")
        engine.check_integrity()
    assert engine.stats().num_preemptions > 0
    assert engine.pool.num_free == engine.pool.num_blocks
    got = {name: tokens for name, tokens in by_choice(chunks).items() if not name.startswith("7.")}
    assert len(got) == 13 + 4
    for name, tokens in got.items():
        assert tokens == oracle.generate(asked[int(name.split(".")[0])], 12, ignore_eos=True), name


def test_the_first_step_is_only_begun_and_then_one_is_always_ahead(make_engine: MakeEngine) -> None:
    engine = make_engine(async_scheduling=True)
    ask(engine, "a", [1, 2, 3], max_tokens=3)
    assert engine.step() == []
    brought = [[chunk.token_ids for chunk in engine.step()] for _ in range(3)]
    assert [len(step) for step in brought] == [1, 1, 1]
    assert not engine.has_work()
    assert engine.stats().steps == 3, "what ends with its third token whatever that is needs no fourth step"


def test_who_ends_by_a_stop_is_computed_once_in_vain_and_nobody_is_told(make_engine: MakeEngine) -> None:
    waiting, ahead = make_engine(), make_engine(async_scheduling=True)
    [whole] = by_choice(_all(waiting, max_tokens=12)).values()
    stop = whole[4]
    for engine in (waiting, ahead):
        ask(engine, "a", [5, 6, 7], stop_token_ids=(stop,))
        ask(engine, "b", [9, 9])
        chunks = finish(engine)
        own = [chunk for chunk in chunks if chunk.request_id == "a"]
        assert [token for chunk in own for token in chunk.token_ids] == whole[: whole.index(stop) + 1]
        assert own[-1].finish_reason is FinishReason.STOP
        assert own[-1].usage is not None
        assert own[-1].usage.completion_tokens == whole.index(stop) + 1


def _all(engine: Engine, **sampling: Any) -> list[Chunk]:
    ask(engine, "a", [5, 6, 7], **sampling)
    return finish(engine)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "seed": 11},
        {"temperature": 0.8, "seed": 5, "top_p": 0.7, "top_k": 40},
        {"temperature": 1.0, "seed": 2, "n": 3, "logprobs": 4},
        {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 0.0, "presence_penalty": 1.5, "logprobs": 2},
        {"temperature": 0.0, "min_tokens": 6, "ignore_eos": False, "logit_bias": ((3, 50.0),), "stop_token_ids": (3,)},
    ],
)
def test_all_that_sampling_knows_is_the_same(make_engine: MakeEngine, sampling: dict[str, Any]) -> None:
    """Each beside two others, of which one has penalties, so that steps that wait and steps that do not take turns."""
    told = []
    for ahead in (False, True):
        engine = make_engine(async_scheduling=ahead)
        ask(engine, "x", [1, 2, 3], **sampling)
        ask(engine, "y", [4, 4], temperature=1.0, seed=9)
        ask(engine, "z", [8], max_tokens=5, presence_penalty=1.0)
        chunks = finish(engine)
        told.append(
            sorted((c.request_id, c.index, place, c.text, c.token_ids, c.logprobs) for place, c in _numbered(chunks))
        )
    assert told[0] == told[1]


def _numbered(chunks: list[Chunk]) -> list[tuple[int, Chunk]]:
    seen: dict[tuple[str, int], int] = {}
    numbered = []
    for chunk in chunks:
        key = chunk.request_id, chunk.index
        seen[key] = seen.get(key, 0) + 1
        numbered.append((seen[key], chunk))
    return numbered


def test_blocks_enter_the_cache_when_their_last_token_is_known(make_engine: MakeEngine, oracle: Reference) -> None:
    """A block that fills up with a token still on the device must not be found by a hash of a guess at it."""
    engine = make_engine(async_scheduling=True)
    [first] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=14, temperature=0, ignore_eos=True))
    continued = [1, 2, 3, *first.outputs[0].token_ids, 7]
    [second] = engine.generate([continued], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    assert second.usage.cached_tokens >= 12
    assert second.outputs[0].token_ids == oracle.generate(continued, 6, ignore_eos=True)


@pytest.mark.parametrize("when", ["launch", "landing"])
def test_a_fault_ends_its_requests_and_the_engine_goes_on(
    make_engine: MakeEngine, oracle: Reference, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    engine = make_engine(async_scheduling=True)
    ask(engine, "a", [1, 2, 3])
    told = engine.step() + engine.step()
    with monkeypatch.context() as broken:
        if when == "launch":
            broken.setattr(engine, "_forward", _breaks)
        else:
            broken.setattr("replicas.engine.sampler.Drawn.read", _breaks)
        told += engine.step()
    assert isinstance(told[-1].error, EngineFault)
    assert [len(chunk.token_ids) for chunk in told[:-1]] == ([1, 1] if when == "launch" else [1])
    engine.check_integrity()
    assert not engine.has_work()
    ask(engine, "b", [4, 5])
    assert by_choice(finish(engine))["b.0"] == oracle.generate([4, 5], 12, ignore_eos=True)


def _breaks(*_: object) -> None:
    raise RuntimeError("the device is gone")


def test_whoever_was_not_in_a_failed_step_is_computed_again(
    make_engine: MakeEngine, oracle: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`b` is admitted into the step behind the one that fails: what it computed may rest on ruins."""
    engine = make_engine(async_scheduling=True)
    ask(engine, "a", [1, 2, 3])
    engine.step()
    ask(engine, "b", [4, 5])
    with monkeypatch.context() as broken:
        broken.setattr("replicas.engine.sampler.Drawn.read", _breaks)
        [ended] = engine.step()
    assert ended.request_id == "a"
    assert by_choice(finish(engine)) == {"b.0": oracle.generate([4, 5], 12, ignore_eos=True)}


def test_where_it_is_chosen(tiny_model: Any) -> None:
    def config(**settings: Any) -> EngineConfig:
        return EngineConfig(model=str(tiny_model), **settings)

    assert choose_async(config(), torch.device("cuda"))
    assert not choose_async(config(), torch.device("cpu"))
    assert not choose_async(config(async_scheduling=False), torch.device("cuda"))
    with pytest.raises(ConfigError, match="async_scheduling and speculative exclude each other"):
        choose_async(config(async_scheduling=True, speculative={"method": "ngram"}), torch.device("cuda"))
