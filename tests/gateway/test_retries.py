"""Retries, fallbacks and replicas that are left alone: as the document says, before the first token, each paid once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest

from gateway.config import ServedModel
from gateway.spared import Spared
from policies.breaker import BreakerSettings, Outcome
from replicas.mock_upstream import MockUpstream
from replicas.protocol import EngineFault, EngineStats, QueueFull, ReplicaLost
from replicas.upstream_config import Upstream, UpstreamTimeouts
from tests.gateway.conftest import Gateway, ScriptedConnection, StartGateway
from tests.gateway.test_billing import settled
from tests.gateway.test_failures import END, TOKEN, idle
from tests.gateway.upstream import mock

__all__ = ["mock"]

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
Scripted = Callable[..., ScriptedConnection]


def post(gateway: Gateway, **changes: Any) -> httpx.Response:
    with gateway.http() as http:
        return http.post("/v1/chat/completions", json={**CHAT, **changes})


def publish(gateway: Gateway, policy: str) -> None:
    with gateway.register() as register:
        register.publish(policy, author="test")


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("{attempts: 2}", 2),
        ("{attempts: 9, models: {fake: {attempts: 4}}}", 4),
        ("{on: [full]}", 1),
        ("{on: []}", 1),
        ("{attempts: 1}", 1),
    ],
)
def test_the_document_says_how_often_and_after_which_failures(
    start_gateway: StartGateway, scripted: Scripted, rules: str, expected: int
) -> None:
    connections = [scripted([ReplicaLost("gone")], f"r{number}") for number in range(6)]
    gateway = start_gateway(connections=connections)
    publish(gateway, f"retries: {rules}")
    assert post(gateway).json()["error"]["code"] == "replica_lost"
    assert sum(len(connection.requests) for connection in connections) == expected


def test_a_fault_is_tried_elsewhere_only_where_the_document_says_so(
    start_gateway: StartGateway, scripted: Scripted
) -> None:
    connections = [scripted([EngineFault("broken")], f"r{number}") for number in range(3)]
    gateway = start_gateway(connections=connections)
    publish(gateway, "retries: {on: [fault], backoff_s: 0.2, attempts: 2}")
    began = time.monotonic()
    assert post(gateway).status_code == 500
    assert time.monotonic() - began > 0.1
    assert sum(len(connection.requests) for connection in connections) == 2


def test_every_attempt_is_reserved_and_given_back_once(start_gateway: StartGateway, scripted: Scripted) -> None:
    bad = [scripted([error], f"bad{n}") for n, error in enumerate((ReplicaLost("gone"), QueueFull("full")))]
    good = scripted([TOKEN, END], "good")
    for connection, running in zip((*bad, good), (0, 1, 9), strict=True):
        connection.status = replace(connection.status, stats=EngineStats(num_requests_running=running))
    gateway = start_gateway(connections=[*bad, good])
    # enough for one attempt at a time, and one request a minute: an attempt that failed has taken neither
    publish(
        gateway,
        """
        affinity: {policy: least_load}
        budgets: [{key: "*", tokens: 60, window: total}]
        rate_limits: [{key: "*", requests_per_minute: 1, tokens_per_minute: 60, concurrency: 1}]
        retries: {backoff_s: 0.01}
        """,
    )
    answer = post(gateway)
    assert answer.status_code == 200, answer.text
    assert [len(connection.requests) for connection in (*bad, good)] == [1, 1, 1]
    assert [one.spent_tokens for one in settled(gateway)] == [answer.json()["usage"]["total_tokens"]]
    assert post(gateway).status_code == 429


def test_a_replica_that_keeps_failing_is_left_alone_then_probed_then_trusted(
    start_gateway: StartGateway, scripted: Scripted
) -> None:
    bad, good = scripted([EngineFault("broken")], "bad"), scripted([TOKEN, END], "good")
    bad.status, good.status = idle(bad), idle(good)
    gateway = start_gateway(connections=[bad, good])
    publish(
        gateway,
        """
        affinity: {policy: round_robin}
        retries: {on: [fault], backoff_s: 0, breaker: {failures: 3, cooldown_s: 60}}
        """,
    )
    for _ in range(12):
        assert post(gateway).status_code == 200
    assert len(bad.requests) == 3
    with gateway.http() as http:
        assert http.get("/health").json()["ready_replicas"] == {"fake": 1}
        assert 'signalbox_replicas_spared{model_name="fake"} 1.0' in http.get("/metrics").text
    spared = gateway.fleet.routes["fake"].spared
    spared._breakers["bad"]._until = 0.0  # a minute later
    for _ in range(6):
        assert post(gateway).status_code == 200
    assert len(bad.requests) == 4, "one probe, and then left alone for twice as long"
    bad.script = [TOKEN, END]
    spared._breakers["bad"]._until = 0.0
    for _ in range(6):
        assert post(gateway).status_code == 200
    assert len(bad.requests) >= 6
    assert not spared, "nothing is counted once all is well"


def test_when_all_are_left_alone_the_fallback_answers_or_it_is_503_at_once(
    start_gateway: StartGateway, scripted: Scripted, mock: MockUpstream
) -> None:
    upstream = Upstream(name="far", base_url=mock.base_url, upstream_model="normal", tokenizer="estimate")
    connections = [scripted([EngineFault("broken")], f"r{number}") for number in range(2)]
    gateway = start_gateway(
        connections=connections, models=(ServedModel(name="fake"), ServedModel(name="far")), upstreams=(upstream,)
    )
    publish(gateway, "retries: {on: [fault], backoff_s: 0, breaker: {failures: 1, cooldown_s: 30}}")
    assert post(gateway).status_code == 500
    began = time.monotonic()
    refused = post(gateway)
    assert time.monotonic() - began < 2
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
    assert 29 <= int(refused.headers["retry-after"]) <= 37
    publish(gateway, "{fallbacks: {fake: [far]}}")
    assert post(gateway).json()["model"] == "far"
    assert sum(len(connection.requests) for connection in connections) == 2


def test_an_upstreams_breaker_and_time_outs_are_the_documents_too(
    start_gateway: StartGateway, mock: MockUpstream
) -> None:
    timeouts = UpstreamTimeouts(first_token_s=0.1, keep_alive_s=1)
    upstream = Upstream(
        name="far",
        base_url=mock.base_url,
        upstream_model="hang-before-headers",
        tokenizer="estimate",
        timeouts=timeouts,
    )
    gateway = start_gateway(models=(ServedModel(name="fake"), ServedModel(name="far")), upstreams=(upstream,))
    publish(gateway, "retries: {on: [timeout], attempts: 2, backoff_s: 0, breaker: {failures: 4, cooldown_s: 30}}")
    for _ in range(3):
        assert post(gateway, model="far").status_code == 503
    assert len(mock.received) == 4
    assert not gateway.fleet.upstreams["far"].ready


def test_only_a_failure_makes_anything_remember_a_replica() -> None:
    spared, settings = Spared(), BreakerSettings(failures=2, cooldown_s=5)
    spared.ended("a", None, Outcome.SUCCESS, settings, 0.0)
    spared.ended("a", None, Outcome.NEUTRAL, settings, 0.0)
    assert not spared
    spared.ended("a", None, Outcome.FAILURE, settings, 0.0)
    assert spared
    assert not list(spared.names(0.0))
    spared.ended("a", spared.permit("a", 1.0), Outcome.FAILURE, settings, 1.0)
    assert list(spared.names(1.0)) == ["a"]
    assert spared.permit("a", 1.0) is None
    assert 4 < (spared.wait_s(["a", "b"], 2.0) or 0) <= 5
    assert spared.wait_s(["b"], 2.0) is None
    probe = spared.permit("a", 8.0)
    assert probe is not None
    assert list(spared.names(8.0)) == ["a"], "one probe at a time"
    spared.started("a", probe, 8.1)
    spared.ended("a", probe, Outcome.SUCCESS, settings, 9.0)
    assert not spared
