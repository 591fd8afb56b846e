"""Upstreams behind the gateway: right answers, answers from a fallback, or a proper error; never a false end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gateway.config import Retries, ServedModel
from gateway.db.database import open_engine, reading
from gateway.ledger.usage import totals
from gateway.upstreams import UpstreamModel
from replicas.mock_upstream import MockUpstream
from replicas.upstream import UpstreamConnection
from replicas.upstream_config import Upstream, UpstreamTimeouts
from tests.gateway.conftest import Gateway, StartGateway
from tests.gateway.upstream import mock

__all__ = ["mock"]

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


Start = Callable[..., Gateway]


@pytest.fixture
def start(start_gateway: StartGateway, mock: MockUpstream) -> Start:
    """`start(far="behaviour", …)`: a gateway over one upstream per keyword, and the fake model."""

    def begin(policy: str = "", **behaviours: str) -> Gateway:
        timeouts = UpstreamTimeouts(connect_s=2, first_token_s=0.5, gap_s=0.5, keep_alive_s=1)
        upstreams = tuple(
            Upstream(
                name=name, base_url=mock.base_url, upstream_model=behaviour, tokenizer="estimate", timeouts=timeouts
            )
            for name, behaviour in behaviours.items()
        )
        models = (ServedModel(name="fake"), *(ServedModel(name=name) for name in behaviours))
        gateway = start_gateway(
            replicas=None, models=models, upstreams=upstreams, retries=Retries(attempts=2, wait_s=1, retry_after_s=1)
        )
        if policy:
            with gateway.register() as register:
                register.publish(policy, author="test")
        return gateway

    return begin


def post(gateway: Gateway, model: str, **changes: Any) -> httpx.Response:
    with gateway.http() as http:
        return http.post("/v1/chat/completions", json={"model": model, **CHAT, **changes})


def test_an_upstream_answers_in_our_name(start: Start) -> None:
    gateway = start(far="normal")
    whole = post(gateway, "far").json()
    assert whole["choices"][0]["message"]["content"] == "w0 w1 w2 w3 "
    assert whole["model"] == "far"
    assert whole["usage"]["completion_tokens"] == 4
    stream = gateway.openai().chat.completions.create(
        model="far", stream=True, stream_options={"include_usage": True}, **CHAT
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "w0 w1 w2 w3 "
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4
    assert {c.model for c in chunks} == {"far"}


def test_completions_with_several_prompts_and_choices_keep_their_numbers(start: Start) -> None:
    gateway = start(far="normal")
    with gateway.http() as http:
        body = {"model": "far", "prompt": ["a", "b"], "n": 2, "max_tokens": 2}
        choices = http.post("/v1/completions", json=body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert {choice["text"] for choice in choices} == {"w0 w1 "}


def test_tools_are_for_upstreams_and_refused_by_name_for_our_own_engines(start: Start) -> None:
    gateway = start(far="tool-calls")
    client = gateway.openai()
    message = client.chat.completions.create(model="far", tools=TOOLS, **CHAT).choices[0].message
    assert message.tool_calls
    refused = post(gateway, "fake", tools=TOOLS)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tools"


def test_in_a_group_tools_go_to_the_upstream(start: Start) -> None:
    gateway = start("groups: {auto: {models: [fake, far]}}", far="tool-calls")
    assert post(gateway, "auto").json()["model"] == "fake"
    assert post(gateway, "auto", tools=TOOLS).json()["model"] == "far"


BROKEN = [
    "hang-before-headers",
    "hang-before-first-token",
    "reset:after=-1",
    "close:after=0",
    "status:code=500",
    "garbage:after=0,kind=json",
    "garbage:after=0,kind=bytes",
]


@pytest.mark.parametrize("behaviour", BROKEN)
@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_before_the_first_token_is_answered_by_the_fallback(
    start: Start, behaviour: str, stream: bool
) -> None:
    gateway = start("fallbacks: {far: [fake]}", far=behaviour)
    answer = post(gateway, "far", stream=stream)
    assert answer.status_code == 200, answer.text
    assert '"model":"fake"' in answer.text
    if stream:
        assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("behaviour", BROKEN)
def test_without_a_fallback_the_error_is_proper(start: Start, behaviour: str) -> None:
    gateway = start(far=behaviour)
    answer = post(gateway, "far")
    assert answer.status_code in (502, 503, 504)
    assert answer.json()["error"]["message"]
    assert "127.0.0.1" not in answer.text


def test_what_an_upstream_had_made_before_it_was_cut_is_on_the_books_and_charged_to_nobody(start: Start) -> None:
    gateway = start("fallbacks: {far: [fake]}", far="ended:after=3")
    assert post(gateway, "far").json()["model"] == "fake"

    def rows() -> list[tuple[str, int, int, int]]:
        engine = open_engine(gateway.config.database_url)
        with reading(engine).begin() as connection:
            found = totals(connection)
        engine.dispose()
        return [(one.model, one.requests, one.completion_tokens, one.unbilled_tokens) for one in found]

    # Two attempts of three words. The book is written behind the answer, and a machine may stand still meanwhile.
    gateway.wait_until(lambda: rows() == [("fake", 1, 4, 0), ("far", 0, 0, 6)], timeout_s=30)


def test_a_server_that_fails_at_what_is_wrong_with_a_request_is_not_held_for_ill(start: Start) -> None:
    """llama-cpp-python answers 500 to a field of the wrong type; that opened the breaker for everybody."""
    gateway = start(far="status:code=500,times=8", well="normal")
    for _ in range(8):
        refused = post(gateway, "far", temperature="hot")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    assert post(gateway, "far").status_code == 200, "each was tried once, and the breaker is closed"


def test_what_is_wrong_with_a_request_does_not_speak_for_a_server_that_fails(start: Start) -> None:
    """It counted as an answer: with one wrong body in between, a server that was down was never left alone."""
    gateway = start("retries: {breaker: {failures: 5, cooldown_s: 60}}", far="status:code=500")
    for _ in range(4):
        assert post(gateway, "far").status_code == 503  # two attempts each
        assert post(gateway, "far", temperature="hot").status_code in (400, 503)
    with gateway.http() as http:
        assert http.get("/health").json()["ready_replicas"]["far"] == 0


WRONG = {
    "/v1/chat/completions": [
        ('"messages": [1]', "messages.0"),
        ('"messages": "hello"', "messages"),
        ('"messages": [{"role": "user", "content": "a"}], "temperature": NaN', "temperature"),
        ('"messages": [{"role": "user", "content": "a"}], "temperature": 1e999', "temperature"),
        (f'"messages": [{{"role": "user", "content": "a"}}], "max_tokens": {10**30}', "max_tokens"),
        ('"messages": [{"role": "user", "content": "a"}], "prompt": "b"', "prompt"),
    ],
    "/v1/completions": [
        ('"prompt": [null]', "prompt.0"),
        ('"prompt": [1.5]', "prompt.0"),
        ('"prompt": [[1, 2], "a"]', "prompt.0"),
        ('"prompt": "a", "messages": []', "messages"),
    ],
}


@pytest.mark.parametrize(("path", "fields", "param"), [(p, *one) for p, cases in WRONG.items() for one in cases])
def test_a_body_that_cannot_be_counted_or_sent_on_is_refused_by_name(
    start: Start, mock: MockUpstream, path: str, fields: str, param: str
) -> None:
    """Each was a 500, or went to the other endpoint, because what an upstream may know was hardly looked at."""
    gateway = start(far="normal")
    with gateway.http() as http:
        refused = http.post(path, content=f'{{"model": "far", {fields}}}')
    error = refused.json()["error"]
    assert (refused.status_code, error["param"].partition(".")[0]) == (400, param.partition(".")[0]), error
    assert not mock.received


def test_a_name_of_megabytes_is_not_kept(start: Start) -> None:
    """Explanations keep what was told; a name that no model has was told, and kept, as a whole."""
    gateway = start(far="normal")
    assert len(post(gateway, "x" * 1_000_000).content) < 1000


async def test_a_long_prompt_is_counted_beside_the_event_loop() -> None:
    """Four megabytes held every other answer of the gateway up for half a second, each time they were counted."""
    threads: list[int] = []

    def count(text: str) -> int:
        threads.append(threading.get_ident())
        return len(text)

    connection = await UpstreamConnection.connect(Upstream(name="far", base_url="http://far/v1"), count=count)
    for size in (10, 1_000_000):
        assert await UpstreamModel(connection).prompt_tokens({"prompt": "a" * size}, size) == size
    await connection.aclose()
    assert [thread == threading.get_ident() for thread in threads] == [True, False]


def test_an_upstream_that_dies_in_the_middle_ends_in_an_error_event(start: Start) -> None:
    gateway = start("fallbacks: {far: [fake]}", far="close:after=2")
    lines: list[str] = []
    with (
        gateway.http() as http,
        http.stream("POST", "/v1/chat/completions", json={"model": "far", **CHAT, "stream": True}) as answer,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        lines.extend(answer.iter_lines())
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    assert "error" in events[-1]
    assert {event.get("model", "far") for event in events} == {"far"}
    assert post(gateway, "far").json()["model"] == "fake"  # one whole answer may begin again elsewhere


def test_a_busy_upstream_is_left_alone_for_as_long_as_it_asks(start: Start, mock: MockUpstream) -> None:
    gateway = start(far="status:code=429,retry_after=7")
    first, second = post(gateway, "far"), post(gateway, "far")
    assert (first.status_code, second.status_code) == (503, 503)
    assert int(first.headers["retry-after"]) == 7
    assert 5 <= int(second.headers["retry-after"]) <= 9
    assert len(mock.received) == 1
    with gateway.http() as http:
        assert http.get("/health").json()["ready_replicas"] == {"fake": 1, "far": 0}


def test_a_client_that_hangs_up_is_forgotten_upstream(start: Start, mock: MockUpstream) -> None:
    gateway = start(far="normal:gap_ms=50")
    with gateway.http() as http:
        body = {"model": "far", **CHAT, "max_tokens": 500, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    gateway.wait_until(lambda: mock.open_connections == 0)


def test_explain_knows_upstreams(start: Start) -> None:
    gateway = start("fallbacks: {far: [fake]}", far="status:code=500")
    answer = post(gateway, "far")
    (told,) = gateway.explain(answer.headers["x-request-id"], gateway.admin_token())
    assert [(step["role"], step["model"]) for step in told["steps"]] == [("answer", "far"), ("fallback", "fake")]
    assert told["steps"][0]["error"]
    assert told["steps"][0]["attempts"][0]["policy"] == "upstream"
