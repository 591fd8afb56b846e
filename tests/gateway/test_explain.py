from __future__ import annotations

import json
import time

from gateway.explain import Keep, Record, RecordBook, Step
from gateway.jobs import Attempt, Job
from policies.budget import Price
from policies.fleet_view import RouteRequest
from replicas.protocol import GenerateRequest, RouteDecision, SamplingParams, Usage


def record(request_id: str, at: float | None = None, candidates: int = 2) -> Record:
    names = tuple(f"r{number}" for number in range(candidates))
    decision = RouteDecision(
        policy="affinity",
        replica_id="r0",
        candidates=names,
        terms={"queue_ms": tuple(range(candidates)), "score": tuple(range(candidates))},
        generation=3,
        predicted_ms=12.5,
    )
    asked = GenerateRequest(request_id="x", prompt_token_ids=(1, 2), sampling=SamplingParams())
    route = RouteRequest(request_id="x", prompt_tokens=2, hashes=(), block_size=16)
    job = Job(model="m", request=asked, route=route, attempts=[Attempt(decision, 5.0)])
    step = Step(role="answer", model="m", jobs=[job], price=Price.per_million(input=1, output=2), ttft_s=0.25)
    step.usage = Usage(prompt_tokens=10, completion_tokens=5)
    return Record(
        request_id=request_id,
        gateway="gw",
        key_id="key_1",
        key_name="test",
        endpoint="/v1/completions",
        asked="auto",
        generation=3,
        steps=[step],
        at=time.time() if at is None else at,
        status=200,
    )


def test_a_record_tells_the_whole_decision_without_the_prompt() -> None:
    shown = record("a").shown()
    step = shown["steps"][0]
    assert shown["generation"] == 3
    assert (step["predicted_ttft_ms"], step["ttft_ms"]) == (12.5, 250.0)
    assert shown["cost_usd"] == step["cost_usd"] == 20e-6
    assert step["attempts"][0]["candidates"][1] == {"replica": "r1", "queue_ms": 1, "score": 1}
    assert "prompt_token_ids" not in json.dumps(shown)


def test_the_oldest_go_first_when_there_are_too_many() -> None:
    book = RecordBook(Keep(records=3))
    for number in range(5):
        book.add(record(str(number)))
    assert len(book) == 3
    assert book.get("1") is None
    assert book.get("2") is not None


def test_what_is_too_old_or_too_heavy_goes() -> None:
    book = RecordBook(Keep(age_s=60, bytes=20_000))
    book.add(record("old", at=time.time() - 61))
    assert book.get("old") is None
    book.add(record("new"))
    assert len(book) == 1
    book.add(record("heavy", candidates=300))
    assert book.get("new") is None
    assert book.get("heavy") is not None


def test_a_record_grows_while_its_request_runs_and_counts_once() -> None:
    book = RecordBook(Keep(records=2))
    running = record("a")
    steps, running.steps = running.steps, []
    book.add(running)
    running.steps = steps
    book.add(running)
    book.add(record("b"))
    assert len(book) == 2
    assert book.get("a") is running


def test_an_id_that_is_used_again_means_the_newer_request() -> None:
    book = RecordBook()
    book.add(record("a"))
    newer = record("a")
    book.add(newer)
    assert len(book) == 1
    assert book.get("a") is newer
