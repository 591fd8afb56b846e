"""Traces as a collector gets them: whole, the caller's own, true in their times, without a word of anybody's text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from gateway.config import Retries, ServedModel
from replicas.fake import FakeSettings
from replicas.protocol import Chunk, ConfigError, EngineFault, EngineStats, FinishReason, ReplicaLost, Timing, Usage
from replicas.upstream_config import Upstream
from tests.gateway.collector import Collector, Seen
from tests.gateway.conftest import Gateway, StartGateway, make_key, running

SECRET = "Wunderkind"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": f"Tell me of the {SECRET}"}], "max_tokens": 6}
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-2] + "00"
TRACE_ID, CALLER_SPAN = CALLER.split("-")[1:3]
PHASES = ("queue", "prefill", "decode")
USAGE = Usage(prompt_tokens=9, completion_tokens=2)
TOKEN = [Chunk(request_id="x", text="a", token_ids=(1,), timing=Timing(queued_s=0.01, prefill_s=0.02))]
END = [Chunk(request_id="x", text="b", token_ids=(2,), finish_reason=FinishReason.STOP, usage=USAGE)]


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield collector


def post(gateway: Gateway, *, headers: dict[str, str] | None = None, **changes: object) -> httpx.Response:
    with gateway.http() as http:
        return http.post(
            "/v1/chat/completions", json={**CHAT, **changes}, headers={**gateway.headers, **(headers or {})}
        )


def assert_whole(spans: list[Seen], parent: str = "", late_s: float = 0.0) -> Seen:
    """One root, every other span below it, no child outside its parent's time but by `late_s` at its end; the root."""
    by_id = {span.span_id: span for span in spans}
    roots = [span for span in spans if span.parent not in by_id]
    assert [root.parent for root in roots] == [parent], [span.name for span in roots]
    for span in spans:
        assert span.began <= span.ended
        if span is not roots[0]:
            above = by_id[span.parent]
            assert above.began <= span.began, span.name
            assert span.ended <= above.ended + round(late_s * 1e9), span.name
    return roots[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("traceparent", [None, CALLER])
def test_one_request_is_one_whole_trace(
    start_gateway: StartGateway, collector: Collector, stream: bool, traceparent: str | None
) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=100, prefill_tokens_per_s=1000)])
    headers = {"x-request-id": "req-7"} | ({"traceparent": traceparent} if traceparent else {})
    sent = {"stream": stream, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert post(gateway, headers=headers, **sent).status_code == 200
    collector.wait(lambda spans: len(spans) == 6)
    root = assert_whole(collector.spans, CALLER_SPAN if traceparent else "")
    assert (root.name, root.kind) == ("chat fake", "server")
    if traceparent:
        assert {span.trace_id for span in collector.spans} == {TRACE_ID}
    below = {span.name: span for span in collector.spans if span is not root}
    attempt = below["chat fake"]
    assert attempt.kind == "client"
    assert attempt.parent == below["gateway"].parent == root.span_id
    assert {below[name].parent for name in PHASES} == {attempt.span_id}
    assert below["gateway"].events == ["auth", "read", "parse", "tokenise"]
    assert root.resource["service.name"] == "signalbox"
    for span in (root, attempt):
        assert span.attributes["gen_ai.operation.name"] == "chat"
        assert span.attributes["gen_ai.provider.name"] == "signalbox"
        assert span.attributes["gen_ai.request.model"] == span.attributes["gen_ai.response.model"] == "fake"
        assert span.attributes["gen_ai.request.max_tokens"] == 6
        assert span.attributes["gen_ai.request.temperature"] == 0.5
        assert span.attributes["gen_ai.response.finish_reasons"] == ["length"]
        assert span.attributes["gen_ai.usage.output_tokens"] == 6
        assert span.attributes["gen_ai.usage.input_tokens"] > 10
        assert span.attributes["gen_ai.response.id"].startswith("chatcmpl-")
        assert not span.error
    assert root.attributes["signalbox.request_id"] == "req-7"
    assert root.attributes["gen_ai.request.stream"] is stream
    assert root.attributes["http.response.status_code"] == 200
    assert attempt.attributes["signalbox.replica"] == "r0"
    assert attempt.attributes["server.port"] > 0
    assert below["prefill"].attributes["gen_ai.usage.input_tokens"] == root.attributes["gen_ai.usage.input_tokens"]


def test_phases_last_as_long_as_the_engine_took(start_gateway: StartGateway, collector: Collector) -> None:
    """Of two prompts computed one after another the second is queued while the first one is computed."""
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50, prefill_tokens_per_s=200)])
    with gateway.http() as http:
        body = {"model": "fake", "prompt": ["a" * 40, "b" * 40], "max_tokens": 11}
        assert http.post("/v1/completions", json=body).status_code == 200
    spans = collector.wait(lambda spans: len(spans) == 10)
    root = assert_whole(spans)
    assert root.name == "text_completion fake"
    assert root.attributes["gen_ai.usage.output_tokens"] == 22
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length", "length"]
    attempts = [span for span in spans if span.kind == "client"]
    lengths = sorted(
        tuple(one.seconds for name in PHASES for one in spans if one.name == name and one.parent == attempt.span_id)
        for attempt in attempts
    )
    assert lengths[0] == pytest.approx((0.0, 0.2, 0.2), abs=0.08)
    assert lengths[1] == pytest.approx((0.2, 0.2, 0.2), abs=0.08)


