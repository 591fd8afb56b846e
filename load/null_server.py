"""A server that answers like OpenAI's at scripted times and computes nothing: the truth that generators are held to.

    python -m load.null_server --port 8009 --ttft 50ms --itl 10ms

Of a request with n output tokens that arrives at t, token k (from 0) leaves at t + ttft + k * itl. In a stream every
--tokens-per-event tokens make one event, which leaves when the first of them is due; an answer in one piece leaves
when the last token is due. n is max_tokens, at most --max-tokens. Times are absolute, so lateness does not add up; how
late the server itself was is at GET /null/stats.

With --slots S only S requests run at once and the rest wait in a queue, whose time is told in Server-Timing: such a
server has a highest rate, S / (ttft + (n - 1) * itl). With --prefix-cache B prompts are cached in blocks of B words and
usage tells the cached ones. --fault makes every --fault-every-th request fail.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import numpy as np

from load.loop import run
from load.units import seconds

FAULTS = ("401", "429", "500", "503", "garbage", "cut", "no-finish", "error-event", "hang", "not-http")
_WORD = " word"


@dataclass(frozen=True, slots=True)
class Script:
    ttft_s: float = 0.0
    itl_s: float = 0.0
    max_tokens: int = 128
    tokens_per_event: int = 1
    slots: int = 0
    prefix_cache: int = 0
    fault: str = ""
    fault_every: int = 1
    key: str = ""
    model: str = "scripted"


class State:
    """What the connections share: slots, queue, cache, counts."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests = 0
        self.running = 0
        self.waiting: deque[Callable[[], None]] = deque()
        self.late: deque[float] = deque(maxlen=100_000)
        self.blocks: set[bytes] = set()
        self.prompt_tokens = self.cached_tokens = self.output_tokens = 0
        piece = json.dumps(_chunk(script.model, {"content": _WORD * script.tokens_per_event}))
        self.event = _framed(f"data: {piece}\n\n".encode())

    def acquire(self, go: Callable[[], None]) -> None:
        if self.script.slots and self.running >= self.script.slots:
            self.waiting.append(go)
        else:
            self.running += 1
            go()

    def release(self) -> None:
        self.running -= 1
        if self.waiting:
            self.running += 1
            self.waiting.popleft()()

    def count_prompt(self, body: dict[str, Any]) -> tuple[int, int]:
        """(tokens, cached ones): words of the texts, or token ids."""
        words = _words(body)
        cached = self._look_up(words) if self.script.prefix_cache else 0
        self.prompt_tokens += len(words)
        self.cached_tokens += cached
        return len(words), cached

    def _look_up(self, words: list[Any]) -> int:
        size, parent, hits, missed = self.script.prefix_cache, b"", 0, False
        for at in range(0, len(words) - size + 1, size):
            parent = blake2b(parent + repr(words[at : at + size]).encode(), digest_size=16).digest()
            missed = missed or parent not in self.blocks
            hits += 0 if missed else size
            self.blocks.add(parent)
        return hits

    def stats(self) -> dict[str, Any]:
        late = np.array(self.late) if self.late else np.zeros(1)
        return {
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "output_tokens": self.output_tokens,
            "late_p50_s": float(np.percentile(late, 50)),
            "late_p99_s": float(np.percentile(late, 99)),
        }

    def metrics(self) -> str:
        label = f'{{model_name="{self.script.model}",replica="null-0"}}'
        return "".join(
            f"# TYPE null_{name} {kind}\nnull_{name}{label} {value}\n"
            for name, kind, value in (
                ("num_requests_running", "gauge", self.running),
                ("num_requests_waiting", "gauge", len(self.waiting)),
                ("prefix_cache_queries_total", "counter", self.prompt_tokens),
                ("prefix_cache_hits_total", "counter", self.cached_tokens),
            )
        )


