"""What goes to an upstream and what comes back: frozen values, standard library and protocol only.

An upstream's answer keeps the shape that the server gave it (tool calls, log-probabilities, refusals are JSON that we
hand on), because we do not have its tokens; only what the gateway must know is lifted out: text, ends, usage.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from replicas.protocol import RequestError, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamRequest:
    """One request, as the caller's validated body.

    body: OpenAI's fields, passed on as they are except model, stream and stream_options, which are the connection's
    business. A body with `messages` goes to /chat/completions, one with `prompt` to /completions.
    prompt_tokens: the gateway's estimate, for load and for usage that the upstream does not report.
    unary: the caller wants one whole answer; only matters with servers that report usage in no other way.
    deadline: on the event loop's clock (`loop.time()`); None for none.
    doubt: why we hold the body for wrong, where only the server can know; told if it fails at it.
    """

    request_id: str
    body: Mapping[str, Any]
    prompt_tokens: int = 0
    unary: bool = False
    traceparent: str | None = None
    tracestate: str | None = None
    deadline: float | None = None
    doubt: RequestError | None = None

    @property
    def chat(self) -> bool:
        return "messages" in self.body

    @property
    def choices(self) -> int:
        """How many choices the answer has: prompts x n, prompt p's choice c as index p * n + c."""
        n = self.body.get("n") or 1
        prompt = self.body.get("prompt")
        several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
        return int(n) * (len(prompt) if several and isinstance(prompt, list) else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamUsage(Usage):
    """Usage of an upstream's answer. estimated: counted by us, because the upstream told nothing."""

    estimated: bool = False
    reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamChunk:
    """One event for one choice, or the end.

    delta: what a chat event says (content, tool_calls, reasoning_content, refusal, ...) as the upstream sent it, but
    without `role` and nulls, each tool call with its `index`; empty for completions, which have `text` only.
    text: the delta's content, or the completion's text. logprobs: as in the API. finish_reason ends choice `index`.
    usage: on exactly one chunk, the last, which has nothing else.
    """

    request_id: str
    index: int = 0
    text: str = ""
    delta: Mapping[str, Any] = field(default_factory=dict)
    logprobs: Mapping[str, Any] | None = None
    finish_reason: str | None = None
    usage: UpstreamUsage | None = None

    @property
    def terminal(self) -> bool:
        return self.usage is not None

    def choice(self, *, chat: bool) -> dict[str, Any]:
        """The member of `choices` in a chunk object of the API that says this."""
        said = {"delta": dict(self.delta)} if chat else {"text": self.text}
        return {"index": self.index, **said, "logprobs": self.logprobs, "finish_reason": self.finish_reason}


@dataclass(slots=True)
class _Choice:
    texts: list[str] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)  # reasoning_content, refusal, ...
    rest: dict[str, Any] = field(default_factory=dict)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    logprobs: dict[str, Any] | None = None
    finish_reason: str | None = None


class Assembled:
    """A whole answer put together from its chunks, for callers who did not ask for a stream."""

    def __init__(self, choices: int, *, chat: bool) -> None:
        self._chat = chat
        self._choices = [_Choice() for _ in range(choices)]
        self.usage: UpstreamUsage | None = None

    def add(self, chunks: Iterable[UpstreamChunk]) -> None:
        for chunk in chunks:
            if chunk.usage is not None:
                self.usage = chunk.usage
                continue
            choice = self._choices[chunk.index]
            choice.finish_reason = chunk.finish_reason or choice.finish_reason
            if chunk.text:
                choice.texts.append(chunk.text)
            if chunk.logprobs:
                choice.logprobs = _joined(choice.logprobs or {}, chunk.logprobs)
            for name, value in chunk.delta.items():
                _take(choice, name, value)

    def choices(self) -> list[dict[str, Any]]:
        """`choices` of a chat.completion or text_completion object."""
        return [self._whole(index, choice) for index, choice in enumerate(self._choices)]

    def _whole(self, index: int, choice: _Choice) -> dict[str, Any]:
        end = {"logprobs": choice.logprobs, "finish_reason": choice.finish_reason}
        text = "".join(choice.texts)
        if not self._chat:
            return {"index": index, "text": text, **end}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None, **choice.rest}
        message |= {name: "".join(parts) for name, parts in choice.others.items()}
        if choice.calls:
            message["tool_calls"] = [choice.calls[number] for number in sorted(choice.calls)]
        if not text and (choice.calls or message["refusal"]):
            message["content"] = None
        return {"index": index, "message": message, **end}


def _take(choice: _Choice, name: str, value: Any) -> None:
    if name == "content":
        return  # is the chunk's text
    if name == "tool_calls":
        for call in value:
            number = call["index"]
            known = choice.calls.setdefault(number, {})
            choice.calls[number] = _joined(known, {key: part for key, part in call.items() if key != "index"})
    elif isinstance(value, str):
        choice.others.setdefault(name, []).append(value)
    else:
        choice.rest = _joined(choice.rest, {name: value})


# Of a tool call's strings only the arguments come in pieces; some servers repeat the others with every piece.
_WHOLE = frozenset({"id", "type", "name"})


def _joined(known: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Two pieces of one JSON object: strings and lists appended, objects joined, the rest replaced; null is nothing."""
    joined = dict(known)
    for name, value in more.items():
        before = joined.get(name)
        if isinstance(before, dict) and isinstance(value, Mapping):
            joined[name] = _joined(before, value)
        elif isinstance(before, list) and isinstance(value, list):
            joined[name] = before + value
        elif isinstance(before, str) and isinstance(value, str) and name not in _WHOLE:
            joined[name] = before + value
        elif value is not None and (name not in _WHOLE or value or before is None):
            joined[name] = value
        else:
            joined.setdefault(name, value)
    return joined
