"""Whatever a caller sends is answered in OpenAI's error shape with a 4xx status, and nothing stays in an engine."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.requests import ChatRequest, CompletionRequest, parse
from gateway.schemas import ErrorResponse
from replicas.protocol import RequestError

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def chat(**changes: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": MESSAGES, "max_tokens": 1, **changes}


def completion(**changes: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "hi", "max_tokens": 1, **changes}


def says(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


BAD_CHATS: list[tuple[dict[str, Any], int, str | None]] = [
    (chat(model="gpt-5"), 404, "model"),
    (chat(model=5), 400, "model"),
    (chat(model=""), 400, "model"),
    (chat(model=None), 400, "model"),
    (chat(messages=[]), 400, "messages"),
    (chat(messages=None), 400, "messages"),
    (chat(messages="hi"), 400, "messages"),
    (chat(messages=["hi"]), 400, "messages.0"),
    (chat(messages=[*MESSAGES, {"role": "user"}]), 400, "messages.1.content"),
    (chat(messages=says(5)), 400, "messages.0.content"),
    (chat(messages=says(None)), 400, "messages.0.content"),
    (chat(messages=says([])), 400, "messages.0.content"),
    (chat(messages=says([5])), 400, "messages.0.content.0"),
    (chat(messages=says([{"type": "text"}])), 400, "messages.0.content.0.text"),
    (chat(messages=says([{"type": "text", "text": 5}])), 400, "messages.0.content.0.text"),
    (chat(messages=says([{"type": "image_url", "image_url": {"url": "x"}}])), 400, "messages.0.content.0.type"),
    (chat(messages=says("hi", tool_calls=[{"id": "x"}])), 400, "messages.0.tool_calls"),
    (chat(messages=MESSAGES * 2049), 400, "messages"),
    (chat(messages=says("hi", nmae="x")), 400, "messages.0.nmae"),
    (chat(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role"),
    (chat(messages=[{"role": "robot", "content": "x"}]), 400, "messages.0.role"),
    (chat(max_tokens=-1), 400, "max_tokens"),
    (chat(max_tokens=0), 400, "max_tokens"),
    (chat(max_tokens="5"), 400, "max_tokens"),
    (chat(max_tokens=1.5), 400, "max_tokens"),
    (chat(max_tokens=True), 400, "max_tokens"),
    (chat(max_tokens=10**30), 400, "max_tokens"),
    (chat(max_completion_tokens=2), 400, "max_completion_tokens"),
    (chat(max_tokens=None, max_completion_tokens=-2), 400, "max_completion_tokens"),
    (chat(temperature=-0.1), 400, "temperature"),
    (chat(temperature=2.1), 400, "temperature"),
    (chat(temperature="0.5"), 400, "temperature"),
    (chat(top_p=1.1), 400, "top_p"),
    (chat(top_p=0), 400, "top_p"),
    (chat(n=0), 400, "n"),
    (chat(n=129), 400, "n"),
    (chat(seed=2**63), 400, "seed"),
    (chat(seed="x"), 400, "seed"),
    (chat(stop=["a", "b", "c", "d", "e"]), 400, "stop"),
    (chat(stop=[""]), 400, "stop.0"),
    (chat(stop=[1]), 400, "stop.0"),
    (chat(stop=7), 400, "stop"),
    (chat(presence_penalty=2.5), 400, "presence_penalty"),
    (chat(frequency_penalty=-2.5), 400, "frequency_penalty"),
    (chat(logit_bias={"5": 101}), 400, "logit_bias.5"),
    (chat(logit_bias={"x": 1}), 400, "logit_bias.x"),
    (chat(logit_bias={"-1": 1}), 400, "logit_bias.-1"),
    (chat(logit_bias={"999999": 1}), 400, "logit_bias.999999"),
    (chat(logit_bias={"٣": 1}), 400, "logit_bias.٣"),
    (chat(logit_bias={"9" * 5000: 1}), 400, "logit_bias." + "9" * 32),
    (chat(logit_bias=[1]), 400, "logit_bias"),
    (chat(logprobs=3), 400, "logprobs"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    (chat(top_logprobs=2), 400, "top_logprobs"),
    (chat(logprobs=False, top_logprobs=2), 400, "top_logprobs"),
    (chat(stream="yes"), 400, "stream"),
    (chat(stream_options={"include_usage": True}), 400, "stream_options"),
    (chat(stream=True, stream_options={"include_usage": 1}), 400, "stream_options.include_usage"),
    (chat(stream=True, stream_options={"inklude_usage": True}), 400, "stream_options.inklude_usage"),
    (chat(tools=[{"type": "function", "function": {"name": "f"}}]), 400, "tools"),
    (chat(tool_choice="required"), 400, "tool_choice"),
    (chat(functions=[{"name": "f"}]), 400, "functions"),
    (chat(response_format={"type": "json_object"}), 400, "response_format"),
    (chat(response_format={"type": "json_schema", "json_schema": {}}), 400, "response_format"),
    (chat(audio={"voice": "alloy", "format": "mp3"}), 400, "audio"),
    (chat(modalities=["text", "audio"]), 400, "modalities"),
    (chat(prediction={"type": "content", "content": "x"}), 400, "prediction"),
    (chat(store=True), 400, "store"),
    (chat(store=0), 400, "store"),
    (chat(web_search_options={}), 400, "web_search_options"),
    (chat(reasoning_effort="high"), 400, "reasoning_effort"),
    (chat(service_tier="priority"), 400, "service_tier"),
    (chat(best_of=2), 400, "best_of"),
    (chat(metadata={"a": 1}), 400, "metadata.a"),
    (chat(temprature=1), 400, "temprature"),
    (chat(prompt="hi"), 400, "prompt"),
    (chat(top_k=-2), 400, "top_k"),
    (chat(min_p=1.5), 400, "min_p"),
    (chat(repetition_penalty=0), 400, "repetition_penalty"),
    (chat(min_tokens=2), 400, "min_tokens"),
    (chat(stop_token_ids=[10**6]), 400, "stop_token_ids.0"),
    (chat(stop_token_ids=[-1]), 400, "stop_token_ids.0"),
    (chat(ignore_eos=1), 400, "ignore_eos"),
    (chat(guided_json={}), 400, "guided_json"),
    ({"model": "fake"}, 400, "messages"),
    ({"messages": MESSAGES}, 400, "model"),
    ({}, 400, "model"),
]

BAD_COMPLETIONS: list[tuple[dict[str, Any], int, str | None]] = [
    (completion(prompt=""), 400, "prompt"),
    (completion(prompt=[]), 400, "prompt"),
    (completion(prompt=[[]]), 400, "prompt"),
    (completion(prompt=["a", ""]), 400, "prompt.1"),
    (completion(prompt=None), 400, "prompt"),
    (completion(prompt=5), 400, "prompt"),
    (completion(prompt={"text": "x"}), 400, "prompt"),
    (completion(prompt=[1, "a"]), 400, "prompt.0"),
    (completion(prompt=[1.5]), 400, "prompt.0"),
    (completion(prompt=[True]), 400, "prompt.0"),
    (completion(prompt=[-1]), 400, "prompt.0"),
    (completion(prompt=[10**6]), 400, "prompt.0"),
    (completion(prompt=[[1], [2, 10**6]]), 400, "prompt.1.1"),
    (completion(prompt=["a"] * 129), 400, "prompt"),
    (completion(prompt=["a"] * 65, n=2), 400, "n"),
    (completion(logprobs=21), 400, "logprobs"),
    (completion(logprobs=True), 400, "logprobs"),
    (completion(logprobs=1), 400, "logprobs"),  # the engine says that: the fake one has none
    (completion(echo=True), 400, "echo"),
    (completion(suffix="x"), 400, "suffix"),
    (completion(best_of=3), 400, "best_of"),
    (completion(messages=MESSAGES), 400, "messages"),
    ({"model": "fake"}, 400, "prompt"),
]


def assert_refused(response: httpx.Response, status: int, param: str | None) -> str:
    assert response.status_code == status, response.text
    error = ErrorResponse.model_validate_json(response.content).error
    assert error.type == "invalid_request_error"
    assert error.param == param, error
    assert response.headers["x-request-id"]
    assert response.headers["content-type"] == "application/json"
    return error.message


@pytest.mark.parametrize(("body", "status", "param"), BAD_CHATS, ids=lambda value: str(value)[:70])
def test_a_bad_chat_names_the_field(module_gateway, body: dict[str, Any], status: int, param: str | None) -> None:
    with module_gateway.http() as http:
        message = assert_refused(http.post(CHAT, json=body), status, param)
    if param and param in body and param.isascii():
        assert param.split(".")[0] in message or status == 404
    module_gateway.assert_idle()


@pytest.mark.parametrize(("body", "status", "param"), BAD_COMPLETIONS, ids=lambda value: str(value)[:70])
def test_a_bad_completion_names_the_field(module_gateway, body: dict[str, Any], status: int, param: str | None) -> None:
    with module_gateway.http() as http:
        assert_refused(http.post(COMPLETION, json=body), status, param)
    module_gateway.assert_idle()


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "fake", "temperature": NaN, "messages": [{"role": "user", "content": ""}]}',
        b'{"model": "fake", "seed": ' + b"1" * 5000 + b"}",
        b"[" * 100_000,
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, bytes) else None,
)
def test_what_is_not_json_of_an_object_is_refused(module_gateway, endpoint: str, body: bytes) -> None:
    with module_gateway.http() as http:
        response = http.post(endpoint, content=body)
    assert response.status_code == 400, response.text
    ErrorResponse.model_validate_json(response.content)


def test_a_near_miss_is_answered_with_the_name_that_was_meant(module_gateway) -> None:
    with module_gateway.http() as http:
        assert "did you mean 'temperature'?" in http.post(CHAT, json=chat(temprature=1)).text


@pytest.mark.parametrize("stream", [False, True])
def test_an_over_long_prompt_is_refused_with_both_counts(module_gateway, stream: bool) -> None:
    with module_gateway.http() as http:
        response = http.post(COMPLETION, json=completion(prompt="x" * 9000, stream=stream))
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "prompt")
        assert "8192" in error["message"]
        assert "9000" in error["message"]
        response = http.post(COMPLETION, json=completion(prompt="x" * 8000, max_tokens=200))
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert "8200" in response.json()["error"]["message"]
        assert http.post(COMPLETION, json=completion(prompt="x" * 8191)).status_code == 200
        long_chat = http.post(CHAT, json={"model": "fake", "messages": says("x" * 9000)})
        assert long_chat.json()["error"]["code"] == "context_length_exceeded"
        assert long_chat.json()["error"]["param"] == "messages"
    module_gateway.assert_idle()


def test_an_omitted_max_tokens_fills_the_context_in_chats_and_is_16_in_completions(module_gateway) -> None:
    with module_gateway.http() as http:
        body = {"model": "fake", "messages": says("x" * 8000)}
        usage = http.post(CHAT, json=body).json()["usage"]
        assert usage["total_tokens"] == 8192
        assert http.post(COMPLETION, json={"model": "fake", "prompt": "x"}).json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer sk-wrong"},
        {"authorization": "Basic c2s6eA=="},
        {"authorization": "Bearer " + "x" * 5000},
        {"authorization": "Bearer \xe9".encode("latin-1")},
    ],
    ids=str,
)
def test_without_a_live_key_everything_but_health_and_metrics_is_401(module_gateway, headers: dict[str, Any]) -> None:
    with module_gateway.http(headers=headers) as http:
        answers = [http.post(CHAT, json=chat()), http.post(COMPLETION, content=b"{"), http.get("/v1/models")]
        answers.append(http.get("/v1/models/fake"))
        for response in answers:
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 200


def test_a_body_over_the_limit_is_413_with_and_without_its_length(module_gateway) -> None:
    body = json.dumps(chat(messages=says("x" * 10_000_000))).encode()

    def parts():
        yield from (body[start : start + 65536] for start in range(0, len(body), 65536))

    with module_gateway.http() as http:
        for content in (body, parts()):
            response = http.post(CHAT, content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        assert http.post(CHAT, json=chat()).status_code == 200


@pytest.mark.parametrize("framing", [b"content-length: 99999999", b"transfer-encoding: chunked"])
def test_413_comes_before_the_rest_of_the_body(module_gateway, framing: bytes) -> None:
    """The client sends 5 of 99 MB (or of an endless chunked body) and stops: the answer must not wait for more."""
    address = httpx.URL(module_gateway.base_url)
    with socket.create_connection((address.host, address.port), timeout=5) as sock:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + module_gateway.key.encode()
        sock.sendall(head + b"\r\n" + framing + b"\r\n\r\n")
        if b"chunked" in framing:
            for _ in range(80):
                sock.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413")


def test_paths_and_methods_that_do_not_exist_answer_in_the_same_shape(module_gateway) -> None:
    with module_gateway.http() as http:
        assert_refused(http.get("/v1/nothing"), 404, None)
        assert_refused(http.post("/v1/chat/completions/", json=chat()), 404, None)
        assert_refused(http.get(CHAT), 405, None)
        assert_refused(http.delete("/v1/models"), 405, None)


def test_a_request_id_is_echoed_when_sane_and_made_up_otherwise(module_gateway) -> None:
    with module_gateway.http() as http:
        echoed = http.post(CHAT, json=chat(), headers={"x-request-id": "trace-1.a"}).headers
        assert echoed["x-request-id"] == "trace-1.a"
        assert int(echoed["openai-processing-ms"]) >= 0
        for odd in ("x" * 500, "a b", "<script>"):
            assert http.get("/health", headers={"x-request-id": odd}).headers["x-request-id"].startswith("req_")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools", "store", "echo", "best_of"})


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parser(body: bytes) -> None:
    for kind in (ChatRequest, CompletionRequest):
        try:
            parse(kind, body)
        except RequestError:
            pass


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=300)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.booleans())
def test_no_json_breaks_the_parser_or_reaches_the_engine_half_checked(changes: dict[str, Any], is_chat: bool) -> None:
    """Either a RequestError, or sampling parameters that the engine accepts."""
    base: dict[str, Any] = {"messages": MESSAGES} if is_chat else {"prompt": "hi"}
    body = json.dumps({"model": "fake", **base, **changes}).encode()
    try:
        request = parse(ChatRequest if is_chat else CompletionRequest, body)
        request.sampling(request.token_limit or 16, request.logprobs_wanted, 1000).validate()
    except RequestError:
        pass


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_no_body_is_ever_a_5xx(module_gateway, changes: dict[str, Any]) -> None:
    with module_gateway.http() as http:
        response = http.post(CHAT, content=json.dumps(chat(**changes)).encode())
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        ErrorResponse.model_validate_json(response.content)
