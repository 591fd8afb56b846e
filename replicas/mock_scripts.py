"""How the mock upstream behaves, right and wrong: one coroutine per behaviour, chosen by the request's model name.

    "normal"    "reset:after=3"    "status:code=429,retry_after=1,times=2"

The part before the colon names the behaviour, the rest sets its parameters. All of it is deterministic: the same
request gets the same bytes. Words are counted as tokens.
"""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

FOREVER_S = 3600.0


@dataclass(slots=True)
class Exchange:
    """One request being answered. seen: requests for the same model name before this one; served: on this socket."""

    writer: asyncio.StreamWriter
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    params: Mapping[str, str]
    seen: int
    served: int = 0
    keep: bool = True
    framed: bool = True
    line_end: str = "\n"
    created: int = field(default=1700000000)

    @property
    def chat(self) -> bool:
        return self.path.endswith("/chat/completions")

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    def number(self, name: str, default: float) -> float:
        return float(self.params.get(name, default))

    @property
    def words(self) -> list[str]:
        limit = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        count = int(limit or self.number("tokens", 8))
        return [f"w{number} " for number in range(count)]

    @property
    def choices(self) -> int:
        prompt = self.body.get("prompt")
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        return int(self.body.get("n") or 1) * (len(prompt) if several and isinstance(prompt, list) else 1)

    # ------------------------------------------------------------------------------------------------------- writing

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(
        self, status: int = 200, kind: str = "text/event-stream", length: int | None = None, **more: str
    ) -> None:
        lines = [f"HTTP/1.1 {status} Mock", f"content-type: {kind}", "set-cookie: mock=1"]
        if length is not None:
            lines.append(f"content-length: {length}")
        elif self.framed:
            lines.append("transfer-encoding: chunked")
        if not self.keep:
            lines.append("connection: close")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in more.items()]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode())

    async def piece(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data) if self.framed else data)

    async def event(self, data: str) -> None:
        await self.piece(f"data: {data}{self.line_end * 2}".encode())

    async def end(self) -> None:
        """The end of a body, as HTTP knows it."""
        if self.framed:
            await self.send(b"0\r\n\r\n")

    async def answer(self, status: int, body: Mapping[str, Any], **headers: str) -> None:
        data = json.dumps(body).encode()
        await self.head(status, "application/json", len(data), **headers)
        await self.send(data)

    def cut(self, *, reset: bool) -> None:
        """Close the socket now; with a TCP reset instead of an orderly end if asked."""
        self.keep = False
        if reset:
            self.writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()

    # -------------------------------------------------------------------------------------------------- what is said

    def object(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return json.dumps(
            {"id": "mock", "object": kind, "created": self.created, "model": self.body.get("model")}
            | {"choices": choices}
            | more,
            ensure_ascii=False,
        )

    def word(self, index: int, text: str) -> str:
        said = {"delta": {"content": text}} if self.chat else {"text": text}
        logprobs = None
        if self.chat and self.body.get("logprobs"):
            token = {"token": text, "logprob": -0.5, "bytes": list(text.encode())}
            logprobs = {"content": [{**token, "top_logprobs": []}], "refusal": None}
        return self.object([{"index": index, **said, "logprobs": logprobs, "finish_reason": None}])

    def finish(self, index: int, reason: str) -> str:
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        return self.object([{"index": index, **said, "logprobs": None, "finish_reason": reason}])

    def usage(self) -> dict[str, Any]:
        prompt = len(json.dumps(self.body.get("messages") or self.body.get("prompt") or "").split())
        completion = len(self.words) * self.choices
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": prompt // 2},
        }

    async def opening(self) -> None:
        for index in range(self.choices if self.chat else 0):
            delta = {"role": "assistant", "content": "", "refusal": None}
            await self.event(self.object([{"index": index, "delta": delta, "finish_reason": None}]))

    async def some_words(self, count: int) -> None:
        gap_s = self.number("gap_ms", 0) / 1000
        for text in self.words[:count]:
            for index in range(self.choices):
                await self.event(self.word(index, text))
            if gap_s:
                await asyncio.sleep(gap_s)

    async def closing(self, *, usage: bool = True, reason: str = "length") -> None:
        for index in range(self.choices):
            await self.event(self.finish(index, reason))
        if usage and self.wants_usage:
            await self.event(self.object([], usage=self.usage()))
        await self.event("[DONE]")
        await self.end()

    def error(self, message: str, kind: str, *, param: str | None = None, code: Any = None) -> dict[str, Any]:
        return {"error": {"message": message, "type": kind, "param": param, "code": code}}