def test_a_lost_replica_is_an_attempt_of_its_own(start_gateway: StartGateway, collector: Collector, scripted) -> None:
    bad, good = scripted([ReplicaLost("it is gone")], "bad"), scripted([TOKEN, END], "good")
    good.status = replace(good.status, stats=EngineStats(num_requests_running=50, num_requests_waiting=50))
    bad.status = replace(bad.status, stats=EngineStats())
    gateway = start_gateway(connections=[bad, good])
    while not bad.requests:
        collector.spans.clear()
        assert post(gateway).status_code == 200
        collector.wait(lambda spans: any(span.kind == "server" for span in spans))
    root = assert_whole(collector.spans)
    assert not root.error
    first, second = sorted((s for s in collector.spans if s.kind == "client"), key=lambda span: span.began)
    assert (first.attributes["signalbox.replica"], first.attributes["signalbox.attempt"]) == ("bad", 1)
    assert (first.attributes["error.type"], first.error, first.message) == ("ReplicaLost", True, "it is gone")
    assert (second.attributes["signalbox.replica"], second.attributes["signalbox.attempt"]) == ("good", 2)
    assert not second.error
    assert root.attributes["gen_ai.usage.output_tokens"] == second.attributes["gen_ai.usage.output_tokens"] == 2


def test_a_fault_in_the_middle_of_a_stream_marks_attempt_and_root(
    start_gateway: StartGateway, collector: Collector, scripted
) -> None:
    gateway = start_gateway(connections=[scripted([TOKEN, 0.03, EngineFault("the engine failed")])])
    with pytest.raises(httpx.RemoteProtocolError):
        post(gateway, stream=True)
    spans = collector.wait(lambda spans: any(span.kind == "server" for span in spans))
    root = assert_whole(spans)
    (attempt,) = (span for span in spans if span.kind == "client")
    assert root.error
    assert attempt.error
    assert root.attributes["error.type"] == attempt.attributes["error.type"] == "EngineFault"
    assert root.attributes["http.response.status_code"] == 200  # what was sent before
    decode = next(span for span in spans if span.name == "decode")
    assert decode.seconds >= 0.03


def test_a_client_that_hangs_up_ends_the_trace(start_gateway: StartGateway, collector: Collector) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50)])
    body = {**CHAT, "max_tokens": 4000, "stream": True}
    with gateway.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as answer:
        next(answer.iter_lines())
    spans = collector.wait(lambda spans: any(span.kind == "server" for span in spans))
    root = assert_whole(spans)
    by_name = {span.name: span for span in spans if span is not root}
    assert (root.error, root.attributes["error.type"]) == (True, "ClientGone")
    assert root.attributes["http.response.status_code"] == 499
    attempt = by_name["chat fake"]
    assert (attempt.error, attempt.attributes["error.type"]) == (True, "abandoned")
    assert attempt.attributes["gen_ai.usage.output_tokens"] >= 1  # what was billed
    assert set(PHASES) <= by_name.keys()


