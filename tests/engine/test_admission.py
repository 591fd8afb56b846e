"""Deadlines and bounds in the real engine, with a clock that the test turns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicas.engine import Engine, SamplingParams
from replicas.engine.reference import Reference
from replicas.protocol import Chunk, ConfigError, DeadlineExceeded, EngineStats, QueueFull
from tests.engine.conftest import MakeEngine
from tests.engine.test_engine import GREEDY, assert_greedy_is_the_oracles, drain, outputs, prompts_of, request


class Clock:
    def __init__(self, engine: Engine) -> None:
        self.now = 100.0
        engine.scheduler.clock = lambda: self.now


def late(chunks: list[Chunk]) -> list[str]:
    assert all(isinstance(chunk.error, DeadlineExceeded) for chunk in chunks if chunk.error)
    return [chunk.request_id for chunk in chunks if chunk.error]


@pytest.mark.parametrize("where", ["waiting", "prefilling", "decoding", "with choices"])
def test_past_its_deadline_a_request_leaves_in_the_next_step_with_its_blocks(
    where: str, make_engine: MakeEngine, oracle: Reference
) -> None:
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=1 if where == "waiting" else 4)
    clock = Clock(engine)
    engine.add(request("other", [7] * 5))
    chunks = engine.step()
    params = replace(GREEDY, max_tokens=60, n=3 if where == "with choices" else 1)
    prompt = prompts_of(3, 1)[0][:5] if where != "prefilling" else [9] * 40
    engine.add(replace(request("late", prompt, params), deadline_s=5.0))
    for _ in range(3):
        chunks += engine.step()
    spoke = any(chunk.request_id == "late" and chunk.token_ids for chunk in chunks)
    assert spoke == (where in ("decoding", "with choices"))
    clock.now += 5.0
    ended = engine.step()
    assert late(ended) == ["late"]
    assert not any(chunk.request_id == "late" for chunk in ended if chunk.error is None)
    engine.check_integrity()
    [sequence] = engine.scheduler.running
    assert sequence.request_id == "other"
    chunks += ended + drain(engine)
    assert late(chunks) == ["late"], "it ended more than once"
    assert_greedy_is_the_oracles(oracle, [7] * 5, outputs(chunks)["other", 0])
    assert len(engine.scheduler.deadlines) == 0


def test_an_engine_whose_every_request_is_late_is_idle(make_engine: MakeEngine) -> None:
    engine = make_engine()
    clock = Clock(engine)
    for name in "ab":
        engine.add(replace(request(name, [1]), deadline_s=1.0))
    clock.now += 2.0
    assert sorted(late(engine.step())) == ["a", "b"]
    assert not engine.has_work()


def test_in_time_is_in_time_and_the_id_is_free_again(make_engine: MakeEngine) -> None:
    engine = make_engine()
    clock = Clock(engine)
    engine.add(replace(request("a", [1]), deadline_s=10.0))
    assert late(drain(engine)) == []
    engine.add(replace(request("a", [1], replace(GREEDY, max_tokens=40)), deadline_s=100.0))
    engine.step()
    clock.now += 20.0
    assert late(engine.step()) == [], "that was the first one's deadline"
    assert engine.abort("a")
    assert len(engine.scheduler.deadlines) == 0


def test_what_cannot_make_it_is_dropped_unseen(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8, max_num_seqs=1)
    Clock(engine)
    engine.add(request("first", [1], SamplingParams(max_tokens=20, ignore_eos=True)))
    engine.step()
    engine.scheduler._pace.least_step_s = 1.0
    engine.add(replace(request("hopeless", [2] * 60), deadline_s=3.0))
    engine.add(replace(request("hopeful", [3] * 10), deadline_s=3.0))
    chunks = drain(engine)
    assert late(chunks) == ["hopeless"]
    assert [chunk.request_id for chunk in chunks if chunk.usage] == ["first", "hopeful"]
    before: EngineStats = engine.stats()
    assert before.prefix_cache_queries == 11, "the hopeless prompt was never looked up, nor computed"


def test_a_refused_request_leaves_no_trace(make_engine: MakeEngine) -> None:
    engine = make_engine(max_waiting=10)
    for i in range(8):
        engine.add(replace(request(f"f{i}", [1]), fair_key="flood"))
    with pytest.raises(QueueFull, match="of this key") as full:
        engine.add(replace(request("f8", [1]), fair_key="flood", deadline_s=5.0))
    assert full.value.retry_after_s is not None
    assert full.value.retry_after_s > 0
    with pytest.raises(DeadlineExceeded):
        engine.add(replace(request("x", [1]), deadline_s=0.0))
    engine.add(replace(request("other", [1]), fair_key="other"))
    engine.check_integrity()
    assert len(engine.scheduler.deadlines) == 0
    drain(engine)


def test_a_lower_number_is_served_first(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    for name, priority in (("background", 5), ("normal", 0), ("urgent", -3)):
        engine.add(replace(request(name, [1]), priority=priority))
    assert [c.request_id for c in drain(engine) if c.terminal] == ["urgent", "normal", "background"]


def test_many_keys_change_the_order_but_not_the_output(make_engine: MakeEngine, oracle: Reference) -> None:
    """Making way for other keys and standing back for them, as on a slow device."""
    engine = make_engine(max_num_seqs=3, max_num_batched_tokens=24)
    for count in range(1, 12):
        engine.scheduler._pace.record(0.01 + 0.1 * (count % 3), count % 3 + 1, 0, 9)
    prompts = prompts_of(5, 20)
    keys = ["flood"] * 6 + ["k1", "flood"] * 7
    arrivals = [replace(request(str(i), prompts[i]), fair_key=key) for i, key in enumerate(keys)]
    chunks = drain(engine, arrivals)
    for (request_id, _), tokens in outputs(chunks).items():
        assert len(tokens) == GREEDY.max_tokens
        assert_greedy_is_the_oracles(oracle, prompts[int(request_id)], tokens)
    assert len({c.request_id for c in chunks}) == 20
    assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("name", ["max_waiting_tokens", "max_waiting_per_key", "priority_aging_s", "fair_reserve"])
def test_impossible_settings_are_refused_by_name(name: str, make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=name):
        make_engine(**{name: -1})