Script = Callable[[Exchange], Awaitable[None]]


async def normal(x: Exchange) -> None:
    """A right answer: streamed if asked for. tokens, gap_ms, first_ms."""
    await asyncio.sleep(x.number("first_ms", 0) / 1000)
    if not x.streams:
        return await whole(x)
    await x.head()
    await x.opening()
    await x.some_words(len(x.words))
    await x.closing(usage=x.params.get("usage") != "no")


async def whole(x: Exchange) -> None:
    """One JSON body, streaming asked for or not."""
    text = "".join(x.words)
    said = {"message": {"role": "assistant", "content": text}} if x.chat else {"text": text}
    choices = [{"index": i, **said, "logprobs": None, "finish_reason": "length"} for i in range(x.choices)]
    await x.answer(200, json.loads(x.object(choices, usage=x.usage())))


async def hang_before_headers(x: Exchange) -> None:
    await asyncio.sleep(x.number("seconds", FOREVER_S))


async def hang_before_first_token(x: Exchange) -> None:
    """Headers and the opening role, then nothing."""
    await x.head()
    await x.opening()
    await asyncio.sleep(x.number("seconds", FOREVER_S))


async def ping_forever(x: Exchange) -> None:
    """Keep-alive comments and never a token, or never another one after `after`."""
    await x.head()
    await x.opening()
    await x.some_words(int(x.number("after", 0)))
    while True:
        await x.piece(b": ping\n\n")
        await asyncio.sleep(0.01)


async def hang_mid_stream(x: Exchange) -> None:
    await _begin(x)
    await asyncio.sleep(x.number("seconds", FOREVER_S))


async def reset(x: Exchange) -> None:
    """A TCP reset after some words, or before any byte with after=-1."""
    if x.number("after", 3) >= 0:
        await _begin(x)
        await asyncio.sleep(0.02)  # a reset overtakes what the other side has not read yet
    x.cut(reset=True)


async def close(x: Exchange) -> None:
    """The socket is closed in an orderly way in the middle of the body."""
    await _begin(x)
    x.cut(reset=False)


async def ended(x: Exchange) -> None:
    """A body that ends as HTTP says it should, but without finish_reason and [DONE]."""
    await _begin(x)
    await x.end()


async def wordless(x: Exchange) -> None:
    """An empty stream, as llama-cpp-python gives for a prompt that is too long; in one piece an answer to `whole`."""
    if not x.streams:
        return await SCRIPTS[x.params.get("whole", "whole")](x)
    await x.head()
    await x.end()


async def closes_idle(x: Exchange) -> None:
    """A right answer; the next request on the same connection is met with a close, as if it had been idle too long."""
    if x.served:
        return x.cut(reset=x.params.get("how") == "reset")
    await normal(x)


async def until_closed(x: Exchange) -> None:
    """A body without length, ended by closing, HTTP/1.0's way: whole, or cut with cut=1."""
    x.keep = x.framed = False
    await _begin(x)
    if not x.params.get("cut"):
        await x.closing()


async def no_done(x: Exchange) -> None:
    """Every choice is finished, but [DONE] never comes; hang=1 keeps the connection open too."""
    await _begin(x, len(x.words))
    for index in range(x.choices):
        await x.event(x.finish(index, "stop"))
    if x.params.get("hang"):
        await asyncio.sleep(FOREVER_S)
    await x.end()


async def only_done(x: Exchange) -> None:
    """[DONE] without a finish_reason, after some words."""
    await _begin(x)
    await x.piece(b"data: [DONE]")  # and without the blank line that ends an event
    await x.end()


async def garbage(x: Exchange) -> None:
    """What is no event after some words. kind: bytes, json, utf8, array, choices, index or huge."""
    await _begin(x, int(x.number("after", 0)))
    await x.piece(_GARBAGE[x.params.get("kind", "bytes")](x))
    await asyncio.sleep(x.number("seconds", 0))
    await x.closing()