def _words(body: dict[str, Any]) -> list[Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return list(prompt)
    texts = [prompt] if prompt is not None else [message.get("content") or "" for message in body.get("messages", ())]
    return " ".join(str(text) for text in texts).split()


def _chunk(model: str, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    # `text` beside `delta` would be a shape of nobody's; the completions endpoint is told apart in _Connection
    return {
        "id": "chatcmpl-null",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "choices": [choice],
    }


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class _Connection(asyncio.Protocol):
    """One client connection; requests are answered one after the other."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._buffer = b""
        self._busy = False
        self._holds_slot = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._release()

    def _release(self) -> None:
        if self._holds_slot:
            self._holds_slot = False
            self._state.release()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._busy:
            self._next()

    def _next(self) -> None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._buffer) < end + 4 + length:
            return
        line = self._buffer[: self._buffer.find(b"\r\n")].split(b" ")
        original, body = self._buffer[:end], self._buffer[end + 4 : end + 4 + length]
        self._buffer = self._buffer[end + 4 + length :]
        self._busy = True
        self._route(line, original, body, time.monotonic())

    def _route(self, line: list[bytes], head: bytes, body: bytes, now: float) -> None:
        path, script = line[1], self._state.script
        if script.key and f"bearer {script.key}".encode() not in head.replace(b"Bearer", b"bearer"):
            self._send(401, {"error": {"message": "invalid API key", "code": "invalid_api_key"}})
        elif path == b"/v1/models":
            self._send(200, {"object": "list", "data": [{"id": script.model, "object": "model", "owned_by": "null"}]})
        elif path in (b"/health", b"/"):
            self._send(200, {"status": "ok"})
        elif path == b"/null/stats":
            self._send(200, self._state.stats())
        elif path == b"/metrics":
            self._write(200, self._state.metrics().encode(), "text/plain; version=0.0.4")
        elif path in (b"/v1/chat/completions", b"/v1/completions") and line[0] == b"POST":
            self._complete(path.endswith(b"/completions") and b"chat" not in path, body, now)
        else:
            self._send(404, {"error": {"message": f"no {path.decode('latin-1')} here"}})

    # ------------------------------------------------------------------------------------------------------ generation

    def _complete(self, plain: bool, raw: bytes, now: float) -> None:
        state, script = self._state, self._state.script
        try:
            body = json.loads(raw)
            tokens = min(int(body.get("max_tokens") or body.get("max_completion_tokens") or 16), script.max_tokens)
        except (ValueError, TypeError, AttributeError):
            self._send(400, {"error": {"message": "not a JSON object"}})
            return
        state.requests += 1
        fault = script.fault if script.fault and state.requests % script.fault_every == 0 else ""
        if fault and self._refuse(fault):
            return
        prompt, cached = state.count_prompt(body)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": tokens,
            "total_tokens": prompt + tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        state.output_tokens += tokens
        one = _Generation(plain, bool(body.get("stream")), tokens, usage, fault, now)
        options = body.get("stream_options") or {}
        one.usage_wanted = bool(options.get("include_usage"))

        def go() -> None:
            if self._transport.is_closing():
                state.release()
            else:
                self._holds_slot = True
                self._begin(one, time.monotonic() if script.slots else now)

        state.acquire(go)

    def _refuse(self, fault: str) -> bool:
        """Answer at once if the fault is one of the status line."""
        if fault.isdigit():
            code = {"401": "invalid_api_key", "503": "queue_full"}.get(fault)
            headers = {"retry-after": "1"} if fault in ("429", "503") else {}
            self._send(int(fault), {"error": {"message": f"scripted {fault}", "code": code}}, headers)
        elif fault == "not-http":
            self._transport.write(b"SSH-2.0-OpenSSH_9.6\r\n" * 4)
            self._transport.close()
        return fault.isdigit() or fault in ("hang", "not-http")

    def _begin(self, one: _Generation, begin: float) -> None:
        script = self._state.script
        queued = f"queue;dur={(begin - one.asked) * 1e3:.3f}"
        if one.stream:
            one.head = (
                "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
                f"server-timing: {queued}\r\n\r\n"
            ).encode() + _framed(b"data: " + json.dumps(_chunk(script.model, {"role": "assistant"})).encode() + b"\n\n")
            if one.plain:
                text = {"id": "cmpl-null", "object": "text_completion", "model": script.model}
                piece = {"index": 0, "text": _WORD * script.tokens_per_event, "finish_reason": None}
                one.event = _framed(f"data: {json.dumps({**text, 'choices': [piece]})}\n\n".encode())
                one.head = one.head[: one.head.index(b"\r\n\r\n") + 4]
            else:
                one.event = self._state.event
            self._at(begin + script.ttft_s, self._emit, one, begin, 0)
        else:
            end = begin + script.ttft_s + (one.tokens - 1) * script.itl_s
            self._at(end, self._answer, one, queued)

    def _at(self, due: float, action: Callable[..., None], *arguments: Any) -> None:
        if due <= time.monotonic():
            self._state.late.append(time.monotonic() - due)
            action(*arguments)
        else:
            self._timer = self._loop.call_at(due, self._on_time, due, action, *arguments)

    def _on_time(self, due: float, action: Callable[..., None], *arguments: Any) -> None:
        self._state.late.append(time.monotonic() - due)
        action(*arguments)

    def _emit(self, one: _Generation, begin: float, sent: int) -> None:
        """Write the events that are due: first with the head, last with the end."""
        script = self._state.script
        out = [one.head] if sent == 0 else []
        now = time.monotonic()
        while True:
            if one.fault and sent >= one.tokens // 2 and self._break(one, out):
                return
            out.append(one.event)
            sent += script.tokens_per_event
            due = begin + script.ttft_s + sent * script.itl_s
            if sent >= one.tokens or due > now:
                break
        if sent >= one.tokens:
            out.append(self._last(one))
        self._transport.write(b"".join(out))
        if sent >= one.tokens:
            self._done()
        else:
            self._at(due, self._emit, one, begin, sent)

    def _break(self, one: _Generation, out: list[bytes]) -> bool:
        """The scripted fault in the middle of a stream; True if nothing more is to come."""
        if one.fault == "no-finish":
            return False
        extra = {
            "garbage": b"%$#@ this is no event\n\ndata: {broken\n\n",
            "error-event": b'data: {"error": {"message": "scripted failure", "code": "engine_fault"}}\n\n',
        }.get(one.fault)
        self._transport.write(b"".join(out) + (_framed(extra) + b"0\r\n\r\n" if extra else b""))
        if one.fault == "cut":
            self._transport.close()
        else:
            self._done()
        return True

    def _last(self, one: _Generation) -> bytes:
        """The end of a stream: finish_reason, usage if asked for, [DONE]."""
        finish: dict[str, Any] = _chunk(self._state.script.model, {}, "length")
        if one.plain:
            finish["choices"] = [{"index": 0, "text": "", "finish_reason": "length"}]
        if one.fault == "no-finish":
            return b"0\r\n\r\n"
        out = b"data: " + json.dumps(finish).encode() + b"\n\n"
        if one.usage_wanted:
            usage = {**finish, "choices": [], "usage": one.usage}
            out += b"data: " + json.dumps(usage).encode() + b"\n\n"
        return _framed(out + b"data: [DONE]\n\n") + b"0\r\n\r\n"

    def _answer(self, one: _Generation, queued: str) -> None:
        if one.fault == "cut":
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{")
            self._transport.close()
            return
        if one.fault:
            self._write(200, b"%$#@ no JSON", "application/json")
        else:
            text = _WORD * one.tokens
            choice: dict[str, Any] = {"index": 0, "finish_reason": "length"}
            choice |= {"text": text} if one.plain else {"message": {"role": "assistant", "content": text}}
            whole = {"id": "null", "object": "chat.completion", "created": 1, "model": self._state.script.model}
            self._send(200, {**whole, "choices": [choice], "usage": one.usage}, {"server-timing": queued})

    def _send(self, status: int, answer: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._write(status, json.dumps(answer).encode(), "application/json", headers)

    def _write(self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        more = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
        head = f"HTTP/1.1 {status} Scripted\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{more}\r\n"
        self._transport.write(head.encode() + body)
        self._done()

    def _done(self) -> None:
        self._timer = None
        self._busy = False
        self._release()
        if self._buffer:
            self._loop.call_soon(self._next)


@dataclass(slots=True)
class _Generation:
    plain: bool
    stream: bool
    tokens: int
    usage: dict[str, Any]
    fault: str
    asked: float
    usage_wanted: bool = False
    head: bytes = b""
    event: bytes = b""


async def serve(script: Script, host: str, port: int) -> asyncio.Server:
    """A listening server; port 0 chooses a free one."""
    state = State(script)
    return await asyncio.get_running_loop().create_server(lambda: _Connection(state), host, port, backlog=4096)


async def _main(script: Script, host: str, port: int) -> None:
    server = await serve(script, host, port)
    print(f"null server on http://{host}:{server.sockets[0].getsockname()[1]}", flush=True)
    stop = asyncio.Event()
    for one in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(one, stop.set)
    await stop.wait()
    server.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load.null_server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 (default) chooses a free one and prints it")
    parser.add_argument("--ttft", type=seconds, default=0.0, help="time to first token, as in 50ms (0)")
    parser.add_argument("--itl", type=seconds, default=0.0, help="time between tokens, as in 10ms (0)")
    parser.add_argument("--max-tokens", type=int, default=100_000, help="most output tokens of a request")
    parser.add_argument("--tokens-per-event", type=int, default=1)
    parser.add_argument("--slots", type=int, default=0, help="requests at once; 0 (default): any number")
    parser.add_argument("--prefix-cache", type=int, default=0, metavar="WORDS", help="block size; 0 (default): none")
    parser.add_argument("--fault", choices=FAULTS, default="")
    parser.add_argument("--fault-every", type=int, default=1)
    parser.add_argument("--key", default="", help="the only key it accepts")
    parser.add_argument("--model", default="scripted")
    options = vars(parser.parse_args())
    host, port = options.pop("host"), options.pop("port")
    if min(options["max_tokens"], options["tokens_per_event"], options["fault_every"]) < 1:
        parser.error("--max-tokens, --tokens-per-event and --fault-every must be at least 1")
    script = Script(options.pop("ttft"), options.pop("itl"), **options)
    try:
        run(_main(script, host, port))
    except OSError as error:
        print(f"null server: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
