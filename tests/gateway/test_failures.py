"""Replicas fail, fill up, drain and come back; a caller sees a retry, an honest error, or a cut stream, never a lie."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import httpx
import openai
import pytest

from gateway.config import Retries
from gateway.schemas import ErrorResponse
from replicas.fake import FakeSettings
from replicas.protocol import (
    Chunk,
    EngineFault,
    EngineStats,
    FinishReason,
    QueueFull,
    ReplicaDraining,
    ReplicaLost,
    Usage,
)

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 40}
TOKEN = [Chunk(request_id="x", text="a", token_ids=(1,))]
USAGE = Usage(prompt_tokens=1, completion_tokens=2)
END = [Chunk(request_id="x", text="b", token_ids=(2,), finish_reason=FinishReason.STOP, usage=USAGE)]


def post(gateway, **changes) -> httpx.Response:
    with gateway.http() as http:
        return http.post("/v1/chat/completions", json={**CHAT, **changes})


def cut_stream(gateway, endpoint: str, body: dict) -> list[str]:
    """The lines of a stream that must end in a broken connection."""
    lines: list[str] = []
    with gateway.http() as http, http.stream("POST", endpoint, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            lines.extend(line for line in response.iter_lines())
    return lines


@pytest.mark.parametrize("error", [ReplicaLost("gone"), ReplicaDraining("closing"), QueueFull("full")], ids=repr)
def test_unavailable_before_the_first_token_is_retried_elsewhere(start_gateway, scripted, error) -> None:
    bad, good = scripted([error], "bad"), scripted([TOKEN, END], "good")
    bad.status, good.status = idle(bad), idle(good)
    gateway = start_gateway(connections=[bad, good])
    for _ in range(12):
        assert post(gateway).json()["choices"][0]["message"]["content"] == "ab"
    assert bad.requests, "ties are broken by lot: 12 requests cannot all have missed the bad one"
    assert len({request.request_id for request in bad.requests + good.requests}) == len(bad.requests + good.requests)


def idle(connection):
    return replace(connection.status, stats=EngineStats())


def test_a_request_that_kills_replicas_is_given_to_few_of_them(start_gateway, scripted) -> None:
    connections = [scripted([ReplicaLost("gone")], f"r{i}") for i in range(6)]
    gateway = start_gateway(connections=connections, retries=Retries(attempts=3, wait_s=5, retry_after_s=7))
    response = post(gateway)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "replica_lost"
    assert response.headers["retry-after"] == "7"
    assert sum(len(connection.requests) for connection in connections) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_full_queues_everywhere_are_503_at_once_with_retry_after(start_gateway, stream: bool) -> None:
    gateway = start_gateway(replicas=[FakeSettings(refuse_as_full=True)] * 2)
    began = time.monotonic()
    response = post(gateway, stream=stream)
    assert time.monotonic() - began < 2
    assert response.status_code == 503
    assert ErrorResponse.model_validate_json(response.content).error.code == "queue_full"
    assert int(response.headers["retry-after"]) >= 1


def test_an_engine_fault_before_the_first_token_is_500_and_not_retried(start_gateway, scripted) -> None:
    connection = scripted([EngineFault("broken")])
    gateway = start_gateway(connections=[connection])
    response = post(gateway)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert len(connection.requests) == 1


def test_an_unforeseen_exception_is_a_500_that_tells_nothing(start_gateway, scripted) -> None:
    gateway = start_gateway(connections=[scripted([RuntimeError("the secret path")])])
    response = post(gateway)
    assert response.status_code == 500
    assert "secret" not in ErrorResponse.model_validate_json(response.content).error.message


@pytest.mark.parametrize("error", [ReplicaLost("gone"), EngineFault("broken"), RuntimeError("boom")], ids=repr)
def test_a_failure_after_the_first_token_is_an_error_event_and_a_cut_connection(start_gateway, scripted, error) -> None:
    connection = scripted([TOKEN, error])
    gateway = start_gateway(connections=[connection])
    lines = cut_stream(gateway, "/v1/chat/completions", CHAT)
    events = [line.removeprefix("data: ") for line in lines if line]
    assert "[DONE]" not in events
    assert ErrorResponse.model_validate_json(events[-1]).error.type in ("server_error", "service_unavailable_error")
    assert '"content":"a"' in events[-2]
    assert len(connection.requests) == 1, "text was sent, so it must not be generated again"
    with gateway.openai() as client, pytest.raises(openai.APIError):
        list(client.chat.completions.create(**CHAT, stream=True))


def test_an_answer_without_its_terminal_chunk_is_never_passed_off_as_whole(start_gateway, scripted) -> None:
    gateway = start_gateway(connections=[scripted([TOKEN])])
    assert post(gateway).status_code == 500
    lines = cut_stream(gateway, "/v1/chat/completions", CHAT)
    assert '"error"' in lines[-2]


def test_one_failing_prompt_of_several_fails_them_all(start_gateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=100, fail_after_tokens=5)])
    body = {"model": "fake", "prompt": ["a", "b", "c"], "max_tokens": 40}
    with gateway.http() as http:
        assert http.post("/v1/completions", json=body).status_code == 500
    assert '"error"' in cut_stream(gateway, "/v1/completions", body)[-2]


def test_a_dying_replica_cuts_running_streams_and_the_next_one_takes_over(start_gateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50)])
    dying = gateway.replicas[0]

    def replace_it() -> None:
        gateway.wait_until(lambda: dying.engine.stats().generation_tokens > 5)
        gateway.remove(dying)
        dying.server.stop()
        time.sleep(0.3)
        gateway.add(name="r0")

    thread = threading.Thread(target=replace_it)
    thread.start()
    lines = cut_stream(gateway, "/v1/chat/completions", {**CHAT, "max_tokens": 5000})
    assert '"replica_lost"' in lines[-2]
    assert post(gateway).status_code == 200
    thread.join()


def test_a_request_waits_for_a_replica_to_come_back_but_not_for_ever(start_gateway) -> None:
    gateway = start_gateway(replicas=[], retries=Retries(wait_s=0.6))
    began = time.monotonic()
    response = post(gateway)
    assert 0.5 < time.monotonic() - began < 3
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_replica"
    assert "retry-after" in response.headers
    threading.Timer(0.2, gateway.add).start()
    assert post(gateway).status_code == 200


def test_a_model_that_was_known_still_waits_when_all_its_replicas_are_gone(start_gateway) -> None:
    gateway = start_gateway(retries=Retries(wait_s=0.5))
    gone = gateway.replicas[0]
    gateway.remove(gone)
    gateway.wait_ready(0)
    assert post(gateway).json()["error"]["code"] == "no_replica"
    with gateway.http() as http:
        assert http.get("/health").status_code == 503
    gone.server.stop()


def test_a_replica_that_leaves_the_directory_finishes_what_it_has(start_gateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=100)])
    old = gateway.replicas[0]
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(post(gateway, max_tokens=60)))
    thread.start()
    gateway.wait_until(lambda: old.engine.stats().generation_tokens > 3)
    gateway.remove(old)
    gateway.add(name="new")
    gateway.wait_ready(1)
    assert post(gateway, max_tokens=1).status_code == 200
    thread.join()
    assert answers[0].json()["usage"]["completion_tokens"] == 60
    assert old.engine.stats().num_requests_running == 0
    old.server.stop()


def test_a_replica_that_is_not_there_yet_is_tried_until_it_is(start_gateway) -> None:
    """Listed, but its process has not bound its port: the connection is retried, requests wait meanwhile."""
    gateway = start_gateway(replicas=[], connect_timeout_s=0.2)
    replica = gateway.add()
    replica.server.stop()
    gateway.remove(replica)
    gateway.add()
    assert post(gateway).status_code == 200


def test_load_spreads_over_replicas_even_within_a_burst(start_gateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50, prefill_tokens_per_s=1e6)] * 3)
    threads = [threading.Thread(target=post, args=(gateway,), kwargs={"max_tokens": 30}) for _ in range(12)]
    for thread in threads:
        thread.start()
    gateway.wait_until(lambda: sum(r.engine.stats().num_requests_running for r in gateway.replicas) == 12)
    assert [replica.engine.stats().num_requests_running for replica in gateway.replicas] == [4, 4, 4]
    for thread in threads:
        thread.join()
