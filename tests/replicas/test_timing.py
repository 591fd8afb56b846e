"""What a replica tells of a request's time: measured in both engines, carried over the wire, once at each end."""

from __future__ import annotations

import pytest

from replicas import wire
from replicas.engine.phases import Phases
from replicas.fake import FakeEngine, FakeSettings
from replicas.protocol import Chunk, GenerateRequest, SamplingParams, Timing, Usage


def test_phases_add_up_and_only_the_first_step_counts() -> None:
    phases = Phases(1.0)
    phases.scheduled(3.0)
    phases.scheduled(4.0)
    assert phases.token(6.0, last=False) == Timing(queued_s=2.0, prefill_s=3.0)
    assert phases.token(7.0, last=False) is None
    assert phases.token(10.0, last=True) == Timing(queued_s=2.0, prefill_s=3.0, decode_s=4.0)


def test_a_single_token_ends_what_it_began() -> None:
    phases = Phases(0.0)
    phases.scheduled(1.0)
    assert phases.token(2.0, last=True) == Timing(queued_s=1.0, prefill_s=1.0)


@pytest.mark.parametrize("timing", [None, Timing(queued_s=0.25, prefill_s=1e-9, decode_s=3600.0, cached_tokens=7)])
def test_the_wire_keeps_it(timing: Timing | None) -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=1)
    chunk = Chunk(request_id="r", token_ids=(1,), usage=usage, timing=timing)
    message = wire.decode_to_gateway(wire.encode(wire.Chunks((wire.chunk_part(1, chunk),))))
    assert isinstance(message, wire.Chunks)
    assert wire.chunk("r", message.parts[0]) == chunk


def test_of_two_prompts_the_second_waits_for_the_first() -> None:
    now = 0.0
    engine = FakeEngine(FakeSettings(tokens_per_s=10, prefill_tokens_per_s=100), clock=lambda: now)
    for name in ("a", "b"):
        prompt = tuple(range(20)) if name == "a" else tuple(range(20, 40))
        params = SamplingParams(n=2, max_tokens=3, temperature=1.0, seed=1)
        engine.add(GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=params))
    told: dict[str, list[Timing]] = {"a": [], "b": []}
    while engine.has_work():
        for chunk in engine.step():
            if chunk.timing is not None:
                told[chunk.request_id].append(chunk.timing)
        now += engine.wait_s() or 0.001
    for name, queued_s in (("a", 0.0), ("b", 0.2)):
        first, last = told[name]
        assert (first.queued_s, first.prefill_s) == pytest.approx((queued_s, 0.2), abs=0.01)
        assert first.decode_s == 0
        assert (last.queued_s, last.prefill_s) == (first.queued_s, first.prefill_s)
        assert last.decode_s == pytest.approx(0.2, abs=0.01)
