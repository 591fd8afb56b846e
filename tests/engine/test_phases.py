"""The engine tells with the first and the last token of a request where its time went."""

from __future__ import annotations

import time

import pytest

from replicas.engine.engine import Engine
from replicas.protocol import Chunk, GenerateRequest, SamplingParams


def run(engine: Engine) -> list[Chunk]:
    chunks = []
    while engine.has_work():
        chunks += engine.step()
    return chunks


def ask(name: str, prompt: tuple[int, ...], **params: int) -> GenerateRequest:
    sampling = SamplingParams(temperature=0, ignore_eos=True, **params)
    return GenerateRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling)


@pytest.mark.parametrize("n", [1, 3])
def test_first_and_last_chunk_tell_it_and_the_parts_are_the_whole(make_engine, n: int) -> None:
    engine = make_engine(max_num_batched_tokens=16)
    began = time.perf_counter()
    engine.add(ask("a", tuple(range(5, 45)), max_tokens=4, n=n))
    chunks = run(engine)
    seconds = time.perf_counter() - began
    told = [(number, chunk.timing) for number, chunk in enumerate(chunks) if chunk.timing is not None]
    assert [number for number, _ in told] == [0, len(chunks) - 1]
    first, last = told[0][1], told[1][1]
    assert (first.queued_s, first.prefill_s, first.decode_s) == (last.queued_s, last.prefill_s, 0.0)
    assert min(last.queued_s, last.prefill_s, last.decode_s) > 0
    assert last.queued_s + last.prefill_s + last.decode_s <= seconds


def test_who_waits_for_a_place_is_queued_meanwhile(make_engine) -> None:
    engine = make_engine(max_num_seqs=1)
    engine.add(ask("a", (5, 6, 7), max_tokens=8))
    engine.add(ask("b", (8, 9, 10), max_tokens=2))
    timings = {chunk.request_id: chunk.timing for chunk in run(engine) if chunk.usage is not None}
    a, b = timings["a"], timings["b"]
    assert b.queued_s >= a.prefill_s + a.decode_s