@pytest.mark.parametrize(
    ("headers", "changes", "status", "failure"),
    [
        ({"authorization": "Bearer sk-nobody"}, {}, 401, "AuthenticationFailed"),
        ({}, {"model": f"no-{SECRET}-model"}, 404, "ModelNotFound"),
        ({}, {"temperature": -1}, 400, "InvalidRequest"),
    ],
)
def test_a_callers_mistake_is_no_error_of_ours(
    start_gateway: StartGateway, collector: Collector, headers: dict, changes: dict, status: int, failure: str
) -> None:
    gateway = start_gateway()
    assert post(gateway, headers=headers, **changes).status_code == status
    spans = collector.trace("chat", 2)
    assert (spans["chat"].error, spans["chat"].attributes["error.type"]) == (False, failure)
    assert spans["gateway"].parent == spans["chat"].span_id


def test_no_text_of_anybody_is_in_a_trace(start_gateway: StartGateway, collector: Collector) -> None:
    gateway = start_gateway()
    answer = post(gateway, stop=[f"{SECRET}s"], user=SECRET).json()["choices"][0]["message"]["content"]
    collector.wait(lambda spans: len(spans) == 6)
    sent = b"".join(collector.bodies)
    assert SECRET.encode() not in sent
    assert answer.strip().encode() not in sent
    assert gateway.key.encode() not in sent


