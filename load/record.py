"""What is known of one request when it is over, and the reader of OpenAI-shaped answers that finds it out.

Times are seconds of one clock (`load.http1.clock`), the same in all processes of a machine. Nothing here opens a
socket: `Answer` is fed heads and bytes with their times, so that its definitions can be tested with made-up clocks.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Why a request brought no whole answer. The first kind is the server's own, open refusal; the rest are failures.
REJECTED = "rejected"  # 429 or 503
UNREACHABLE = "unreachable"  # no connection
STATUS = "status"  # any other HTTP status but 200
SERVER_ERROR = "server_error"  # an error event in the stream, or an error object with status 200
GARBAGE = "garbage"  # not HTTP, not SSE, not JSON, or JSON of another shape
CUT = "cut"  # the stream ended without finish_reason or [DONE], or the connection broke
TIMEOUT = "timeout"  # no end within --timeout
UNFINISHED = "unfinished"  # still running when the run was over (--drain), or interrupted
KINDS = (REJECTED, UNREACHABLE, STATUS, SERVER_ERROR, GARBAGE, CUT, TIMEOUT, UNFINISHED)

_MOST_DETAIL = 300
_MOST_EVENT = 8 * 1024 * 1024


@dataclass(slots=True)
class Record:
    """One request. Times of things that did not happen are NaN; counts the server did not tell are -1.

    scheduled: when it was due; begun: when we turned to it (begun - scheduled is the generator's own lag); sent: when
    its bytes went out, which a new connection delays; first, last: first and last content; end: end of the answer.
    chunks: time of every event with content. chunk_tokens: tokens of each, where the server says (else empty).
    asked_prompt, asked_output: what we put in and allowed, by our count.
    """

    index: int
    turn: int
    scheduled: float
    asked_prompt: int
    asked_output: int
    begun: float = float("nan")
    sent: float = float("nan")
    first: float = float("nan")
    last: float = float("nan")
    end: float = float("nan")
    status: int = 0
    error: str = ""
    detail: str = ""
    finish_reason: str = ""
    prompt_tokens: int = -1
    completion_tokens: int = -1
    cached_tokens: int = -1
    queue_s: float = float("nan")
    retry_after_s: float = float("nan")
    chunks: array[float] = field(default_factory=lambda: array("d"))
    chunk_tokens: array[int] = field(default_factory=lambda: array("i"))
    text: str = ""


class Answer:
    """Reads one answer into its Record and calls `done(record, text)` once, however it ends. A load.http1.Receiver.

    `asked_stream`: a stream is expected; `wants_done`: and that it ends with [DONE]. `hang_up` is called when the rest
    of an answer is not worth reading.
    """

    __slots__ = (
        "_asked",
        "_body",
        "_closed",
        "_counted",
        "_done",
        "_finished",
        "_stream",
        "_texts",
        "_usage_seen",
        "hang_up",
        "record",
    )

    def __init__(
        self, record: Record, done: Callable[[Record, str], None], *, asked_stream: bool, wants_done: bool = True
    ) -> None:
        self.record = record
        self.hang_up: Callable[[], None] = _nothing
        self._done = done
        self._asked = asked_stream
        self._closed = False
        self._body = b""
        self._stream = False
        self._texts: list[str] = []
        self._finished = not wants_done  # [DONE] was seen
        self._usage_seen = False
        self._counted = 0

    def on_sent(self, now: float) -> None:
        self.record.sent = now

    def on_head(self, status: int, headers: dict[bytes, bytes], now: float) -> None:
        self.record.status = status
        self.record.queue_s = queue_seconds(headers)
        kind = headers.get(b"content-type", b"").lower()
        # a server that forgets the type of its stream still streams
        self._stream = status == 200 and (b"event-stream" in kind or (self._asked and b"json" not in kind))
        if b"retry-after" in headers:
            try:
                self.record.retry_after_s = float(headers[b"retry-after"])
            except ValueError:
                pass  # an HTTP date; only its absence would be news

    def on_body(self, data: bytes, now: float) -> None:
        if not self._stream:
            self._body += data
            return
        if self._body:
            data = self._body + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *events, self._body = data.split(b"\n\n")
        if len(self._body) > _MOST_EVENT:
            self._fail(GARBAGE, "an event that never ends")
        for event in events:
            if not self.record.error:
                self._event(event, now)
        if self.record.error == GARBAGE:
            self.record.end = now
            self.hang_up()
            self._close()

    def _event(self, event: bytes, now: float) -> None:
        if event.startswith(b"data:") and b"\n" not in event:
            payload = event[5:]
        else:
            lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
            strange = [line for line in lines if line.split(b":")[0] not in (b"data", b"event", b"id", b"retry")]
            if strange:
                self._fail(GARBAGE, f"not a server-sent event: {strange[0][:80]!r}")
                return
            payload = b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
        payload = payload.strip()
        if payload == b"[DONE]":
            self._finished = True
        elif payload:
            self._chunk(payload, now)

    def _chunk(self, payload: bytes, now: float) -> None:
        try:
            chunk = json.loads(payload)
        except (ValueError, RecursionError):
            self._fail(GARBAGE, f"an event that is not JSON: {payload[:80]!r}")
            return
        if not isinstance(chunk, dict):
            self._fail(GARBAGE, f"an event that is not an object: {payload[:80]!r}")
            return
        if chunk.get("error"):
            self._fail(SERVER_ERROR, _message(chunk["error"]))
            return
        usage = chunk.get("usage")
        try:
            text = self._choices(chunk.get("choices") or [])
            if usage:
                self._usage(usage)
        except (TypeError, AttributeError, ValueError, KeyError, IndexError):
            self._fail(GARBAGE, f"an event of another shape: {payload[:80]!r}")
            return
        if not text and not usage and "choices" not in chunk:
            self._fail(GARBAGE, f"an event of another shape: {payload[:80]!r}")
        elif text:
            self._content(text, now)

    def _content(self, text: str, now: float) -> None:
        record = self.record
        if not record.chunks:
            record.first = now
        record.last = now
        record.chunks.append(now)
        self._texts.append(text)
        if self._usage_seen and record.completion_tokens >= self._counted:
            record.chunk_tokens.append(record.completion_tokens - self._counted)
            self._counted = record.completion_tokens

    def _choices(self, choices: list[dict[str, Any]]) -> str:
        text = ""
        for choice in choices:
            delta = choice.get("delta") or choice.get("message")
            if delta is not None:
                text += delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
                if not text and delta.get("tool_calls"):
                    text = json.dumps(delta["tool_calls"])
            else:
                text += choice.get("text") or ""
            self.record.finish_reason = choice.get("finish_reason") or self.record.finish_reason
        return text

    def _usage(self, usage: dict[str, Any]) -> None:
        record = self.record
        record.prompt_tokens = int(usage.get("prompt_tokens", -1))
        record.completion_tokens = int(usage.get("completion_tokens") or 0)
        details = usage.get("prompt_tokens_details") or {}
        cached = details.get("cached_tokens")
        record.cached_tokens = -1 if cached is None else int(cached)
        if usage.get("queue_time") is not None:  # Groq's, in seconds
            record.queue_s = float(usage["queue_time"])
        self._usage_seen = True

    def _fail(self, kind: str, detail: str) -> None:
        if not self.record.error:
            self.record.error, self.record.detail = kind, detail[:_MOST_DETAIL]

    def on_end(self, now: float) -> None:
        record = self.record
        record.end = now
        if record.status != 200:
            kind = REJECTED if record.status in (429, 503) else STATUS
            self._fail(kind, _error_text(record.status, self._body))
        elif not self._stream:
            self._whole(now)
        elif not record.error:
            if self._body.strip():
                self._event(self._body, now)
            if not record.error and not (self._finished and record.finish_reason):
                missing = "[DONE]" if not self._finished else "finish_reason"
                self._fail(CUT, f"the stream ended without {missing}")
        self._close()

    def _whole(self, now: float) -> None:
        """An answer in one piece: no first token to time."""
        if self._asked:
            self._fail(GARBAGE, f"a stream was asked for, the answer is in one piece: {self._body[:80]!r}")
        if not self.record.error:
            self._chunk(self._body, now)
            if not self.record.error and not self.record.finish_reason:
                self._fail(GARBAGE, f"an answer without choices: {self._body[:80]!r}")
            del self.record.chunks[:]
            del self.record.chunk_tokens[:]
            self.record.first = self.record.last = float("nan")

    def on_error(self, kind: str, detail: str, now: float) -> None:
        self.record.end = now
        self._fail(kind, detail)
        self._close()

    def give_up(self, kind: str, detail: str, now: float) -> None:
        """Our own end of a request: time-out, end of the run."""
        self.on_error(kind, detail, now)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if len(self.record.chunk_tokens) != len(self.record.chunks):
            del self.record.chunk_tokens[:]  # not for every event: no use
        self._done(self.record, "".join(self._texts))


def _nothing() -> None:
    pass


def queue_seconds(headers: dict[bytes, bytes]) -> float:
    """Time in the server's queue, where it says: Server-Timing `queue;dur=MS` (W3C), or TGI's x-queue-time (ms)."""
    try:
        if b"x-queue-time" in headers:
            return float(headers[b"x-queue-time"]) / 1000
        for metric in headers.get(b"server-timing", b"").split(b","):
            name, *parameters = (part.strip() for part in metric.split(b";"))
            if name == b"queue":
                return next(float(part[4:]) / 1000 for part in parameters if part.startswith(b"dur="))
    except (ValueError, StopIteration):
        pass
    return float("nan")


def _message(error: Any) -> str:
    if isinstance(error, dict):
        error = error.get("message", error)
    return str(error)[:_MOST_DETAIL]


def _error_text(status: int, body: bytes) -> str:
    """`401: message`, the message from OpenAI's shape if it is one."""
    try:
        found = json.loads(body)
        message = _message(found.get("error", found) if isinstance(found, dict) else found)
    except (ValueError, RecursionError):
        message = body[:120].decode("utf-8", "replace")
    return f"{status}: {message}"
