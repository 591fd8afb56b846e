"""Hedged requests: whoever speaks first answers, the other is gone at once, and only a share is asked twice."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from gateway.config import ServedModel
from gateway.hedging import Hedges
from gateway.metrics import Metrics
from policies.document_limits import Hedging
from policies.yaml_text import DocumentError
from replicas.fake import FakeSettings
from replicas.mock_upstream import MockUpstream
from replicas.protocol import Chunk, EngineFault, EngineStats, InvalidRequest, ReplicaLost
from replicas.upstream_config import Upstream
from tests.gateway.collector import Collector
from tests.gateway.conftest import Gateway, ScriptedConnection, StartGateway
from tests.gateway.test_billing import settled
from tests.gateway.test_failures import END, TOKEN
from tests.gateway.test_retries import CHAT, post, publish
from tests.gateway.upstream import mock

__all__ = ["mock"]

POLICY = """
affinity: {policy: least_load}
budgets: [{key: "*", tokens: 1000000, window: total}]
rate_limits: [{key: "*", requests_per_minute: 100}]
hedging: {fake: {after_s: 0.1, max_share: 100%}}
"""
Scripted = Callable[..., ScriptedConnection]


def pair(start_gateway: StartGateway, scripted: Scripted, one: list[Any], other: list[Any]) -> tuple[Any, ...]:
    """A gateway, the replica that is asked first, and the one that is asked second."""
    first, second = scripted(one, "r0"), scripted(other, "r1")
    first.status = replace(first.status, stats=EngineStats())
    second.status = replace(second.status, stats=EngineStats(num_requests_running=5))
    gateway = start_gateway(connections=[first, second])
    publish(gateway, POLICY)
    return gateway, first, second


def steps(gateway: Gateway, answer: httpx.Response) -> list[dict[str, Any]]:
    (told,) = gateway.explain(answer.headers["x-request-id"], gateway.admin_token())
    found: list[dict[str, Any]] = told["steps"]
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_the_second_answers_where_the_first_is_silent_and_the_first_is_gone_at_once(
    start_gateway: StartGateway, scripted: Scripted, stream: bool
) -> None:
    gateway, first, second = pair(start_gateway, scripted, [30.0, TOKEN, END], [TOKEN, END])
    began = time.monotonic()
    answer = post(gateway, stream=stream)
    assert answer.headers["x-ratelimit-remaining-requests"] == "99"
    assert 0.1 <= time.monotonic() - began < 2
    assert answer.status_code == 200
    assert '"content":"a' in answer.text
    assert (len(first.requests), len(second.requests)) == (1, 1)
    gateway.wait_until(lambda: first.in_flight == second.in_flight == 0)
    assert first.requests[0].request_id != second.requests[0].request_id
    told = steps(gateway, answer)
    assert [(one["role"], one["attempts"][0]["replica"]) for one in told] == [("answer", "r0"), ("hedge", "r1")]
    assert told[0]["usage"] is None or not told[0]["usage"]["completion_tokens"]
    # two attempts were reserved, one was paid
    assert [one.spent_tokens for one in settled(gateway)] == [3]
    with gateway.http() as http:
        assert 'signalbox_hedged_requests_total{answered="second",model_name="fake"} 1.0' in http.get("/metrics").text


def test_the_first_that_speaks_in_time_is_not_hedged_and_one_that_speaks_later_may_still_win(
    start_gateway: StartGateway, scripted: Scripted
) -> None:
    gateway, first, second = pair(start_gateway, scripted, [TOKEN, 0.3, END], [30.0, TOKEN, END])
    assert post(gateway).status_code == 200  # a whole answer has begun when its first token is there, shown or not
    assert (len(first.requests), len(second.requests)) == (1, 0)
    first.script = [0.3, TOKEN, END]
    answer = post(gateway)
    assert answer.status_code == 200
    assert (len(first.requests), len(second.requests)) == (2, 1)
    gateway.wait_until(lambda: second.in_flight == 0)
    assert [one["role"] for one in steps(gateway, answer)] == ["answer", "hedge"]


def test_the_loser_pays_for_what_it_made(start_gateway: StartGateway) -> None:
    """Both compute; the one that is behind is aborted in the engine, and its reservation is not kept."""
    gateway = start_gateway(
        replicas=[FakeSettings(prefill_tokens_per_s=50), FakeSettings(prefill_tokens_per_s=100_000)]
    )
    publish(gateway, POLICY)
    for _ in range(4):
        assert post(gateway).status_code == 200
        gateway.assert_idle(0.5)
    assert sum(one.reserved_tokens for one in settled(gateway)) == 0
    assert gateway.app.state.gateway.running.services.answering._ledger.open == 0


@pytest.mark.parametrize(
    ("one", "other", "status"),
    [
        ([0.3, ReplicaLost("gone")], [0.4, TOKEN, END], 200),
        ([0.3, TOKEN, END], [ReplicaLost("gone")], 200),
        ([0.3, TOKEN, END], [EngineFault("broken")], 200),
        ([0.3, TOKEN, END], [InvalidRequest("no")], 200),
        ([0.3, InvalidRequest("no")], [0.4, TOKEN, END], 400),
        ([0.3, EngineFault("broken")], [30.0], 500),
        ([0.3, ReplicaLost("gone")], [0.1, ReplicaLost("gone too")], 503),
        ([0.15], [0.4, TOKEN, END], 500),
    ],
    ids=range(8),
)
def test_one_that_fails_leaves_it_to_the_other(
    start_gateway: StartGateway, scripted: Scripted, one: list[Any], other: list[Any], status: int
) -> None:
    gateway, first, second = pair(start_gateway, scripted, one, other)
    publish(gateway, POLICY + "retries: {attempts: 1}")
    assert post(gateway).status_code == status
    gateway.wait_until(lambda: first.in_flight == second.in_flight == 0)
    assert sum(one.reserved_tokens for one in settled(gateway)) == 0


def test_a_caller_who_leaves_or_is_late_ends_both(start_gateway: StartGateway, scripted: Scripted) -> None:
    gateway, first, second = pair(start_gateway, scripted, [30.0, TOKEN], [30.0, TOKEN])
    with gateway.http(headers={**gateway.headers, "x-request-timeout-ms": "300"}) as http:
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 504
    gateway.wait_until(lambda: first.in_flight == second.in_flight == 0)
    with gateway.http(timeout=0.4) as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=CHAT)
    gateway.wait_until(lambda: first.in_flight == second.in_flight == 0)
    assert (len(first.requests), len(second.requests)) == (2, 2)


def test_both_attempts_are_in_the_trace(
    start_gateway: StartGateway, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        gateway, _, _ = pair(start_gateway, scripted, [30.0, TOKEN], [TOKEN, END])
        assert post(gateway, stream=True).status_code == 200
        spans = collector.wait(lambda spans: any(span.kind == "server" for span in spans))
        attempts = {one.attributes["signalbox.role"]: one for one in spans if one.kind == "client"}
        (root,) = (one for one in spans if one.kind == "server")
    assert (attempts["answer"].error, attempts["hedge"].error, root.error) == (True, False, False)
    assert attempts["answer"].attributes["error.type"] == "abandoned"
    assert {one.parent for one in attempts.values()} == {root.span_id}
    assert root.attributes["gen_ai.response.id"] == attempts["hedge"].attributes["gen_ai.response.id"]


def test_several_prompts_are_hedged_together(start_gateway: StartGateway, scripted: Scripted) -> None:
    gateway, first, second = pair(start_gateway, scripted, [30.0, TOKEN], [TOKEN, END])
    with gateway.http() as http:
        answer = http.post("/v1/completions", json={"model": "fake", "prompt": ["a", "b"], "max_tokens": 2})
    assert [choice["text"] for choice in answer.json()["choices"]] == ["ab", "ab"]
    gateway.wait_until(lambda: first.in_flight == second.in_flight == 0)


def test_an_upstream_is_hedged_by_the_model_that_the_document_names(
    start_gateway: StartGateway, mock: MockUpstream
) -> None:
    upstream = Upstream(name="far", base_url=mock.base_url, upstream_model="ping-forever", tokenizer="estimate")
    gateway = start_gateway(models=(ServedModel(name="fake"), ServedModel(name="far")), upstreams=(upstream,))
    publish(gateway, "hedging: {far: {after_s: 0.1, max_share: 100%, to: fake}}")
    for stream in (False, True):
        answer = post(gateway, model="far", stream=stream)
        assert answer.status_code == 200
        assert '"model":"fake"' in answer.text
        gateway.wait_until(lambda: mock.open_connections == 0)
    tools = [{"type": "function", "function": {"name": "f"}}]
    with gateway.http(headers={**gateway.headers, "x-request-timeout-ms": "400"}) as http:
        asked = {**CHAT, "model": "far", "tools": tools}
        assert http.post("/v1/chat/completions", json=asked).status_code == 504, "ours cannot do it"
    with (
        gateway.register() as register,
        pytest.raises(DocumentError, match=r"hedging\.far: an upstream has no other replica"),
    ):
        register.publish("hedging: {far: {after_s: 0.1, max_share: 5%}}", author="test")


def test_only_a_share_of_requests_is_hedged_and_the_delay_is_measured() -> None:
    hedges, rules = Hedges(Metrics(["m"])), Hedging(after_s=0.5, max_share=0.05)
    taken = []
    for _ in range(100):
        assert hedges.delay_s("m", rules) == 0.5
        taken.append(hedges.take("m"))
    assert sum(taken) == 5
    assert not any(taken[:19])
    measured = Hedging(after_quantile=0.9, max_share=0.05)
    for number in range(20):
        assert hedges.delay_s("m", measured) is None
        hedges.spoke("m", number / 10)
    assert hedges.delay_s("m", measured) == pytest.approx(1.7)
    for _ in range(300):
        hedges.spoke("m", 0.25)
    assert hedges.delay_s("m", measured) == 0.25


def test_without_a_second_replica_nothing_is_hedged(start_gateway: StartGateway, scripted: Scripted) -> None:
    connection = scripted([0.3, [Chunk(request_id="x", text="a", token_ids=(1,))], END])
    gateway = start_gateway(connections=[connection])
    publish(gateway, POLICY)
    answer = post(gateway)
    assert answer.status_code == 200
    assert [one["role"] for one in steps(gateway, answer)] == ["answer"]
