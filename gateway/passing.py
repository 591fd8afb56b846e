"""Requests that are passed on to another server, and its answers written as ours.

What a local engine does not implement (tools, images, response formats) may be the very reason to ask an upstream, so
of such a body only what this gateway itself must know is checked; the rest is the upstream's to judge.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.requests import MOST_LATER
from gateway.responses import Envelope, Shape, usage_object
from replicas.protocol import InvalidRequest, Usage
from replicas.upstream_messages import Assembled, UpstreamChunk, UpstreamRequest, UpstreamUsage

_MAX_CHOICES = 128
_MAX_NAME = 256
_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class PassedRequest:
    """A body as JSON, with the views of it that `gateway.requests`' types have too."""

    body: Mapping[str, Any]

    @property
    def model(self) -> str:
        return str(self.body["model"])

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def include_usage(self) -> bool:
        return bool((self.body.get("stream_options") or {}).get("include_usage"))

    @property
    def choices(self) -> int:
        return self.body.get("n") or 1

    @property
    def prompt_count(self) -> int:
        return UpstreamRequest(request_id="", body=self.body).choices // self.choices

    @property
    def priority(self) -> int | None:
        ranks: int | None = self.body.get("priority")
        return ranks

    @property
    def service_tier(self) -> str | None:
        tier: str | None = self.body.get("service_tier")
        return tier

    @property
    def token_limit(self) -> int | None:
        limit: int | None = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        return limit

    @property
    def turns(self) -> Sequence[Any] | None:
        """What a conversation is known by; None where this is none."""
        messages = self.body.get("messages")
        return messages if isinstance(messages, list) else None

    @property
    def logprobs_wanted(self) -> int | None:
        return None

    @property
    def subject(self) -> str:
        """What is asked, as far as it is text."""
        messages = self.body.get("messages")
        if messages is None:
            return str(self.body.get("prompt", ""))
        asked = [one for one in messages if isinstance(one, dict) and one.get("role") == "user"]
        content = (asked or [{}])[-1].get("content")
        if isinstance(content, list):
            return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
        return str(content or "")


def read(body: bytes, param: str) -> PassedRequest:
    """InvalidRequest naming the first of the fields that we need and cannot use. `param` holds the prompt."""
    try:
        data = json.loads(body, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        raise InvalidRequest("the request body is not valid JSON") from None
    if not isinstance(data, dict):
        raise InvalidRequest("the request body must be a JSON object")
    if not isinstance(data.get("model"), str) or len(data["model"]) > _MAX_NAME:
        raise InvalidRequest(f"model: must be a string of at most {_MAX_NAME} characters", param="model")
    _check_prompt(data, param)
    for name in ("stream", "n", "max_tokens", "max_completion_tokens"):
        _check_number(name, data.get(name))
    if type(ranks := data.get("priority", 0)) is not int or not 0 <= ranks <= MOST_LATER:
        raise InvalidRequest(f"priority: must be a whole number from 0 to {MOST_LATER}", param="priority")
    if not isinstance(data.get("service_tier") or "", str):
        raise InvalidRequest("service_tier: must be a string", param="service_tier")
    if not isinstance(data.get("stream_options") or {}, dict):
        raise InvalidRequest("stream_options: must be an object", param="stream_options")
    return PassedRequest(data)


def _finite(text: str) -> float:
    """JSON has no other numbers, and the body must be JSON again when it goes on."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _check_prompt(data: Mapping[str, Any], param: str) -> None:
    """What its tokens can be counted of. The other endpoint's field would send the body there."""
    other = "prompt" if param == "messages" else "messages"
    if other in data:
        raise InvalidRequest(f"{other}: is not a field of this endpoint", param=other)
    value = data.get(param)
    if not value:
        raise InvalidRequest(f"{param}: must not be empty", param=param)
    if param == "messages":
        if not _list_of(value, dict):
            raise InvalidRequest("messages: must be a list of objects", param="messages")
    elif not (isinstance(value, str) or _list_of(value, str) or _list_of(value, int) or _lists_of_ids(value)):
        raise InvalidRequest("prompt: must be one or more texts, or one or more lists of token ids", param="prompt")


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {kind}


def _lists_of_ids(value: Any) -> bool:
    return _list_of(value, list) and all(_list_of(ids, int) for ids in value)


def _check_number(name: str, value: Any) -> None:
    if value is None:
        return
    if name == "stream":
        if not isinstance(value, bool):
            raise InvalidRequest("stream: must be true or false", param="stream")
    elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest(f"{name}: must be a positive integer", param=name)
    elif value > (most := _MAX_CHOICES if name == "n" else _MAX_TOKENS):
        raise InvalidRequest(f"{name}: must not be more than {most}", param=name)


def usage_shown(usage: Usage) -> dict[str, Any]:
    """`usage` of an answer; counted by us where the upstream told nothing, and then it says so."""
    shown = usage_object(usage)
    if isinstance(usage, UpstreamUsage):
        if usage.reasoning_tokens:
            shown["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
        if usage.estimated:
            shown["estimated"] = True
    return shown


def _dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


class PassedWriter:
    """Server-sent events of an upstream's answer, every chunk as the upstream said it, under our own id and model."""

    def __init__(self, envelope: Envelope, shape: Shape, choices: int, *, usage: bool) -> None:
        self._chat = shape.opens_with_role
        self._choices = choices
        self._with_usage = usage
        self._head = {
            "id": envelope.id,
            "object": shape.stream,
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.fingerprint,
        }

    def opening(self) -> str:
        if not self._chat:
            return ""
        role = {"role": "assistant", "content": "", "refusal": None}
        opened = [
            {"index": index, "delta": role, "logprobs": None, "finish_reason": None} for index in range(self._choices)
        ]
        return "".join(self._event([choice]) for choice in opened)

    def events(self, chunks: Sequence[UpstreamChunk]) -> str:
        return "".join(self._event([chunk.choice(chat=self._chat)]) for chunk in chunks if not chunk.terminal)

    def closing(self, usage: Usage) -> str:
        return self._event([], usage_shown(usage)) if self._with_usage else ""

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        event: dict[str, Any] = {**self._head, "choices": choices}
        if self._with_usage:
            event["usage"] = usage
        return f"data: {_dumps(event)}\n\n"


class PassedAnswer:
    """One whole answer of an upstream."""

    def __init__(self, choices: int, *, chat: bool) -> None:
        self._assembled = Assembled(choices, chat=chat)
        self._texts: list[str] = []

    def add(self, chunks: Sequence[UpstreamChunk]) -> None:
        self._assembled.add(chunks)
        self._texts += [chunk.text for chunk in chunks if chunk.index == 0]

    def text(self, choice: int) -> str:
        assert choice == 0, "only the first is kept as text"
        return "".join(self._texts)

    def body(self, envelope: Envelope, shape: Shape, usage: Usage) -> bytes:
        answer = {
            "id": envelope.id,
            "object": shape.unary,
            "created": envelope.created,
            "model": envelope.model,
            "system_fingerprint": envelope.fingerprint,
            "choices": self._assembled.choices(),
            "usage": usage_shown(usage),
        }
        return _dumps(answer).encode()
