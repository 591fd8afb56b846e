"""The bytes of answers, written by hand in the gateway, held to OpenAI's shapes; and what is told beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.metrics import Histogram
from gateway.requests import ChatRequest
from gateway.schemas import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, Health, ModelList
from replicas.protocol import Chunk, FinishReason, TokenLogprob, Usage

MESSAGES = [{"role": "user", "content": "Hello"}]


def token(text: bytes, logprob: float = -0.5, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    return TokenLogprob(len(text), text, logprob, top)


def chunk(text: str, *logprobs: TokenLogprob, index: int = 0, **more: Any) -> Chunk:
    return Chunk(request_id="x", index=index, text=text, token_ids=(1,), logprobs=logprobs, **more)


USAGE = Usage(prompt_tokens=7, completion_tokens=4, cached_tokens=5)
# "a", then "é" in two tokens of one byte each, then the end-of-turn token, which has no text
TORN = [
    [chunk("a", token(b"a", -0.1, (token(b"a", -0.1), token(b"\xc3", -3.0))))],
    [chunk("", token(b"\xc3", float("-inf")))],
    [chunk("é", token(b"\xa9"))],
    [chunk("", token(b"<|im_end|>", -0.2), finish_reason=FinishReason.STOP, usage=USAGE)],
]


def events(gateway, path: str, body: dict[str, Any]) -> list[Any]:
    """The JSON of every event; the stream must end in [DONE]."""
    with gateway.http() as http, http.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


@pytest.fixture
def torn(start_gateway, scripted):
    return start_gateway(connections=[scripted(TORN)])


def test_a_chat_with_logprobs_shows_every_token_with_its_bytes(torn) -> None:
    with torn.http() as http:
        body = {"model": "fake", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
        answer = ChatCompletion.model_validate_json(http.post("/v1/chat/completions", json=body).content)
    choice = answer.choices[0]
    assert choice.message.content == "aé"
    assert choice.finish_reason == "stop"
    assert answer.usage.model_dump() == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    content = choice.logprobs.content
    assert [entry.token for entry in content] == ["a", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    assert b"".join(bytes(entry.bytes) for entry in content) == "aé<|im_end|>".encode()
    assert content[1].logprob == -9999.0
    assert [(top.token, top.logprob) for top in content[0].top_logprobs] == [("a", -0.1), ("bytes:\\xc3", -3.0)]


def test_a_completion_with_logprobs_counts_offsets_in_characters(torn) -> None:
    with torn.http() as http:
        body = {"model": "fake", "prompt": "x", "logprobs": 2}
        answer = Completion.model_validate_json(http.post("/v1/completions", json=body).content)
    logprobs = answer.choices[0].logprobs
    assert answer.choices[0].text == "aé"
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"]
    assert logprobs.text_offset == [0, 1, 1, 2]
    assert logprobs.top_logprobs[0] == {"a": -0.1, "bytes:\\xc3": -3.0}
    assert logprobs.token_logprobs == [-0.1, -9999.0, -0.5, -0.2]


@pytest.mark.parametrize("usage", [False, True])
def test_a_streamed_chat_loses_no_logprob_and_tears_no_character(torn, usage: bool) -> None:
    body = {"model": "fake", "messages": MESSAGES, "logprobs": True}
    if usage:
        body["stream_options"] = {"include_usage": True}
    raw = events(torn, "/v1/chat/completions", body)
    chunks = [ChatCompletionChunk.model_validate(event) for event in raw]
    if usage:
        last, raw_last = chunks.pop(), raw[-1]
        assert last.choices == []
        assert last.usage.total_tokens == 11
        assert all("usage" in event and event["usage"] is None for event in raw[:-1])
        assert raw_last["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
    else:
        assert all("usage" not in event for event in raw)
    deltas = [each.choices[0].delta.content for each in chunks]
    assert deltas == ["", "a", "é", None]
    assert chunks[0].choices[0].delta.role == "assistant"
    tokens = [[t.token for t in c.choices[0].logprobs.content] if c.choices[0].logprobs else [] for c in chunks]
    assert tokens == [[], ["a"], ["bytes:\\xc3", "bytes:\\xa9"], ["<|im_end|>"]]
    assert [c.choices[0].finish_reason for c in chunks] == [None, None, None, "stop"]


def test_a_streamed_completion_keeps_its_offsets_across_events(torn) -> None:
    raw = events(torn, "/v1/completions", {"model": "fake", "prompt": "x", "logprobs": 0})
    chunks = [CompletionChunk.model_validate(event) for event in raw]
    assert [each.choices[0].text for each in chunks] == ["a", "é", ""]
    assert [each.choices[0].logprobs.text_offset for each in chunks] == [[0], [1, 1], [2]]


def test_text_that_comes_with_the_end_is_not_lost(start_gateway, scripted) -> None:
    script = [[chunk('quote " and \n', index=0), chunk("b", index=1, finish_reason=FinishReason.LENGTH)]]
    script.append([chunk("end", finish_reason=FinishReason.STOP, usage=USAGE)])
    gateway = start_gateway(connections=[scripted(script)])
    raw = events(gateway, "/v1/chat/completions", {"model": "fake", "messages": MESSAGES, "n": 2})
    texts, reasons = ["", ""], [None, None]
    for event in raw:
        choice = event["choices"][0]
        assert choice["finish_reason"] is None or not choice["delta"].get("content")
        texts[choice["index"]] += choice["delta"].get("content") or ""
        reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
    assert texts == ['quote " and \nend', "b"]
    assert reasons == ["stop", "length"]


def test_sampling_reaches_the_engine_as_it_was_asked_for(start_gateway, scripted) -> None:
    connection = scripted(TORN)
    gateway = start_gateway(connections=[connection])
    body = {
        "model": "fake",
        "messages": MESSAGES,
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "n": 1,
        "seed": -5,
        "stop": ["x", "y"],
        "stop_token_ids": [3],
        "logit_bias": {"5": -100, "6": 1.5},
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "min_tokens": 2,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 3,
    }
    with gateway.http() as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    request = connection.requests[0]
    sampling = request.sampling
    assert request.tenant == "test"
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_p) == (9, 2, 0.5, 0.9)
    assert (sampling.top_k, sampling.min_p, sampling.seed, sampling.n) == (0, 0.1, -5, 1)
    assert (sampling.stop, sampling.stop_token_ids) == (("x", "y"), (3,))
    assert sampling.logit_bias == ((5, -100.0), (6, 1.5))
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.2)
    assert (sampling.ignore_eos, sampling.logprobs) == (True, 3)
    assert bytes(token for token in request.prompt_token_ids if token < 256) == b"user\nHello\nassistant\n"


def test_metrics_parse_and_name_engine_and_gateway_figures(module_gateway) -> None:
    with module_gateway.http() as http:
        for _ in range(3):
            http.post("/v1/completions", json={"model": "fake", "prompt": "hi", "max_tokens": 4})
        for path in ("/v1/a", "/v1/b", "/v1/models/x", "/v1/models/y"):
            http.get(path)
        module_gateway.wait_until(lambda: sample(http, "signalbox_generation_tokens_total") >= 12)
        families = {family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)}
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries"):
        [one] = families[f"signalbox_{name}"].samples
        assert one.labels == {"model_name": "fake", "replica": "r0"}
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert families[f"signalbox_{name}"].type == "histogram"
    routes = {one.labels["route"] for one in families["signalbox_http_requests"].samples}
    assert routes >= {"/v1/completions", "unmatched", "/v1/models/{model:path}"}
    assert not routes & {"/v1/a", "/v1/models/x"}


def sample(http, name: str) -> float:
    families = text_string_to_metric_families(http.get("/metrics").text)
    return sum(one.value for family in families for one in family.samples if one.name == name)


def test_a_histogram_counts_a_bound_into_its_own_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 3.0):
        histogram.observe(value)
    assert histogram.buckets() == ([("1.0", 2), ("2.0", 4), ("+Inf", 5)], 8.0)


def test_the_openapi_document_describes_the_raw_endpoints_too(module_gateway) -> None:
    with module_gateway.http() as http:
        document = http.get("/openapi.json").json()
    assert set(document["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    admin = [one for path, ways in document["paths"].items() if path.startswith("/admin/") for one in ways.values()]
    assert {str(one["security"]) for one in admin} == {"[{'admin': []}]"}
    post = document["paths"]["/v1/chat/completions"]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
    schema = document["components"]["schemas"]["ChatRequest"]
    assert set(schema["properties"]) == set(ChatRequest.model_fields)
    assert schema["additionalProperties"] is False
    assert {"model", "messages"} == set(schema["required"])
    references = [part.split('"')[0] for part in json.dumps(document).split('"#/components/schemas/')[1:]]
    assert set(references) <= set(document["components"]["schemas"])


def test_health_and_models_have_their_documented_shapes(module_gateway) -> None:
    with module_gateway.http() as http:
        health = Health.model_validate_json(http.get("/health").content)
        models = ModelList.model_validate_json(http.get("/v1/models").content)
    assert health.model_dump() == {"status": "ok", "ready_replicas": {"fake": 1}}
    assert [(model.id, model.root, model.max_model_len) for model in models.data] == [
        ("fake", "fake", 8192),
        ("gpt-fake", "fake", 8192),
    ]
