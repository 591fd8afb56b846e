"""The parts of an upstream that need no server: configuration, errors, tokens, answers."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.protocol import (
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    NotSupported,
    PayloadTooLarge,
    QueueFull,
    SignalboxError,
)
from replicas.upstream_answer import Answer
from replicas.upstream_ask import Mode, body, plainer
from replicas.upstream_config import Upstream, UpstreamTimeouts, read_key
from replicas.upstream_errors import Refusals, UpstreamFailed, UpstreamLost, complaint, retry_after_s
from replicas.upstream_messages import Assembled, UpstreamChunk, UpstreamRequest, UpstreamUsage
from replicas.upstream_tokens import counter, counting, estimate, prompt_tokens

UPSTREAM = Upstream(
    name="served", base_url="http://host.example:9/v1", upstream_model="org/inner", tokenizer="estimate"
)
REFUSALS = Refusals(UPSTREAM, "sk-0123456789")
NOON = 1_800_000_000.0


def answer(**fields: Any) -> Answer:
    return Answer(UpstreamRequest(request_id="r", body={"messages": []} | fields, prompt_tokens=5), REFUSALS)


def event(delta: dict[str, Any] | None = None, **more: Any) -> str:
    return json.dumps({"choices": [{"index": 0, "delta": delta or {}, **more}]})


# ------------------------------------------------------------------------------------------------------ configuration


def test_the_key_comes_from_its_variable_and_is_no_part_of_the_configuration() -> None:
    upstream = Upstream(name="a", base_url="http://h/v1", api_key_env="K")
    assert read_key(upstream, {"K": " sk-1234 \n"}) == "sk-1234"
    assert read_key(UPSTREAM, {}) is None


@pytest.mark.parametrize("environ", [{}, {"K": ""}, {"K": "sk-12\n34"}, {"K": "sk-123 4"}, {"K": "schlüssel-1234"}])
def test_a_key_that_cannot_be_used_is_refused_without_showing_it(environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="'K'") as error:
        read_key(Upstream(name="a", base_url="http://h/v1", api_key_env="K"), environ)
    assert "34" not in error.value.message


@pytest.mark.parametrize("wrong", [{"max_connections": 0}, {"max_model_len": -1}, {"http2": True}, {"base_url": "h"}])
def test_configurations_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Upstream(**{"name": "a", "base_url": "http://h/v1", **wrong})
    with pytest.raises(ConfigError):
        UpstreamTimeouts(gap_s=float("inf"))


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "17"}, 17),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": "Fri, 15 Jan 2027 08:01:40 GMT"}, 100),
        ({"retry-after": "Fri, 15 Jan 2020 08:00:00 GMT"}, 0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "nan"}, None),
        ({"retry-after-ms": "inf"}, None),
    ],
)
def test_retry_after_in_all_its_spellings(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, NOON) == seconds


@pytest.mark.parametrize(
    ("raw", "message", "param"),
    [
        ({"error": {"message": "m", "param": "p", "type": "t", "code": None}}, "m", "p"),
        ({"object": "error", "message": "m", "param": "p", "code": 400}, "m", "p"),
        ({"error": {"message": "m", "param": "body.temperature"}}, "m", "temperature"),
        ({"error": "m", "error_type": "validation"}, "m", None),
        ({"detail": [{"loc": ["body", "messages", 0], "msg": "m", "type": "x"}]}, "m", "messages.0"),
        ({"detail": "m"}, "m", None),
        ({"error": {"message": {"nested": 1}, "param": 5}}, "", "5"),
        ({"error": None}, "", None),
        ({"detail": [7]}, "", None),
        ([1], "", None),
        ("text", "", None),
    ],
)
def test_errors_are_read_in_every_servers_shape(raw: Any, message: str, param: str | None) -> None:
    said = complaint(json.dumps(raw).encode())
    assert (said.message, said.param) == (message, param)


def test_what_is_no_json_says_nothing() -> None:
    for raw in (b"", b"<html>", b"\xff", b"[" * 100_000):
        assert complaint(raw).message == ""


def refusal(status: int, message: str = "no", **error: Any) -> SignalboxError:
    raw = json.dumps({"error": {"message": message, **error}}).encode()
    return REFUSALS.of_status(status, {}, raw, NOON)


def test_the_callers_mistakes_are_the_callers() -> None:
    assert type(refusal(400)) is InvalidRequest
    assert type(refusal(422)) is InvalidRequest
    assert type(refusal(413)) is PayloadTooLarge
    assert type(refusal(400, code="context_length_exceeded")) is ContextLengthExceeded
    assert type(refusal(400, "This model's maximum context length is 5 tokens")) is ContextLengthExceeded
    assert type(refusal(400, type="exceed_context_size_error")) is ContextLengthExceeded


@pytest.mark.parametrize("status", [301, 302, 307, 401, 403, 404, 405])
def test_what_is_our_configuration_is_never_shown_as_the_callers(status: int) -> None:
    error = refusal(status, "Incorrect API key provided: sk-0123456789")
    assert type(error) is ConfigError
    assert "sk-" not in error.message


def test_an_account_without_credit_is_not_the_callers_budget() -> None:
    for error in (refusal(402), refusal(429, code="insufficient_quota")):
        assert isinstance(error, QueueFull)
        assert error.retry_after_s == 30


def test_messages_shown_hold_no_address_no_key_and_our_name_of_the_model() -> None:
    message = "org/inner at http://host.example:9/v1 (host.example:9) with Bearer abc and sk-0123456789 sk-abcdefgh: no"
    shown = refusal(400, message).message
    assert shown == "served at [upstream] ([upstream]) with [credential] and [upstream] [credential]: no"
    assert len(refusal(400, "x" * 5000).message) <= 1001
    plain = Refusals(Upstream(name="served", base_url="http://h/v1", upstream_model="fake"), None)
    said = plain.of_status(400, {}, b'{"error": {"message": "this fake engine has no logprobs"}}', NOON)
    assert said.message == "this fake engine has no logprobs"
    assert refusal(400, "org/inner-mini and my.org/inner are others").message.count("served") == 0


@pytest.mark.parametrize(
    ("said", "unary", "mode", "then"),
    [
        ({"message": "Unrecognized: stream_options"}, False, Mode.USAGE, Mode.PLAIN),
        ({"message": "Unrecognized: stream_options"}, True, Mode.USAGE, Mode.WHOLE),
        ({"message": "x", "param": "stream_options.include_usage"}, False, Mode.USAGE, Mode.PLAIN),
        ({"message": "x", "param": "stream"}, False, Mode.PLAIN, Mode.WHOLE),
        ({"message": "Streaming is not supported"}, False, Mode.USAGE, Mode.WHOLE),
        ({"message": "stream_options"}, False, Mode.PLAIN, None),
        ({"message": "x", "param": "stream"}, False, Mode.WHOLE, None),
        ({"message": "temperature is out of range"}, False, Mode.USAGE, None),
    ],
)
def test_refusals_of_the_way_we_ask_lead_to_a_plainer_one(
    said: dict[str, Any], unary: bool, mode: Mode, then: Mode | None
) -> None:
    assert plainer(mode, complaint(json.dumps({"error": said}).encode()), unary) is then


def test_a_body_with_half_a_surrogate_pair_can_be_sent() -> None:
    sent = body(UpstreamRequest(request_id="r", body={"prompt": "\ud83d"}), "m", Mode.WHOLE)
    assert json.loads(sent) == {"prompt": "\ud83d", "model": "m"}


# ------------------------------------------------------------------------------------------------------------ answers


def test_reasoning_refusals_and_unknown_fields_of_a_delta_are_handed_on() -> None:
    reading = answer()
    chunks = [
        chunk
        for delta in (
            {"role": "assistant", "content": "", "reasoning_content": "let "},
            {"content": None, "reasoning_content": "me see"},
            {"content": "yes"},
            {"refusal": "no"},
            {"annotations": [{"a": 1}]},
            {"annotations": [{"b": 2}]},
            {"audio": {"id": "x", "data": "AA"}},
            {"audio": {"id": "x", "data": "BB", "expires_at": 3}},
        )
        for chunk in reading.take(event(delta))
    ] + reading.take(event({}, finish_reason="stop"))
    assert [chunk.text for chunk in chunks if chunk.text] == ["yes"]
    assert chunks[0].delta == {"reasoning_content": "let "}
    whole = Assembled(1, chat=True)
    whole.add(chunks)
    assert whole.choices()[0]["message"] == {
        "role": "assistant",
        "content": "yes",
        "refusal": "no",
        "reasoning_content": "let me see",
        "annotations": [{"a": 1}, {"b": 2}],
        "audio": {"id": "x", "data": "AABB", "expires_at": 3},
    }


def test_empty_events_are_no_chunks_and_an_end_is_told_once() -> None:
    reading = answer()
    assert reading.take(event({"role": "assistant", "content": ""})) == []
    assert reading.take('{"choices": [], "prompt_filter_results": []}') == []
    assert reading.take("") == []
    assert not reading.begun
    [end] = reading.take(event({}, finish_reason="eos_token"))
    assert end.finish_reason == "stop"
    assert reading.complete
    assert reading.take(event({}, finish_reason="stop")) == []


def test_tool_calls_without_an_index_are_numbered_by_their_ids() -> None:
    reading = answer()
    pieces = [{"id": "a", "function": {"name": "f"}}, {"function": {"arguments": "1"}}, {"id": "b", "function": {}}]
    numbers = [
        call["index"]
        for piece in pieces
        for chunk in reading.take(event({"tool_calls": [piece]}))
        for call in chunk.delta["tool_calls"]
    ]
    assert numbers == [0, 0, 1]


def test_a_server_that_repeats_a_calls_name_does_not_double_it() -> None:
    whole = Assembled(1, chat=True)
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": "1"}}
    whole.add([UpstreamChunk(request_id="r", delta={"tool_calls": [call]})] * 2)
    [made] = whole.choices()[0]["message"]["tool_calls"]
    assert made == {"id": "a", "type": "function", "function": {"name": "f", "arguments": "11"}}


def test_a_piece_of_text_is_counted_as_a_token_at_the_least() -> None:
    """A caller who leaves early is charged by this count; engines that make short tokens would be paid too little."""
    reading = answer()
    for letter in "abc":
        reading.take(event({"content": letter}))
    assert reading.usage(estimate).completion_tokens == 3


def test_a_running_count_of_usage_is_read_to_its_end() -> None:
    reading = answer()
    for tokens in (1, 2):
        reading.take(json.dumps({"choices": [{"delta": {"content": "x"}}], "usage": {"prompt_tokens": 9,
                     "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 20}}}))  # fmt: skip
    usage = reading.usage(len)
    assert usage == UpstreamUsage(prompt_tokens=9, completion_tokens=2, cached_tokens=9)


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": 1, "completion_tokens": 2**53 - 1},
     {}, {"prompt_tokens": -1, "completion_tokens": 1}, {"prompt_tokens": True, "completion_tokens": 1},
     {"prompt_tokens": 1e30, "completion_tokens": 1}, None, [1]],
)  # fmt: skip
def test_usage_that_makes_no_sense_is_counted_instead(usage: Any) -> None:
    reading = answer()
    reading.take(json.dumps({"choices": [{"delta": {"content": "abc"}}], "usage": usage}))
    assert reading.usage(len) == UpstreamUsage(prompt_tokens=5, completion_tokens=3, estimated=True)


@pytest.mark.parametrize(
    "data",
    ["{", "[]", "7", '{"choices": 7}', '{"choices": [7]}', "[" * 100_000,
     '{"choices": [{"index": -1}]}', '{"choices": [{"index": "0"}]}',
     '{"choices": [{"delta": 7}]}', '{"choices": [{"delta": {"content": 7}}]}', '{"choices": [{"logprobs": 7}]}',
     '{"choices": [{"finish_reason": 7}]}', '{"choices": [{"delta": {"tool_calls": [7]}}]}',
     '{"choices": [{"delta": {"tool_calls": [{"index": 1e9}]}}]}'],
)  # fmt: skip
def test_events_that_make_no_sense_are_errors(data: str) -> None:
    with pytest.raises(UpstreamLost):
        answer().take(data)


def test_what_json_cannot_say_does_not_get_through() -> None:
    """Python servers write -Infinity; halves of surrogate pairs would break our own answer when it is encoded."""
    [chunk] = answer().take('{"choices": [{"delta": {"content": "a\\ud83d"}, "logprobs": {"x": -Infinity, "y": NaN}}]}')
    assert chunk.text == "a\ufffd"
    assert chunk.logprobs == {"x": -9999.0, "y": None}
    [chunk] = answer().take('{"choices": [{"delta": {"content": "\\ud83d\\ude00"}}]}')
    assert chunk.text == "\N{GRINNING FACE}"


def test_an_error_event_is_read_like_a_status() -> None:
    for code, kind in ((429, QueueFull), (401, ConfigError), (400, InvalidRequest), (503, UpstreamFailed)):
        with pytest.raises(kind):
            answer().take(json.dumps({"error": {"message": "no", "code": code}}))


def test_a_whole_answer_with_too_few_choices_is_an_error() -> None:
    with pytest.raises(NotSupported) as error:
        answer(n=2).take_whole('{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}')
    assert error.value.param == "n"
    reading = answer(n=2)
    reading.take(event({"content": "x"}, finish_reason="stop"))
    with pytest.raises(NotSupported):
        reading.take("[DONE]")


def test_a_call_told_in_both_forms_is_told_once() -> None:
    """llama-cpp-python 0.3 puts the older function_call next to tool_calls, and clients would run it twice."""
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": ""}}
    [chunk] = answer().take(event({"tool_calls": [call], "function_call": {"name": "f", "arguments": ""}}))
    assert chunk.delta == {"tool_calls": [call]}
    [chunk] = answer().take(event({"function_call": {"name": "f", "arguments": ""}}))
    assert chunk.delta == {"function_call": {"name": "f", "arguments": ""}}


# ------------------------------------------------------------------------------------------------------------- tokens


def test_counts_cover_messages_tools_images_and_prompts() -> None:
    def letters(text: str) -> int:
        return len(text)

    assert prompt_tokens({"prompt": "abcd"}, letters) == 4
    assert prompt_tokens({"prompt": ["ab", "cd"]}, letters) == 4
    assert prompt_tokens({"prompt": [1, 2, 3]}, letters) == 3
    assert prompt_tokens({"prompt": [[1, 2], [3]]}, letters) == 3
    plain = prompt_tokens({"messages": [{"role": "user", "content": "abcd"}]}, letters)
    assert plain == 3 + 3 + 4 + 4
    parts = [{"type": "text", "text": "abcd"}, {"type": "image_url", "image_url": {"url": "data:" + "x" * 9999}}]
    assert prompt_tokens({"messages": [{"role": "user", "content": parts}]}, letters) == plain + 85 + 8 * 170
    tools = [{"type": "function", "function": {"name": "f"}}]
    with_tools = {"messages": [{"role": "user", "content": "abcd"}], "tools": tools}
    assert prompt_tokens(with_tools, letters) == plain + len(json.dumps(tools, separators=(",", ":")))


def test_the_estimate_goes_by_bytes() -> None:
    assert [estimate(text) for text in ("", "a", "abcd", "日本")] == [0, 1, 2, 2]
    assert estimate("\ud83d") == 1


def test_long_texts_are_counted_in_pieces() -> None:
    seen: list[int] = []

    def encode(text: str) -> list[int]:
        seen.append(len(text))
        return [0] * len(text)

    assert counting(encode)("x" * 10_000) == 10_000
    assert max(seen) <= 4096


async def test_an_encoding_that_is_there_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiktoken's own encoder over a vocabulary of single bytes: the real ones have to be fetched."""
    import tiktoken

    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"\w+|\W", mergeable_ranks={bytes([b]): b for b in range(256)}, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"bytes": encoding}[name])
    assert (await counter("bytes"))("héllo <|endoftext|>") == 20


async def test_an_encoding_that_cannot_be_had_is_replaced_by_the_estimate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    held = threading.Event()
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding=lambda name: held.wait()))
    assert await counter("slow", timeout_s=0.05) is estimate
    held.set()
    await asyncio.sleep(0.05)
    monkeypatch.setitem(sys.modules, "tiktoken", SimpleNamespace(get_encoding={}.__getitem__))
    assert await counter("unknown") is estimate
    assert "unknown" in caplog.text
    assert await counter("estimate") is estimate
