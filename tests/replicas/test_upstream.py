"""An upstream connection against a real server that misbehaves; after every test nothing may be left open."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from replicas.mock_upstream import MockUpstream
from replicas.protocol import (
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    InvalidRequest,
    QueueFull,
    ReplicaLost,
    SignalboxError,
    Unavailable,
)
from replicas.upstream import UpstreamConnection
from replicas.upstream_config import Upstream, UpstreamTimeouts
from replicas.upstream_errors import UpstreamBusy, UpstreamFailed, UpstreamLost, UpstreamTimeout
from replicas.upstream_messages import Assembled, UpstreamChunk, UpstreamRequest, UpstreamUsage

KEY = "sk-very-secret-key-0123456789"


async def eventually(condition: Any, *, within_s: float = 2.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


@dataclass
class Bench:
    """A mock and the connections to it. `settled` collects what every request was settled with."""

    mock: MockUpstream
    connections: list[UpstreamConnection] = field(default_factory=list)
    settled: list[UpstreamUsage] = field(default_factory=list)
    numbers: int = 0

    async def connect(self, model: str, *, count: Any = None, **fields: Any) -> UpstreamConnection:
        timeouts = UpstreamTimeouts(
            **{"connect_s": 2.0, "first_token_s": 5.0, "gap_s": 5.0, "keep_alive_s": 1.0, **fields.pop("timeouts", {})}
        )
        upstream = Upstream(
            **{
                "name": "served",
                "base_url": self.mock.base_url,
                "upstream_model": model,
                "api_key_env": "KEY",
                "tokenizer": "estimate",
                "timeouts": timeouts,
                **fields,
            }
        )
        conn = await UpstreamConnection.connect(upstream, environ={"KEY": KEY}, count=count)
        self.connections.append(conn)
        return conn

    def request(self, *, prompt: Any = None, unary: bool = False, **fields: Any) -> UpstreamRequest:
        self.numbers += 1
        own = {name: fields.pop(name) for name in ("deadline", "traceparent", "tracestate") if name in fields}
        body: dict[str, Any] = {"model": "served", "stream": not unary}
        body |= {"messages": [{"role": "user", "content": "hi"}]} if prompt is None else {"prompt": prompt}
        return UpstreamRequest(
            request_id=f"r{self.numbers}", body=body | fields, prompt_tokens=7, unary=unary, **own
        )  # fmt: skip

    async def ask(self, conn: UpstreamConnection, **fields: Any) -> list[UpstreamChunk]:
        async with aclosing(conn.generate(self.request(**fields), settle=self.settled.append)) as stream:
            return [chunk async for ready in stream for chunk in ready]

    async def fails(self, conn: UpstreamConnection, **fields: Any) -> tuple[SignalboxError, str]:
        """The error, and the text that was shown before it."""
        text = ""
        try:
            async with aclosing(conn.generate(self.request(**fields), settle=self.settled.append)) as stream:
                async for ready in stream:
                    text += "".join(chunk.text for chunk in ready)
        except SignalboxError as error:
            return error, text
        pytest.fail("it ended as if all were well")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench(MockUpstream())
    await bench.mock.start()
    yield bench
    for conn in bench.connections:
        assert conn.in_flight == 0
        await conn.aclose()
        assert conn.open_connections == 0
    await eventually(lambda: bench.mock.open_connections == 0 and bench.mock.in_progress == 0)
    await bench.mock.stop()
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})


def text(chunks: list[UpstreamChunk], index: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.index == index)


# ------------------------------------------------------------------------------------------------------- right answers


async def test_a_chat_is_streamed_with_its_end_and_the_upstreams_own_usage(bench: Bench) -> None:
    chunks = await bench.ask(await bench.connect("normal:tokens=3"))
    assert text(chunks) == "w0 w1 w2 "
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["length"]
    usage = chunks[-1].usage
    assert [chunk.terminal for chunk in chunks].count(True) == 1
    assert usage == UpstreamUsage(prompt_tokens=4, completion_tokens=3, cached_tokens=2)
    assert bench.settled == [usage]


async def test_the_first_chunk_shows_something(bench: Bench) -> None:
    """The gateway commits to 200 with it; an opening role would commit it to a server that then hangs."""
    chunks = await bench.ask(await bench.connect("normal"))
    assert chunks[0].text == "w0 "
    assert chunks[0].delta == {"content": "w0 "}


async def test_what_goes_out_is_the_callers_body_under_the_upstreams_name(bench: Bench) -> None:
    conn = await bench.connect("normal")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    await bench.ask(
        conn, tools=tools, tool_choice="auto", temperature=0.5, unary=True, traceparent=trace, tracestate="a=b"
    )
    [got] = bench.mock.received
    assert got.path == "/v1/chat/completions"
    assert got.body == {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "normal",
        "stream": True,
        "stream_options": {"include_usage": True},
        "tools": tools,
        "tool_choice": "auto",
        "temperature": 0.5,
    }
    assert got.headers["authorization"] == f"Bearer {KEY}"
    assert got.headers["traceparent"] == trace
    assert got.headers["tracestate"] == "a=b"
    assert got.headers["x-client-request-id"] == "r1"
    assert got.headers["accept-encoding"] == "identity"


async def test_a_traceparent_that_is_none_is_not_sent_on(bench: Bench) -> None:
    await bench.ask(await bench.connect("normal"), traceparent="00-zz\r\nx-evil: 1", tracestate="a=b")
    assert not {"traceparent", "tracestate", "x-evil"} & set(bench.mock.received[0].headers)


async def test_tool_calls_come_as_they_were_sent_and_assemble_to_whole_ones(bench: Bench) -> None:
    conn = await bench.connect("tool-calls")
    chunks = await bench.ask(conn)
    deltas = [chunk.choice(chat=True)["delta"] for chunk in chunks if chunk.delta]
    assert deltas[0] == {
        "tool_calls": [
            {"index": 0, "id": "call_a", "type": "function", "function": {"name": "weather", "arguments": ""}}
        ]
    }
    assert deltas[1] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}
    whole = Assembled(1, chat=True)
    whole.add(chunks)
    assert whole.choices() == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": [
                    {
                        "id": "call_a",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                    },
                    {"id": "call_b", "type": "function", "function": {"name": "time", "arguments": "{}"}},
                ],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        }
    ]
    numbered = await bench.ask(await bench.connect("tool-calls:index=no"))
    assert [chunk.delta for chunk in numbered] == [chunk.delta for chunk in chunks]


async def test_logprobs_are_passed_on_and_joined(bench: Bench) -> None:
    chunks = await bench.ask(await bench.connect("normal:tokens=2"), logprobs=True)
    whole = Assembled(1, chat=True)
    whole.add(chunks)
    [choice] = whole.choices()
    assert [token["token"] for token in choice["logprobs"]["content"]] == ["w0 ", "w1 "]


async def test_several_prompts_and_choices_end_when_all_of_them_have(bench: Bench) -> None:
    chunks = await bench.ask(await bench.connect("normal:tokens=2"), prompt=["a", "b"], n=2)
    assert bench.mock.received[0].path == "/v1/completions"
    assert [text(chunks, index) for index in range(4)] == ["w0 w1 "] * 4
    assert sum(chunk.finish_reason is not None for chunk in chunks) == 4
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


@pytest.mark.parametrize("ends", ["crlf", "cr", "lf"])
async def test_oddly_written_streams_are_read_right(bench: Bench, ends: str) -> None:
    chunks = await bench.ask(await bench.connect(f"odd-framing:ends={ends},tokens=2"))
    assert text(chunks) == "w0 w1 é\N{GRINNING FACE}"
    assert chunks[-2].finish_reason == "stop"


async def test_usage_that_is_not_told_is_counted_and_marked(bench: Bench) -> None:
    conn = await bench.connect("normal:tokens=3,usage=no", count=lambda text: len(text.split()))
    usage = (await bench.ask(conn))[-1].usage
    assert usage == UpstreamUsage(prompt_tokens=7, completion_tokens=3, estimated=True)


@pytest.mark.parametrize("behaviour", ["whole:tokens=3", "refuses:field=stream,tokens=3"])
async def test_a_server_that_cannot_stream_answers_all_the_same(bench: Bench, behaviour: str) -> None:
    conn = await bench.connect(behaviour)
    for _ in range(2):
        chunks = await bench.ask(conn)
        assert text(chunks) == "w0 w1 w2 "
        assert chunks[-1].usage is not None
        assert not chunks[-1].usage.estimated
    assert "stream" not in bench.mock.received[-1].body  # learnt: not asked for again


async def test_stream_options_that_are_refused_are_left_out_from_then_on(bench: Bench) -> None:
    conn = await bench.connect("refuses:field=stream_options")
    for _ in range(2):
        chunks = await bench.ask(conn)
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.estimated
    assert [(got.body.get("stream"), "stream_options" in got.body) for got in bench.mock.received] == [
        (True, True),
        (True, False),
        (True, False),
    ]


async def test_a_unary_caller_of_a_server_without_stream_options_gets_exact_usage(bench: Bench) -> None:
    chunks = await bench.ask(await bench.connect("refuses:field=stream_options"), unary=True)
    assert chunks[-1].usage is not None
    assert not chunks[-1].usage.estimated


async def test_connections_are_used_again_and_idle_ones_are_closed(bench: Bench) -> None:
    conn = await bench.connect("normal", timeouts={"keep_alive_s": 0.2})
    for _ in range(5):
        await bench.ask(conn)
    assert bench.mock.connections == 1
    await eventually(lambda: bench.mock.open_connections == 0)  # without another request
    assert conn.open_connections == 0
    await bench.ask(conn)
    assert bench.mock.connections == 2


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_connection_that_was_closed_while_idle_costs_no_request(bench: Bench, how: str) -> None:
    """The server closes just when the next request goes out; a single upstream has nowhere else to send it."""
    conn = await bench.connect(f"closes-idle:how={how}")
    for _ in range(3):
        assert text(await bench.ask(conn))
    assert bench.mock.connections == 3


async def test_a_fresh_connection_that_breaks_is_not_tried_again(bench: Bench) -> None:
    error, _ = await bench.fails(await bench.connect("reset:after=-1"))
    assert isinstance(error, UpstreamLost)
    assert len(bench.mock.received) == 1


# ------------------------------------------------------------------------------------------------- hangs and deadlines


@pytest.mark.parametrize("behaviour", ["hang-before-headers", "hang-before-first-token", "ping-forever"])
async def test_no_first_token_in_time_is_a_timeout_and_lets_go_of_the_upstream(bench: Bench, behaviour: str) -> None:
    error, shown = await bench.fails(await bench.connect(behaviour, timeouts={"first_token_s": 0.2}))
    assert isinstance(error, UpstreamTimeout)
    assert (error.phase, shown) == ("first_token", "")
    assert bench.settled == [UpstreamUsage(prompt_tokens=0, completion_tokens=0)]
    await eventually(lambda: bench.mock.open_connections == 0)
    assert bench.mock.abandoned == 1


@pytest.mark.parametrize("behaviour", ["hang-mid-stream:after=2", "ping-forever:after=2"])
async def test_a_gap_that_is_too_long_is_a_timeout_and_what_came_is_settled(bench: Bench, behaviour: str) -> None:
    conn = await bench.connect(behaviour, timeouts={"gap_s": 0.2}, count=lambda text: len(text.split()))
    error, shown = await bench.fails(conn)
    assert isinstance(error, UpstreamTimeout)
    assert (error.phase, shown) == ("gap", "w0 w1 ")
    assert bench.settled == [UpstreamUsage(prompt_tokens=7, completion_tokens=2, estimated=True)]
    await eventually(lambda: bench.mock.open_connections == 0)


async def test_a_slow_reader_is_not_the_upstreams_gap(bench: Bench) -> None:
    conn = await bench.connect("normal:tokens=3,gap_ms=30", timeouts={"gap_s": 0.15})
    seen = 0
    async with aclosing(conn.generate(bench.request())) as stream:
        async for ready in stream:
            await asyncio.sleep(0.3 if seen == 0 else 0)
            seen += len(ready)
    assert seen == 5


async def test_slow_tokens_that_keep_coming_are_no_timeout(bench: Bench) -> None:
    timeouts = {"first_token_s": 0.3, "gap_s": 0.3}
    assert text(await bench.ask(await bench.connect("normal:tokens=6,gap_ms=100", timeouts=timeouts)))


@pytest.mark.parametrize("behaviour", ["hang-before-headers", "hang-before-first-token", "hang-mid-stream",
                                       "normal:tokens=100000"])  # fmt: skip
async def test_the_deadline_ends_a_request_wherever_it_is(bench: Bench, behaviour: str) -> None:
    conn = await bench.connect(behaviour)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    error, _ = await bench.fails(conn, deadline=begin + 0.2)
    assert isinstance(error, DeadlineExceeded)
    assert 0.2 <= loop.time() - begin < 1
    await eventually(lambda: bench.mock.open_connections == 0)


async def test_a_deadline_that_has_passed_sends_nothing(bench: Bench) -> None:
    error, _ = await bench.fails(await bench.connect("normal"), deadline=asyncio.get_running_loop().time())
    assert isinstance(error, DeadlineExceeded)
    assert not bench.mock.received


async def test_a_caller_who_leaves_closes_the_upstreams_connection_at_once(bench: Bench) -> None:
    conn = await bench.connect("normal:tokens=100000,gap_ms=2", count=lambda text: len(text.split()))
    async with aclosing(conn.generate(bench.request(), settle=bench.settled.append)) as stream:
        first = await anext(stream)
    assert conn.in_flight == conn.open_connections == 0
    await eventually(lambda: bench.mock.open_connections == 0)
    assert bench.mock.abandoned == 1
    usage = UpstreamUsage(prompt_tokens=7, completion_tokens=len(first), estimated=True)
    assert bench.settled == [usage]


async def test_callers_who_leave_at_any_moment_leave_nothing_behind(bench: Bench) -> None:
    rng = random.Random(4)
    conn = await bench.connect("normal:tokens=10,gap_ms=2,first_ms=3")

    async def leave_early() -> None:
        try:
            async with asyncio.timeout(rng.random() * 0.04):
                await bench.ask(conn)
        except TimeoutError:
            pass

    for _ in range(10):
        await asyncio.gather(*(leave_early() for _ in range(20)))
    assert conn.in_flight == 0
    assert len(bench.settled) == 200
    await eventually(lambda: bench.mock.in_progress == 0 and bench.mock.open_connections == conn.open_connections)
    assert text(await bench.ask(conn))


# ------------------------------------------------------------------------------------------------------ broken answers


@pytest.mark.parametrize("behaviour", ["reset:after=2", "close:after=2", "ended:after=2", "until-closed:cut=1,after=2"])
async def test_a_cut_stream_is_an_error_and_never_a_clean_end(bench: Bench, behaviour: str) -> None:
    conn = await bench.connect(behaviour, count=lambda text: len(text.split()))
    error, shown = await bench.fails(conn)
    assert isinstance(error, ReplicaLost)
    assert shown == "w0 w1 "
    assert bench.settled == [UpstreamUsage(prompt_tokens=7, completion_tokens=2, estimated=True)]


@pytest.mark.parametrize("behaviour", ["reset:after=-1", "ended:after=0", "only-done:after=0"])
async def test_a_stream_that_ends_before_it_began_shows_nothing(bench: Bench, behaviour: str) -> None:
    error, shown = await bench.fails(await bench.connect(behaviour))
    assert isinstance(error, UpstreamLost)
    assert shown == ""


async def test_an_empty_stream_is_asked_for_in_one_piece_so_that_it_says_why(bench: Bench) -> None:
    """llama-cpp-python tells only whole answers that a prompt is too long; as a loss it was tried thrice more."""
    conn = await bench.connect("wordless:whole=status,code=400,error_code=context_length_exceeded,message=too long")
    for _ in range(2):  # it is still asked to stream
        error, shown = await bench.fails(conn)
        assert isinstance(error, ContextLengthExceeded)
        assert shown == ""
    assert bench.settled == [UpstreamUsage(prompt_tokens=0, completion_tokens=0)] * 2
    assert text(await bench.ask(await bench.connect("wordless"))).split()[-1] == "w7"
    error, _ = await bench.fails(await bench.connect("wordless:whole=ended,after=0"))
    assert isinstance(error, UpstreamLost)


@pytest.mark.parametrize("behaviour", ["no-done", "until-closed:after=8", "only-done:after=8"])
async def test_a_whole_answer_with_a_careless_end_is_whole(bench: Bench, behaviour: str) -> None:
    chunks = await bench.ask(await bench.connect(behaviour))
    assert text(chunks).split()[-1] == "w7"
    assert chunks[-2].finish_reason is not None
    assert chunks[-1].usage is not None


async def test_after_the_last_choice_ended_little_is_waited_for(bench: Bench) -> None:
    chunks = await bench.ask(await bench.connect("no-done:hang=1", timeouts={"gap_s": 0.2}))
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.estimated


@pytest.mark.parametrize("kind", ["bytes", "json", "utf8", "array", "choices", "index", "huge", "endless", "deep"])
@pytest.mark.parametrize("after", [0, 2])
async def test_garbage_is_an_error(bench: Bench, kind: str, after: int) -> None:
    conn = await bench.connect(f"garbage:kind={kind},after={after},seconds=0.05")
    error, shown = await bench.fails(conn)
    assert isinstance(error, UpstreamLost)
    assert "xx" not in error.message
    assert shown in ("", "w0 w1 "[: after * 3])


async def test_a_header_without_end_is_an_error(bench: Bench) -> None:
    error, _ = await bench.fails(await bench.connect("huge-header"))
    assert isinstance(error, UpstreamLost)


async def test_an_answer_over_the_bound_is_cut_off(bench: Bench) -> None:
    error, _ = await bench.fails(await bench.connect("normal:tokens=100000", max_answer_bytes=100_000))
    assert isinstance(error, UpstreamLost)
    assert "larger than allowed" in error.message
    error, _ = await bench.fails(await bench.connect("whole:tokens=100000", max_answer_bytes=100_000))
    assert "larger than allowed" in error.message


async def test_an_error_event_before_the_first_token_can_be_retried_and_later_is_told(bench: Bench) -> None:
    error, shown = await bench.fails(await bench.connect("error-event:after=0"))
    assert (type(error), shown) == (UpstreamFailed, "")
    error, shown = await bench.fails(await bench.connect("error-event:after=2,gap_ms=20"))
    assert (type(error), shown) == (UpstreamFailed, "w0 w1 ")
    error, _ = await bench.fails(await bench.connect("error-event:after=0,kind=caller"))
    assert isinstance(error, InvalidRequest)
    assert error.message == "it broke"


async def test_an_answer_of_another_type_is_an_error(bench: Bench) -> None:
    error, _ = await bench.fails(await bench.connect("content-type:type=text/html"))
    assert isinstance(error, UpstreamLost)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("code", "kind"), [(500, UpstreamFailed), (503, UpstreamFailed), (529, UpstreamFailed),
                                            (401, ConfigError), (403, ConfigError), (404, ConfigError),
                                            (429, QueueFull), (402, QueueFull)])  # fmt: skip
async def test_statuses_become_our_errors(bench: Bench, code: int, kind: type[SignalboxError]) -> None:
    error, shown = await bench.fails(await bench.connect(f"status:code={code}"))
    assert isinstance(error, kind)
    assert shown == ""
    assert bench.settled == [UpstreamUsage(prompt_tokens=0, completion_tokens=0)]


async def test_429_carries_the_upstreams_retry_after(bench: Bench) -> None:
    conn = await bench.connect("status:code=429,retry_after=17,times=2")
    for _ in range(2):
        error, _ = await bench.fails(conn)
        assert isinstance(error, QueueFull)
        assert error.retry_after_s == 17
    assert text(await bench.ask(conn))


async def test_bursts_of_500_end(bench: Bench) -> None:
    conn = await bench.connect("status:code=500,times=5")
    results = [await bench.fails(conn) for _ in range(5)]
    assert all(type(error) is UpstreamFailed for error, _ in results)
    assert text(await bench.ask(conn))
    assert bench.mock.connections == 1  # an error is an answer: the connection is kept


async def test_the_callers_mistake_is_told_with_its_place_and_without_our_secrets(bench: Bench) -> None:
    model = "status:code=400,param=messages.0.role"
    conn = await bench.connect(model)
    error, _ = await bench.fails(conn)
    assert isinstance(error, InvalidRequest)
    assert error.param == "messages.0.role"
    assert error.message == "mock error; called with [credential]" or "[upstream]" in error.message
    conn = await bench.connect(f"status:code=400,message=no {bench.mock.base_url} here {KEY}")
    error, _ = await bench.fails(conn)
    assert error.message == "no [upstream] here [upstream]"


async def test_a_context_that_is_too_long_is_told_as_such(bench: Bench) -> None:
    conn = await bench.connect("status:code=400,error_code=context_length_exceeded,message=too long")
    error, _ = await bench.fails(conn)
    assert isinstance(error, ContextLengthExceeded)


async def test_redirects_are_refused_and_not_followed(bench: Bench) -> None:
    conn = await bench.connect(f"redirect:to={bench.mock.base_url}/chat/completions")
    error, _ = await bench.fails(conn)
    assert isinstance(error, ConfigError)
    assert len(bench.mock.received) == 1


async def test_an_upstream_that_is_not_there_is_lost(bench: Bench) -> None:
    error, _ = await bench.fails(await bench.connect("normal", base_url="http://127.0.0.1:1/v1"))
    assert isinstance(error, UpstreamLost)
    assert "127.0.0.1" not in error.message


async def test_a_connection_that_is_not_accepted_in_time_is_a_timeout(bench: Bench) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:  # until the backlog is full; the kernel then drops what else wants in
            one.setblocking(False)
            one.connect_ex(deaf.getsockname())
        try:
            error, _ = await bench.fails(await bench.connect("normal", base_url=url, timeouts={"connect_s": 0.2}))
        finally:
            for one in waiting:
                one.close()
    assert isinstance(error, UpstreamTimeout)
    assert error.phase == "connect"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Self-signed for 127.0.0.1, key and certificate in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mock")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "mock.pem"
    path.write_bytes(key.private_bytes(*plain) + made.public_bytes(serialization.Encoding.PEM))
    return path


async def test_tls_is_verified_against_the_authorities_that_the_operator_names(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    mock = MockUpstream()
    await mock.start(tls=tls)
    bench = Bench(mock)
    url = mock.base_url.replace("http:", "https:")
    stranger = await bench.connect("normal", base_url=url)
    error, _ = await bench.fails(stranger)
    assert isinstance(error, UpstreamLost)
    assert not mock.received
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert text(await bench.ask(await bench.connect("normal", base_url=url)))
    for conn in bench.connections:
        await conn.aclose()
    await mock.stop()


async def test_more_requests_than_allowed_at_a_time_are_refused_at_once(bench: Bench) -> None:
    conn = await bench.connect("hang-mid-stream:after=1", max_connections=2)
    async with aclosing(conn.generate(bench.request())) as one, aclosing(conn.generate(bench.request())) as two:
        await anext(one)
        await anext(two)
        assert conn.unadmitted() == (2, 14)
        assert conn.full
        error, _ = await bench.fails(conn)
        assert isinstance(error, UpstreamBusy)
    assert conn.unadmitted() == (0, 0)
    assert not conn.full


async def test_closing_the_connection_ends_what_is_read(bench: Bench) -> None:
    conn = await bench.connect("hang-mid-stream:after=1")
    async with aclosing(conn.generate(bench.request())) as stream:
        await anext(stream)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0.05)
        await conn.aclose()
        with pytest.raises(Unavailable):
            await reading
    assert not conn.alive
    await conn.wait_closed()
    error, _ = await bench.fails(conn)
    assert isinstance(error, UpstreamLost)


async def test_the_key_is_shown_nowhere(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = ""
    for behaviour in (
        "normal",
        "status:code=401",
        "status:code=500",
        "status:code=429",
        "redirect",
        "garbage:kind=json",
    ):
        conn = await bench.connect(behaviour)
        shown += repr(conn) + repr(conn.upstream) + repr(vars(conn))
        try:
            await bench.ask(conn)
        except SignalboxError as error:
            shown += f"{error!r} {error.message} {error.param}"
    assert "secret" not in shown
    assert "secret" not in "".join(record.getMessage() for record in caplog.records)


async def test_cookies_of_one_answer_do_not_go_out_with_the_next_request(bench: Bench) -> None:
    conn = await bench.connect("status:code=500,times=1,retry_after=1")
    await bench.fails(conn)
    await bench.ask(conn)
    assert all("cookie" not in got.headers for got in bench.mock.received)


async def test_proxies_in_the_environment_are_not_used(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert text(await bench.ask(await bench.connect("normal")))
