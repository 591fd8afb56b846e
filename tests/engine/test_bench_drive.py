"""Benchmarks' drivers ask what they were told to, when it is due, and count what they say they count."""

from __future__ import annotations

import pytest

from replicas.engine.bench_drive import Ask, Talk, Timings, arriving, continuous, single, static
from replicas.engine.engine import Engine
from replicas.protocol import Chunk
from tests.engine.conftest import MakeEngine

PROMPTS = [(1, 2, 3), (4, 5), (6, 7, 8, 9)]


def talks(wanted: tuple[int, ...] = (5, 2, 7)) -> list[Talk]:
    return [single(Ask(prompt, number)) for prompt, number in zip(PROMPTS, wanted, strict=True)]


def test_all_ways_bring_the_wanted_tokens_and_the_same(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    runs = [
        continuous(engine, talks(), 2),
        static(engine, talks(), 2, padded=True),
        static(engine, talks(), 2, padded=False),
        arriving(engine, [(0.0, f"{n}.0", next(talk)) for n, talk in enumerate(talks())]),
    ]
    assert [len(runs[0].tokens[f"{number}.0"]) for number in range(3)] == [5, 2, 7]
    assert all(one.tokens == runs[0].tokens for one in runs)
    assert all(one.output_tokens == 14 for one in runs)


def test_padding_computes_on_for_the_longest_of_a_batch_and_counts_nothing_of_it(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    before = engine.stats().generation_tokens
    static(engine, talks(), 2, padded=True)
    assert engine.stats().generation_tokens - before == 5 + 5 + 7


def test_a_talk_is_sent_its_answer_and_asks_on(make_engine: MakeEngine) -> None:
    heard: list[list[int]] = []

    def talk() -> Talk:
        first = yield Ask((1, 2, 3), 4)
        second = yield Ask((1, 2, 3, *first, 9), 2)
        heard.extend((first, second))

    engine = make_engine()
    for way in (lambda: continuous(engine, [talk()], 1), lambda: static(engine, [talk()], 1)):
        heard.clear()
        timings = way()
        assert timings.tokens == {"0.0": heard[0], "0.1": heard[1]}
        assert [len(one) for one in heard] == [4, 2]
        assert timings.due["0.1"] >= timings.events["0.0"][-1][0]


def test_no_more_talks_are_held_than_there_are_slots(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, most = make_engine(), 0
    step = Engine.step

    def watched(self: Engine) -> list[Chunk]:
        nonlocal most
        most = max(most, engine.stats().num_requests_running + engine.stats().num_requests_waiting)
        return step(self)

    monkeypatch.setattr(Engine, "step", watched)
    continuous(engine, talks(), 2)
    assert most == 2


def test_a_backlog_is_due_at_the_start_and_a_caller_when_its_slot_is_free(make_engine: MakeEngine) -> None:
    engine = make_engine()
    backlog, callers = (continuous(engine, talks(), 1, backlog=one) for one in (True, False))
    assert set(backlog.due.values()) == {backlog.started}
    assert sorted(callers.due.values()) == [callers.due[f"{n}.0"] for n in range(3)]
    assert callers.due["1.0"] >= callers.events["0.0"][-1][0]


def test_figures_are_arithmetic_on_the_events() -> None:
    timings = Timings()
    timings.started, timings.ended = 100.0, 104.0
    timings.due = {"a": 100.0, "b": 101.0}
    timings.events = {"a": [(101.0, 1), (103.0, 4)], "b": [(104.0, 1)]}
    timings.tokens = {"a": [1, 2, 3, 4, 5], "b": [6]}
    found = timings.figures()
    assert found["tokens_per_s"] == 6 / 4
    assert (found["ttft_p50_s"], found["e2e_p50_s"]) == (2.0, 3.0)  # of 1 and 3, of 3 and 3
    assert (found["itl_p50_s"], found["itl_max_s"]) == (0.5, 0.5)  # four tokens after two seconds
    assert timings.figures(ttft_of=lambda name: name == "b")["ttft_p95_s"] == 3.0
    assert "itl_p50_s" not in timings.figures(itl_of=lambda name: name == "b")
