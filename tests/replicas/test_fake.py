from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from replicas.fake import FakeEngine, FakeSettings
from replicas.protocol import (
    Chunk,
    ContextLengthExceeded,
    EngineFault,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    NotSupported,
    QueueFull,
    SignalboxError,
    block_hash,
    prefix_root,
)

Ask = Callable[..., GenerateRequest]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(engine: FakeEngine, *requests: GenerateRequest) -> dict[str, list[Chunk]]:
    """Everything that the requests bring; the books must be right after every step."""
    found: dict[str, list[Chunk]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for chunk in engine.step():
            found[chunk.request_id].append(chunk)
        engine.check_integrity()
    return found


def text(chunks: list[Chunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


def test_needs_no_torch() -> None:
    code = "import sys, replicas.fake; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_same_prompt_and_seed_give_the_same_text_in_any_company(ask: Ask) -> None:
    alone = run(FakeEngine(), ask("hello", max_tokens=40, seed=3, request_id="a"))["a"]
    others = [ask(f"other {i}", max_tokens=60) for i in range(7)]
    together = run(FakeEngine(), *others, ask("hello", max_tokens=40, seed=3, request_id="a"))["a"]
    assert text(alone) == text(together)
    texts = {text(run(FakeEngine(), ask("hello", max_tokens=40, seed=s, request_id="a"))["a"]) for s in range(20)}
    assert len(texts) > 5
    greedy = {text(run(FakeEngine(), ask("x", seed=s, temperature=0, request_id="a"))["a"]) for s in range(5)}
    assert len(greedy) == 1


def test_usage_and_length_end_a_request_once(ask: Ask) -> None:
    [chunks] = run(FakeEngine(), ask("hello", max_tokens=9)).values()
    assert [chunk.terminal for chunk in chunks] == [False] * 8 + [True]
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (5, 9, 0)


def test_each_choice_finishes_and_the_last_one_brings_the_usage(ask: Ask) -> None:
    [chunks] = run(FakeEngine(), ask("hello", max_tokens=7, n=3, seed=1)).values()
    assert [c.index for c in chunks if c.finish_reason] == [0, 1, 2]
    assert [c.usage.completion_tokens for c in chunks if c.usage] == [21]
    assert len({text(chunks, index) for index in range(3)}) > 1


def test_no_chunk_tears_a_character_and_nothing_is_lost(ask: Ask) -> None:
    [chunks] = run(FakeEngine(FakeSettings(multibyte=True)), ask("hello", max_tokens=900)).values()
    whole = text(chunks)
    assert "\N{REPLACEMENT CHARACTER}" not in whole
    assert all(word in whole for word in ("café", "東京", "🚀"))


def test_every_token_brings_text_unless_characters_of_several_bytes_are_asked_for(ask: Ask) -> None:
    [chunks] = run(FakeEngine(), ask("hello", max_tokens=900)).values()
    assert all(len(chunk.text) == len(chunk.token_ids) == 1 for chunk in chunks)


def test_a_stop_string_ends_the_text_before_it(ask: Ask) -> None:
    plain = text(run(FakeEngine(), ask("hello", max_tokens=60, request_id="a"))["a"])
    stop = plain[20:26]
    chunks = run(FakeEngine(), ask("hello", max_tokens=60, stop=("@@", stop), request_id="a"))["a"]
    assert text(chunks) == plain[: plain.index(stop)]
    assert chunks[-1].finish_reason is FinishReason.STOP
    late = run(FakeEngine(), ask("hello", max_tokens=60, min_tokens=60, stop=(stop,), request_id="a"))["a"]
    assert late[-1].usage is not None
    assert late[-1].usage.completion_tokens == 60


def test_reply_tokens_ends_with_eos_unless_ignored(ask: Ask) -> None:
    engine = FakeEngine(FakeSettings(reply_tokens=5))
    short, long = run(engine, ask(max_tokens=9), ask(max_tokens=9, ignore_eos=True)).values()
    assert short[-1].finish_reason is FinishReason.STOP
    assert short[-1].token_ids == engine.card.eos_token_ids[:1]
    assert len(short) == 5
    assert long[-1].finish_reason is FinishReason.LENGTH


def test_a_repeated_prefix_is_cached_and_announced(ask: Ask) -> None:
    engine = FakeEngine(FakeSettings(block_size=4))
    run(engine, ask("0123456789abcd", max_tokens=1))
    root = prefix_root("", engine.card.revision)
    chain = list(
        itertools.accumulate(
            (b"0123", b"4567", b"89ab"), lambda parent, block: block_hash(parent, tuple(block)), initial=root
        )
    )
    [stored] = engine.take_events()
    assert (stored.kind, stored.parent, list(stored.hashes)) == ("stored", root, chain[1:])
    assert engine.take_events() == []
    [again] = run(engine, ask("0123456789abcd", max_tokens=1)).values()
    assert again[-1].usage is not None
    assert again[-1].usage.cached_tokens == 12
    [other] = run(engine, ask("0123456789abcd", max_tokens=1, tenant="somebody else")).values()
    assert other[-1].usage is not None
    assert other[-1].usage.cached_tokens == 0


def test_at_least_one_prompt_token_is_computed(ask: Ask) -> None:
    engine = FakeEngine(FakeSettings(block_size=4))
    run(engine, ask("01234567", max_tokens=1))
    [again] = run(engine, ask("01234567", max_tokens=1)).values()
    assert again[-1].usage is not None
    assert again[-1].usage.cached_tokens == 4


def test_events_rebuild_the_cache_exactly_under_eviction(ask: Ask) -> None:
    engine = FakeEngine(FakeSettings(block_size=4, num_blocks=12, max_num_seqs=2))
    known: set[bytes] = set()
    evicted = 0
    for i in range(60):
        run(engine, ask(f"prompt {i % 7} and so on", max_tokens=6, seed=i))
        for event in engine.take_events():
            if event.kind == "stored":
                known |= set(event.hashes)
            else:
                assert event.kind == "removed"
                evicted += len(event.hashes)
                assert known >= set(event.hashes)
                known -= set(event.hashes)
        assert known == set(engine._blocks.refs)
    assert evicted > 0
    assert engine.stats().kv_blocks_free == 12


def test_an_abort_frees_everything_at_any_point_of_a_life(ask: Ask) -> None:
    for steps in range(6):
        engine = FakeEngine(FakeSettings(max_num_seqs=2))
        requests = [ask(f"prompt {i}", max_tokens=20) for i in range(3)]
        for request in requests:
            engine.add(request)
        for _ in range(steps):
            engine.step()
        for request in requests:
            assert engine.abort(request.request_id)
            assert not engine.abort(request.request_id)
            engine.check_integrity()
        assert not engine.has_work()
        assert engine.stats().kv_blocks_free == engine.stats().kv_blocks_total
        assert engine.stats().queued_tokens == 0


def test_more_choices_than_seats_wait_their_turn(ask: Ask) -> None:
    engine = FakeEngine(FakeSettings(max_num_seqs=2))
    requests = [ask(f"{i}", max_tokens=3) for i in range(5)]
    for request in requests:
        engine.add(request)
    finished = [chunk.request_id for chunk in engine.step() if chunk.terminal]
    assert (engine.stats().num_requests_running, engine.stats().num_requests_waiting) == (2, 3)
    while engine.has_work():
        finished += [chunk.request_id for chunk in engine.step() if chunk.terminal]
        assert engine.stats().num_requests_running <= 2
    assert finished == [request.request_id for request in requests]


def test_tokens_fall_due_by_the_timetable_without_drift(ask: Ask) -> None:
    clock = Clock()
    engine = FakeEngine(FakeSettings(tokens_per_s=10, prefill_tokens_per_s=50), clock=clock)
    engine.add(ask("x" * 100, max_tokens=5, request_id="first"))
    engine.add(ask("y" * 50, max_tokens=5, request_id="second"))
    seen: list[tuple[str, float]] = []
    while engine.has_work():
        clock.now += engine.wait_s() + 0.003  # every step is a little late
        seen += [(chunk.request_id, round(clock.now - 100, 2)) for chunk in engine.step()]
    expected = {"first": 2.0, "second": 3.0}  # prompts are computed one after the other
    for name, begin in expected.items():
        times = [at for who, at in seen if who == name]
        assert times == pytest.approx([begin + 0.1 * i for i in range(5)], abs=0.02)


@pytest.mark.parametrize(
    ("settings", "asked", "error"),
    [
        ({}, {"logprobs": 0}, NotSupported),
        ({}, {"temperature": float("nan")}, InvalidRequest),
        ({}, {"prompt": ""}, InvalidRequest),
        ({"max_num_seqs": 2}, {"n": 3}, InvalidRequest),
        ({"max_model_len": 10}, {"prompt": "0123456", "max_tokens": 4}, ContextLengthExceeded),
        ({"num_blocks": 2}, {"prompt": "x" * 30, "max_tokens": 4}, ContextLengthExceeded),
        ({"refuse_as_full": True}, {}, QueueFull),
    ],
)
def test_refusals_leave_no_trace(
    ask: Ask, settings: dict[str, Any], asked: dict[str, Any], error: type[SignalboxError]
) -> None:
    engine = FakeEngine(FakeSettings(**settings))
    with pytest.raises(error):
        engine.add(ask(**asked))
    assert not engine.has_work()
    engine.check_integrity()


def test_a_full_queue_and_a_known_id_are_refused(ask: Ask) -> None:
    engine = FakeEngine(FakeSettings(max_waiting=1))
    engine.add(ask(request_id="a"))
    with pytest.raises(InvalidRequest, match="already running"):
        engine.add(ask(request_id="a"))
    with pytest.raises(QueueFull) as full:
        engine.add(ask(request_id="b"))
    assert full.value.retry_after_s


def test_fail_after_tokens_ends_that_request_alone(ask: Ask) -> None:
    engine = FakeEngine(FakeSettings(fail_after_tokens=3))
    failed, fine = run(engine, ask(max_tokens=5, n=2), ask(max_tokens=2)).values()
    assert isinstance(failed[-1].error, EngineFault)
    assert sum(chunk.terminal for chunk in failed) == 1
    assert fine[-1].finish_reason is FinishReason.LENGTH
