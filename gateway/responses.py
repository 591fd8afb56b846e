"""Answers in OpenAI's shapes, written as bytes: a stream's events from parts prepared once, so that a token costs one
JSON string and one concatenation.

Tokens that are not whole UTF-8 characters appear as "bytes:\\xe2\\x80" in `token` fields, as OpenAI writes them; their
exact bytes are in `bytes`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from json.encoder import JSONEncoder, encode_basestring
from typing import Any, Protocol

from replicas.protocol import Chunk, FinishReason, TokenLogprob, Usage

DONE = b"data: [DONE]\n\n"
# JSON has no -inf; OpenAI's API writes this for "practically impossible".
_LOWEST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str


class Shape(Protocol):
    """How the two endpoints differ. `unary` and `stream` are the `object` names."""

    unary: str
    stream: str
    opens_with_role: bool

    def delta(self, index: int) -> tuple[str, str]:
        """JSON around the text of an event of choice `index`, up to and after the text itself."""
        ...

    def last_delta(self, index: int) -> str: ...
    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Offsets) -> dict[str, Any]: ...
    def choice(self, index: int, text: str) -> dict[str, Any]: ...


class Offsets:
    """Where each token of one choice begins in its text, in characters; a character counts once it is complete."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def next(self, token: bytes) -> int:
        begin = self._at
        self._at += len(self._decoder.decode(token))
        return begin


class ChatShape:
    unary = "chat.completion"
    stream = "chat.completion.chunk"
    opens_with_role = True

    def delta(self, index: int) -> tuple[str, str]:
        return f'{{"index":{index},"delta":{{"content":', "}"

    def last_delta(self, index: int) -> str:
        return f'{{"index":{index},"delta":{{}}'

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Offsets) -> dict[str, Any]:
        content = [{**_chat_token(token), "top_logprobs": [_chat_token(top) for top in token.top]} for token in tokens]
        return {"content": content, "refusal": None}

    def choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "message": {"role": "assistant", "content": text, "refusal": None}}


class CompletionShape:
    unary = stream = "text_completion"
    opens_with_role = False

    def delta(self, index: int) -> tuple[str, str]:
        return f'{{"index":{index},"text":', ""

    def last_delta(self, index: int) -> str:
        return f'{{"index":{index},"text":""'

    def logprobs(self, tokens: Sequence[TokenLogprob], offsets: Offsets) -> dict[str, Any]:
        return {
            "tokens": [_name(token) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{_name(top): _finite(top.logprob) for top in (*token.top, token)} for token in tokens],
            "text_offset": [offsets.next(token.token) for token in tokens],
        }

    def choice(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text}


def _name(token: TokenLogprob) -> str:
    try:
        return token.token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.token)


def _finite(logprob: float) -> float:
    return logprob if logprob > _LOWEST_LOGPROB else _LOWEST_LOGPROB


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": _name(token), "logprob": _finite(token.logprob), "bytes": list(token.token)}


def total(usages: Iterable[Usage]) -> Usage:
    """One bill for several prompts."""
    counts = [(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) for usage in usages]
    prompt, completion, cached = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0, 0)
    return Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


_dumps = JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


@dataclass(slots=True)
class _Told:
    """What is known of one choice between events: logprobs whose text is still incomplete, and text offsets."""

    offsets: Offsets = field(default_factory=Offsets)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class EventWriter:
    """Server-sent events of one streamed answer.

    A chunk with text is one event; one without (half a character, a possible stop string) is none, and its logprobs
    go into the next event of its choice. A choice ends with an event of its own that has no text.
    """

    def __init__(self, envelope: Envelope, shape: Shape, choices: int, *, logprobs: bool, usage: bool) -> None:
        self._shape = shape
        self._with_logprobs = logprobs
        self._with_usage = usage
        head = _dumps(
            {
                "id": envelope.id,
                "object": shape.stream,
                "created": envelope.created,
                "model": envelope.model,
                "system_fingerprint": envelope.fingerprint,
            }
        )
        self._head = f'data: {head[:-1]},"choices":['
        rest = (',"usage":null' if usage else "") + "}\n\n"
        self._tail = f',"finish_reason":null}}]{rest}'
        self._tails = {reason: f',"finish_reason":"{reason}"}}]{rest}' for reason in FinishReason}
        deltas = [shape.delta(index) for index in range(choices)]
        self._before = [self._head + before for before, _ in deltas]
        self._after = deltas[0][1]
        self._plain_after = f'{self._after},"logprobs":null{self._tail}'
        self._told = [_Told() for _ in range(choices)]

    def opening(self) -> str:
        """What comes before the first token: in a chat, who speaks."""
        if not self._shape.opens_with_role:
            return ""
        role = '"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null'
        return "".join(f'{self._head}{{"index":{index},{role}{self._tail}' for index in range(len(self._told)))

    def events(self, chunks: Sequence[Chunk]) -> str:
        return "".join([self._event(chunk) for chunk in chunks])

    def closing(self, usage: Usage) -> str:
        if not self._with_usage:
            return ""
        return f'{self._head}],"usage":{_dumps(usage_object(usage))}}}\n\n'

    def _event(self, chunk: Chunk) -> str:
        if self._with_logprobs:
            self._told[chunk.index].logprobs.extend(chunk.logprobs)
        text = ""
        if chunk.text:
            after = f"{self._after},{self._logprobs(chunk)}{self._tail}" if self._with_logprobs else self._plain_after
            text = self._before[chunk.index] + encode_basestring(chunk.text) + after
        if chunk.finish_reason is None:
            return text
        last = f"{self._shape.last_delta(chunk.index)},{self._logprobs(chunk)}{self._tails[chunk.finish_reason]}"
        return f"{text}{self._head}{last}"

    def _logprobs(self, chunk: Chunk) -> str:
        told = self._told[chunk.index]
        if not told.logprobs:
            return '"logprobs":null'
        waiting, told.logprobs = told.logprobs, []
        return f'"logprobs":{_dumps(self._shape.logprobs(waiting, told.offsets))}'


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class Collected:
    """One whole answer, gathered chunk by chunk."""

    def __init__(self, choices: int, *, logprobs: bool) -> None:
        self._choices = [_Choice() for _ in range(choices)]
        self._with_logprobs = logprobs

    def add(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            choice = self._choices[chunk.index]
            if chunk.text:
                choice.texts.append(chunk.text)
            if chunk.logprobs:
                choice.logprobs.extend(chunk.logprobs)
            if chunk.finish_reason is not None:
                choice.finish_reason = chunk.finish_reason

    def text(self, choice: int) -> str:
        return "".join(self._choices[choice].texts)

    def body(self, envelope: Envelope, shape: Shape, usage: Usage) -> bytes:
        answer = {
            "id": envelope.id,
            "object": shape.unary,
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.fingerprint,
            "choices": [
                {
                    **shape.choice(index, "".join(choice.texts)),
                    "logprobs": shape.logprobs(choice.logprobs, Offsets()) if self._with_logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(self._choices)
            ],
            "usage": usage_object(usage),
        }
        return _dumps(answer).encode()