def test_an_upstream_that_is_a_signalbox_continues_the_trace(
    start_gateway: StartGateway, collector: Collector, tmp_path
) -> None:
    far = start_gateway(replicas=[FakeSettings(tokens_per_s=100)])
    (tmp_path / "near").mkdir()
    upstream = Upstream(name="far", base_url=f"{far.base_url}/v1", upstream_model="fake", tokenizer="estimate")
    config = replace(
        far.config_of_another(),
        models=(ServedModel(name="far"),),
        upstreams=(replace(upstream, api_key_env="FAR_KEY"),),
        database_url=f"sqlite:///{tmp_path}/near/signalbox.db",
        state_dir=str(tmp_path / "near"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAR_KEY", far.key)
        with running(config, make_key(config, "near")) as near:
            answer = post(near, headers={"traceparent": CALLER, "tracestate": "vendor=1"}, model="far", stream=True)
            assert answer.status_code == 200
    spans = collector.wait(lambda spans: len(spans) == 9)
    root = assert_whole(spans, CALLER_SPAN, late_s=0.1)  # the far gateway is not done when its last byte arrives
    assert root.name == "chat far"
    assert {span.state for span in spans} == {"vendor=1"}
    (asking,) = (span for span in spans if span.name == "chat far" and span.kind == "client")
    (far_root,) = (span for span in spans if span.name == "chat fake" and span.kind == "server")
    assert far_root.parent == asking.span_id
    assert asking.attributes["gen_ai.provider.name"] == "openai"
    assert asking.attributes["gen_ai.usage.output_tokens"] == 6
    assert asking.attributes["gen_ai.response.finish_reasons"] == ["length"]
    assert asking.attributes["server.port"] == int(far.base_url.rpartition(":")[2])


def test_what_the_sampler_leaves_out_is_not_sent(
    start_gateway: StartGateway, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    gateway = start_gateway()
    assert post(gateway).status_code == 200
    assert post(gateway, headers={"traceparent": UNSAMPLED}).status_code == 200
    assert post(gateway, headers={"traceparent": CALLER}).status_code == 200  # whose caller records
    collector.wait(lambda spans: len(spans) == 6)
    time.sleep(0.1)
    assert {span.trace_id for span in collector.spans} == {TRACE_ID}
    assert len(collector.spans) == 6


@pytest.mark.parametrize(
    "garbage", ["", "00-0-0-01", "ff" + CALLER[2:], CALLER.replace("b7ad6b7169203331", "0" * 16), "é"]
)
def test_a_traceparent_that_is_none_begins_a_trace(
    start_gateway: StartGateway, collector: Collector, garbage: str
) -> None:
    gateway = start_gateway()
    with gateway.http() as http:
        headers = [*gateway.headers.items(), ("traceparent", garbage.encode("latin-1"))]
        assert http.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 200
    collector.wait(lambda spans: len(spans) == 6)
    assert_whole(collector.spans)


def test_what_waits_is_sent_when_the_gateway_stops(
    start_gateway: StartGateway, collector: Collector, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    first = start_gateway()
    with running(first.config_of_another(), first.key) as gateway:
        gateway.loop.call_soon_threadsafe(gateway.directory.publish, [one.server.address for one in first.replicas])
        gateway.wait_ready(1)
        assert post(gateway).status_code == 200
        assert not collector.spans
    assert len(collector.spans) == 6


@pytest.mark.parametrize("broken", ["refuses", "sleeps", "gone"])
def test_a_broken_collector_costs_traces_and_nothing_else(
    start_gateway: StartGateway, collector: Collector, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr("gateway.tracing._FLUSH_S", 0.3)
    if broken == "gone":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    collector.status, collector.delay_s = {"refuses": (503, 0.0), "sleeps": (200, 0.6), "gone": (200, 0.0)}[broken]
    first = start_gateway()
    with running(first.config_of_another(), first.key) as gateway:
        gateway.loop.call_soon_threadsafe(gateway.directory.publish, [one.server.address for one in first.replicas])
        gateway.wait_ready(1)
        assert post(gateway).status_code == 200
        began = time.monotonic()
    assert time.monotonic() - began < 5


def test_nothing_of_opentelemetry_runs_unless_it_is_configured(start_gateway: StartGateway, scripted) -> None:
    gateway = start_gateway()
    assert post(gateway, headers={"traceparent": CALLER}).status_code == 200
    assert gateway.app.state.gateway.running.services.tracing is None
    assert not [thread for thread in threading.enumerate() if "Otel" in thread.name]


@pytest.mark.parametrize(
    "asks",
    [{"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, {"OTEL_TRACES_EXPORTER": "zipkin"}],
    ids=lambda asks: next(iter(asks)),
)
def test_what_is_not_spoken_is_refused_at_start(asks: dict[str, str]) -> None:
    from gateway.tracing import from_environment

    with pytest.raises(ConfigError, match=next(iter(asks.values()))):
        from_environment(asks, "gw")


@pytest.fixture
def failing() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that answers 500 to everything: its base URL, and the headers of what it was asked."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append({name.lower(): value for name, value in self.headers.items()})
            self.send_response(500)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
        server.shutdown()
        thread.join()


def start_with_fallback(start_gateway: StartGateway, base_url: str) -> Gateway:
    upstream = Upstream(name="far", base_url=base_url, upstream_model="x", tokenizer="estimate")
    gateway = start_gateway(
        models=(ServedModel(name="fake"), ServedModel(name="far")),
        upstreams=(upstream,),
        retries=Retries(attempts=2, wait_s=1),
    )
    with gateway.register() as register:
        register.publish("fallbacks: {far: [fake]}", author="test")
    return gateway


def test_a_fallback_is_an_attempt_after_those_that_failed(
    start_gateway: StartGateway, collector: Collector, failing: tuple[str, list[dict[str, str]]]
) -> None:
    gateway = start_with_fallback(start_gateway, failing[0])
    assert post(gateway, model="far").json()["model"] == "fake"
    spans = collector.wait(lambda spans: any(span.kind == "server" for span in spans))
    root = assert_whole(spans)
    attempts = sorted((span for span in spans if span.kind == "client"), key=lambda span: span.began)
    assert [span.name for span in attempts] == ["chat far", "chat far", "chat fake"]
    assert [span.attributes["signalbox.role"] for span in attempts] == ["answer", "answer", "fallback"]
    assert [span.error for span in attempts] == [True, True, False]
    assert (root.name, root.attributes["gen_ai.response.model"], root.error) == ("chat far", "fake", False)
    told = [headers["traceparent"].split("-") for headers in failing[1]]
    assert [one[:3] for one in told] == [["00", root.trace_id, span.span_id] for span in attempts[:2]]
    assert all(int(one[3], 16) & 1 for one in told)  # recorded


def test_without_tracing_an_upstream_is_told_the_callers_own_trace(
    start_gateway: StartGateway, failing: tuple[str, list[dict[str, str]]]
) -> None:
    gateway = start_with_fallback(start_gateway, failing[0])
    assert post(gateway, model="far", headers={"traceparent": CALLER, "tracestate": "vendor=1"}).status_code == 200
    assert {(headers["traceparent"], headers["tracestate"]) for headers in failing[1]} == {(CALLER, "vendor=1")}