_GARBAGE: Mapping[str, Callable[[Exchange], bytes]] = {
    "bytes": lambda x: b"data: " + bytes(range(128, 256)) + b"\n\n",
    "json": lambda x: b'data: {"choices": [\n\n',
    "utf8": lambda x: b'data: {"choices": [{"delta": {"content": "\xc3("}}]}\n\n',
    "array": lambda x: b"data: [1, 2]\n\n",
    "choices": lambda x: b'data: {"choices": {"a": 1}}\n\n',
    "index": lambda x: b'data: {"choices": [{"index": 99, "delta": {"content": "x"}}]}\n\n',
    "huge": lambda x: b"data: " + b"x" * int(x.number("bytes", 4_000_000)) + b"\n\n",
    "endless": lambda x: b"x" * int(x.number("bytes", 4_000_000)),
    "deep": lambda x: b'data: {"choices":[{"delta":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}]}\n\n",
}


async def status(x: Exchange) -> None:
    """An error for the first `times` requests (all without it), then normal. code, retry_after, message, param."""
    if x.seen >= x.number("times", float("inf")):
        return await normal(x)
    code = int(x.number("code", 500))
    headers = {"retry_after": x.params["retry_after"]} if "retry_after" in x.params else {}
    message = x.params.get("message", f"mock error; called with {x.headers.get('authorization', 'no key')}")
    kind = "invalid_request_error" if code < 500 else "server_error"
    body = x.error(message, kind, param=x.params.get("param"), code=x.params.get("error_code"))
    await x.answer(code, body, **headers)


async def redirect(x: Exchange) -> None:
    await x.answer(307, {}, location=x.params.get("to", "http://127.0.0.1:1/v1/elsewhere"))


async def huge_header(x: Exchange) -> None:
    await x.head(padding="x" * int(x.number("bytes", 300_000)))
    await asyncio.sleep(FOREVER_S)


async def error_event(x: Exchange) -> None:
    """An error as an event, after some words; kind=caller blames the request."""
    await _begin(x)
    caller = x.params.get("kind") == "caller"
    await x.event(
        json.dumps(x.error("it broke", "BadRequestError" if caller else "server_error", code=400 if caller else 502))
    )
    await x.event("[DONE]")
    await x.end()


async def refuses(x: Exchange) -> None:
    """400 for a field that this server does not know. field: stream_options or stream."""
    name = x.params.get("field", "stream_options")
    if name in x.body:
        return await x.answer(
            400, x.error(f"Unrecognized request argument: {name}", "invalid_request_error", param=name)
        )
    await normal(x)


async def tool_calls(x: Exchange) -> None:
    """Two calls, arguments in pieces; index=no leaves the index out."""
    calls = [("call_a", "weather", ['{"city":', ' "Oslo"}']), ("call_b", "time", ["{}"])]
    await x.head()
    await x.opening()
    for number, (name, function, arguments) in enumerate(calls):
        place = {} if x.params.get("index") == "no" else {"index": number}
        begin = {**place, "id": name, "type": "function", "function": {"name": function, "arguments": ""}}
        pieces = [begin, *({**place, "function": {"arguments": part}} for part in arguments)]
        for piece in pieces:
            await x.event(x.object([{"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None}]))
    await x.closing(reason="tool_calls")


async def content_type(x: Exchange) -> None:
    await x.head(200, x.params.get("type", "text/html"), 15)
    await x.send(b"<html>no</html>")


async def odd_framing(x: Exchange) -> None:
    """A right stream, oddly written: byte order mark, comments, CRLF or CR, several data lines, one byte a piece."""
    x.line_end = {"crlf": "\r\n", "cr": "\r", "lf": "\n"}[x.params.get("ends", "crlf")]
    text = ["\ufeff: hello", "event: message", "retry: 10"]
    for word in (*x.words, "é", "\N{GRINNING FACE}"):
        head, tail = x.word(0, word).split(', "choices"', 1)
        text += [": ping", "", f"data: {head}", f'data:, "choices"{tail}', "id: 7", ""]
    text += [f"data: {x.finish(0, 'stop')}", "", "data: [DONE]", "", ""]
    await x.head()
    for byte in x.line_end.join(text).encode():
        await x.piece(bytes([byte]))
    await x.end()


async def _begin(x: Exchange, words: int | None = None) -> None:
    await x.head()
    await x.opening()
    await x.some_words(int(x.number("after", 3)) if words is None else words)


SCRIPTS: Mapping[str, Script] = {
    script.__name__.replace("_", "-"): script
    for script in (
        normal, whole, hang_before_headers, hang_before_first_token, ping_forever, hang_mid_stream, reset, close, ended,
        wordless, closes_idle, until_closed, no_done, only_done, garbage, status, redirect, huge_header, error_event,
        refuses, tool_calls, content_type, odd_framing,
    )
}  # fmt: skip
