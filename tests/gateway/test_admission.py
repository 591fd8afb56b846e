"""Priorities, bounded queues and deadlines as callers meet them, from the policy document to the engine's queue."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from gateway.config import Retries, ServedModel
from replicas.fake import FakeSettings
from replicas.mock_upstream import MockUpstream
from replicas.protocol import GenerateRequest
from replicas.upstream_config import Upstream
from tests.gateway.conftest import Gateway, ScriptedConnection, StartGateway, make_key, running
from tests.gateway.upstream import mock

__all__ = ["mock"]

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
# One seat, so that whoever comes second waits.
NARROW = FakeSettings(max_num_seqs=1, tokens_per_s=100)
CLASSES = """
priorities:
  classes: {interactive: 0, chat: 10, batch: 50}
  default: chat
  keys: {nightly: batch}
  tiers: {flex: {to: batch}, priority: {to: interactive, keys: [alice]}}
"""


def post(gateway: Gateway, *, key: str = "", headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    sent = {"authorization": f"Bearer {key or gateway.key}", **(headers or {})}
    with gateway.http(headers=sent) as http:
        return http.post("/v1/chat/completions", json={**CHAT, **changes})


def within(gateway: Gateway, milliseconds: object, **changes: Any) -> httpx.Response:
    return post(gateway, headers={"x-request-timeout-ms": str(milliseconds)}, **changes)


@contextmanager
def occupied(gateway: Gateway) -> Iterator[None]:
    """While one stream has the only seat."""
    body = {**CHAT, "max_tokens": 4000, "stream": True}
    with gateway.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: its end closes the connection
        next(lines)
        yield


def waiting(gateway: Gateway) -> int:
    return sum(replica.engine.stats().num_requests_waiting for replica in gateway.replicas)


def start_all(count: int, ask: Callable[[int], httpx.Response]) -> tuple[list[threading.Thread], list[httpx.Response]]:
    answers: list[httpx.Response] = []
    threads = [threading.Thread(target=lambda n=n: answers.append(ask(n))) for n in range(count)]
    for thread in threads:
        thread.start()
    return threads, answers


@pytest.fixture
def published(start_gateway: StartGateway) -> Callable[..., Gateway]:
    def begin(policy: str, **options: Any) -> Gateway:
        gateway = start_gateway(**{"replicas": [NARROW], **options})
        with gateway.register() as register:
            register.publish(policy, author="test")
        return gateway

    return begin


# ---------------------------------------------------------------------------------------------------------- priorities


def sent(connection: ScriptedConnection) -> GenerateRequest:
    return connection.requests[-1]


def test_classes_and_tiers_reach_the_engine_and_nobody_raises_himself(
    start_gateway: StartGateway, scripted: Callable[..., ScriptedConnection]
) -> None:
    from tests.gateway.test_failures import END, TOKEN

    connection = scripted([TOKEN, END])
    gateway = start_gateway(connections=[connection])
    assert post(gateway, priority=7).status_code == 200
    assert sent(connection).priority == 7
    assert post(gateway, priority=-1).json()["error"]["param"] == "priority"
    assert post(gateway, service_tier="flex").json()["error"]["code"] == "unsupported_parameter"
    with gateway.register() as register:
        register.publish(CLASSES, author="test")
    nightly, alice = make_key(gateway.config, "nightly"), make_key(gateway.config, "alice")
    for key, changes, rank in [
        ("", {}, 10),
        ("", {"priority": 5}, 15),
        ("", {"service_tier": "flex"}, 50),
        ("", {"service_tier": "default"}, 10),
        (nightly, {}, 50),
        (alice, {"service_tier": "priority"}, 0),
    ]:
        assert post(gateway, key=key, **changes).status_code == 200
        assert sent(connection).priority == rank
    refused = post(gateway, key=nightly, service_tier="priority")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "service_tier")


def test_a_better_class_is_served_before_what_waited_longer(published: Callable[..., Gateway]) -> None:
    gateway = published(CLASSES)
    nightly = make_key(gateway.config, "nightly")
    order: list[str] = []

    def ask(number: int) -> httpx.Response:
        answer = post(gateway, key=nightly) if number == 0 else post(gateway)
        order.append("nightly" if number == 0 else "chat")
        return answer

    with occupied(gateway):
        first, _ = start_all(1, ask)
        gateway.wait_until(lambda: waiting(gateway) == 1)
        second, _ = start_all(1, lambda _: ask(1))
        gateway.wait_until(lambda: waiting(gateway) == 2)
    for thread in (*first, *second):
        thread.join()
    assert order == ["chat", "nightly"]


# ------------------------------------------------------------------------------------------------------ bounded queues


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_503_at_once_on_two_gateways_together(published: Callable[..., Gateway], stream: bool) -> None:
    gateway = published("admission: {max_queued: 4}")
    with running(gateway.config_of_another(), gateway.key) as other:
        other.loop.call_soon_threadsafe(other.directory.publish, [one.server.address for one in gateway.replicas])
        other.wait_ready(1)
        with occupied(gateway):
            both = (gateway, other)
            threads, answers = start_all(14, lambda number: post(both[number % 2], stream=stream))
            gateway.wait_until(lambda: len(answers) == 10)
            assert waiting(gateway) == 4
            refused = list(answers)
            began = time.monotonic()
            refused.append(post(other, stream=stream))
            assert time.monotonic() - began < 1
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in refused} == {503}
    assert {answer.json()["error"]["code"] for answer in refused} == {"queue_full"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [503] * 10


def test_a_bound_is_the_models_however_many_replicas_it_has(published: Callable[..., Gateway]) -> None:
    policy = "{affinity: {policy: least_load}, admission: {max_queued: 100, models: {fake: {max_queued: 5}}}}"
    gateway = published(policy, replicas=[NARROW] * 2)
    with occupied(gateway), occupied(gateway):
        gateway.wait_until(lambda: [one.engine.stats().num_requests_running for one in gateway.replicas] == [1, 1])
        threads, answers = start_all(12, lambda _: post(gateway))
        gateway.wait_until(lambda: len(answers) == 7)
        assert sorted(one.engine.stats().num_requests_waiting for one in gateway.replicas) == [2, 3]
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [503] * 7


def test_those_who_wait_for_a_replica_to_come_are_bounded_too(published: Callable[..., Gateway]) -> None:
    gateway = published("admission: {max_queued: 2}")
    gone = gateway.replicas[0]
    gateway.remove(gone)
    gateway.wait_ready(0)
    threads, answers = start_all(5, lambda _: post(gateway))
    gateway.wait_until(lambda: len(answers) == 3)
    assert {answer.json()["error"]["code"] for answer in answers} == {"queue_full"}
    gateway.add(name="new")
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]
    gone.server.stop()


def test_one_key_s_bound_leaves_room_for_others_and_tokens_count_too(published: Callable[..., Gateway]) -> None:
    gateway = published("admission: {max_queued_per_key: 1, max_queued_tokens: 200}")
    alice = make_key(gateway.config, "alice")
    with occupied(gateway):
        threads, _ = start_all(1, lambda _: post(gateway))
        gateway.wait_until(lambda: waiting(gateway) == 1)
        assert post(gateway).status_code == 503
        more, _ = start_all(1, lambda _: post(gateway, key=alice, messages=[{"role": "user", "content": "x" * 300}]))
        gateway.wait_until(lambda: waiting(gateway) == 2)
        refused = post(gateway, key=make_key(gateway.config, "bob"))
        assert "prompt tokens are waiting" in refused.json()["error"]["message"]
    for thread in (*threads, *more):
        thread.join()


def test_whoever_is_refused_is_answered_by_the_fallback(published: Callable[..., Gateway]) -> None:
    models = (ServedModel(name="fake"), ServedModel(name="other"))
    gateway = published("{admission: {max_queued: 1}, fallbacks: {fake: [other]}}", models=models)
    gateway.add(model="other", name="other-0")
    gateway.wait_ready(2)
    with occupied(gateway):
        threads, _ = start_all(1, lambda _: post(gateway))
        gateway.wait_until(lambda: waiting(gateway) == 1)
        assert post(gateway).json()["model"] == "other"
    threads[0].join()


# ----------------------------------------------------------------------------------------------------------- deadlines


@pytest.mark.parametrize("value", ["0", "-5", "1.5", "soon", "1e3", "", "9" * 13, "٣"])
def test_a_time_limit_that_is_none_is_refused_by_name(module_gateway: Gateway, value: str) -> None:
    headers = [("authorization", f"Bearer {module_gateway.key}"), ("x-request-timeout-ms", value.encode())]
    with httpx.Client(base_url=module_gateway.base_url, headers=headers) as http:
        answer = http.post("/v1/chat/completions", json=CHAT)
    if value == "":
        assert answer.status_code == 200, "an empty header is no header"
        return
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout-ms")


def test_two_time_limits_are_none(module_gateway: Gateway) -> None:
    limits = [("x-request-timeout-ms", b"500"), ("x-request-timeout-ms", b"60000")]
    headers = [("authorization", f"Bearer {module_gateway.key}"), *limits]
    with httpx.Client(base_url=module_gateway.base_url, headers=headers) as http:
        answer = http.post("/v1/chat/completions", json=CHAT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-timeout-ms")


def assert_late(answer: httpx.Response) -> None:
    assert answer.status_code == 504, answer.text
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"


def test_a_deadline_before_the_first_token_is_504_and_the_engine_is_rid_of_it(
    published: Callable[..., Gateway],
) -> None:
    gateway = published("{}")
    with occupied(gateway):
        began = time.monotonic()
        assert_late(within(gateway, 150, stream=True))
        assert 0.14 < time.monotonic() - began < 1
        gateway.wait_until(lambda: waiting(gateway) == 0, 0.2)
    late = within(gateway, 150, max_tokens=1000, priority=3)  # runs, but is not whole in time
    assert_late(late)
    (told,) = gateway.explain(late.headers["x-request-id"], gateway.admin_token())
    assert told["priority"] == 3
    assert 0.1 < told["time_limit_s"] <= 0.15
    gateway.assert_idle(0.5)


def test_a_deadline_after_the_first_token_is_an_error_event_and_the_blocks_are_free(
    start_gateway: StartGateway,
) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=100)])
    lines: list[str] = []
    body = {**CHAT, "max_tokens": 1000, "stream": True}
    headers = {"x-request-timeout-ms": "300"}
    with (
        gateway.http() as http,
        http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        lines.extend(answer.iter_lines())
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert events[-1]["error"]["code"] == "deadline_exceeded"
    assert 15 < len(events) < 45
    gateway.assert_idle(0.5)


def test_the_documents_own_limits_hold_for_those_who_bring_none_or_too_much(published: Callable[..., Gateway]) -> None:
    gateway = published("admission: {deadline_s: 0.2, max_deadline_s: 0.5}")
    for headers, least, most in (({}, 0.19, 0.45), ({"x-request-timeout-ms": "60000"}, 0.49, 1.0)):
        began = time.monotonic()
        assert_late(post(gateway, headers=headers, max_tokens=1000))
        assert least < time.monotonic() - began < most


def test_time_spent_waiting_for_a_replica_counts(start_gateway: StartGateway) -> None:
    gateway = start_gateway(replicas=[], retries=Retries(wait_s=20))
    assert_late(within(gateway, 150))
    gateway.add()
    gateway.wait_ready(1)
    gone = gateway.replicas[0]
    gateway.remove(gone)
    gateway.wait_ready(0)
    assert_late(within(gateway, 150))
    gone.server.stop()


def test_a_replica_that_has_stopped_is_not_waited_for(
    start_gateway: StartGateway, scripted: Callable[..., ScriptedConnection]
) -> None:
    connection = scripted([60.0])
    gateway = start_gateway(connections=[connection])
    assert_late(within(gateway, 100))
    assert 0.05 < (sent(connection).deadline_s or 0) <= 0.1
    gateway.wait_until(lambda: connection.in_flight == 0)


@pytest.mark.parametrize("behaviour", ["hang-before-headers", "ping-forever", "normal:gap_ms=100"])
def test_an_upstream_is_held_to_it_too(start_gateway: StartGateway, mock: MockUpstream, behaviour: str) -> None:
    upstream = Upstream(name="far", base_url=mock.base_url, upstream_model=behaviour, tokenizer="estimate")
    gateway = start_gateway(models=(ServedModel(name="fake"), ServedModel(name="far")), upstreams=(upstream,))
    assert_late(within(gateway, 200, model="far", max_tokens=100))
    gateway.wait_until(lambda: mock.open_connections == 0)
    assert gateway.fleet.upstreams["far"].ready, "the caller's impatience is no fault of the upstream"
