"""One upstream's answer, event by event: JSON checked and turned into chunks, ends and usage kept track of.

No I/O. Nothing is a chunk that shows nothing (the opening role, empty deltas, keep-alives): until the first chunk the
gateway may still go elsewhere, so a chunk must mean that there is something to show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from replicas.protocol import NotSupported, SignalboxError
from replicas.upstream_errors import Refusals, UpstreamLost
from replicas.upstream_messages import UpstreamChunk, UpstreamRequest, UpstreamUsage
from replicas.upstream_tokens import Count

_DONE = "[DONE]"
# What other servers call OpenAI's reasons (TGI, Mistral, Anthropic's dialect); any other name is handed on.
_REASONS = {
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "model_length": "length",
}
# Python servers write these, JSON has none of them; the first is OpenAI's own way to say "practically impossible".
_CONSTANTS = {"-Infinity": -9999.0, "Infinity": None, "NaN": None}
_DECODER = json.JSONDecoder(parse_constant=_CONSTANTS.get)


class Answer:
    """The state of one answer. `events` counts those that carried choices, `done` says that [DONE] has come."""

    def __init__(self, request: UpstreamRequest, refusals: Refusals) -> None:
        self._request = request
        self._refusals = refusals
        self._open = set(range(request.choices))
        self._said: list[str] = []
        self._spoke: set[int] = set()
        self._pieces = 0
        self._calls: dict[int, int] = {}
        self._usage: UpstreamUsage | None = None
        self.events = 0
        self.done = False

    @property
    def complete(self) -> bool:
        """Every choice has its finish_reason: nothing that a caller would miss can still come."""
        return not self._open

    @property
    def begun(self) -> bool:
        """Something was said or ended."""
        return bool(self._spoke) or len(self._open) < self._request.choices

    def take(self, data: str) -> list[UpstreamChunk]:
        """Chunks of one event's data. Raises what the upstream reports; UpstreamLost for what makes no sense."""
        if data == _DONE:
            self.done = True
            return self._last()
        if not data.strip():
            return []
        return self._event(_object(data))

    def take_whole(self, body: str) -> list[UpstreamChunk]:
        """Chunks of an answer that was not streamed."""
        chunks = self._event(_object(body))
        self.done = True
        return chunks + self._last()

    def terminal(self, count: Count) -> UpstreamChunk:
        return UpstreamChunk(request_id=self._request.request_id, usage=self.usage(count))

    def usage(self, count: Count) -> UpstreamUsage:
        """The upstream's own figures, or ours for what has come so far: a piece of text is a token at the least."""
        if self._usage is not None:
            return self._usage
        completion = max(count("".join(self._said)), self._pieces)
        return UpstreamUsage(prompt_tokens=self._request.prompt_tokens, completion_tokens=completion, estimated=True)

    # ------------------------------------------------------------------------------------------------------- inside

    def _last(self) -> list[UpstreamChunk]:
        """What is left to say when the server says that this was all."""
        if not self.begun:
            raise UpstreamLost("the upstream ended its answer before it began")
        if not self._open <= self._spoke:
            # not a fault of its health: it will do the same next time
            raise NotSupported("the upstream gave fewer choices than were asked for; ask it for one", param="n")
        return [self._chunk(index, finish_reason="stop") for index in sorted(self._open)]

    def _event(self, event: Mapping[str, Any]) -> list[UpstreamChunk]:
        if event.get("error") or event.get("object") == "error":
            raise self._refusals.of_event(event)
        if isinstance(usage := event.get("usage"), dict):
            self._usage = _usage(usage) or self._usage  # some servers send a running count; the last one is right
        choices = event.get("choices") or ()
        if not isinstance(choices, list | tuple):
            raise _nonsense("choices")
        if choices:
            self.events += 1
        try:
            return [chunk for choice in choices if (chunk := self._choice(choice)) is not None]
        except RecursionError:
            raise _nonsense("choices") from None

    def _choice(self, choice: Any) -> UpstreamChunk | None:
        if not isinstance(choice, dict):
            raise _nonsense("choices")
        index = choice.get("index") or 0
        if type(index) is not int or not 0 <= index < self._request.choices:
            raise _nonsense("index")
        reason = choice.get("finish_reason") or None
        if reason is not None and not isinstance(reason, str):
            raise _nonsense("finish_reason")
        logprobs = choice.get("logprobs") or None
        if logprobs is not None and not isinstance(logprobs, dict):
            raise _nonsense("logprobs")
        delta, text = self._words(index, choice)
        if not (text or delta or logprobs or (reason and index in self._open)):
            return None
        if reason and index not in self._open:
            reason = None  # an end is told once
        return self._chunk(index, text=text, delta=delta, logprobs=logprobs, finish_reason=reason)

    def _chunk(
        self,
        index: int,
        *,
        text: str = "",
        delta: Mapping[str, Any] | None = None,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> UpstreamChunk:
        self._spoke.add(index)
        if finish_reason is not None:
            self._open.discard(index)
            finish_reason = _REASONS.get(finish_reason, finish_reason)
        return UpstreamChunk(
            request_id=self._request.request_id,
            index=index,
            text=text,
            delta=delta or {},
            logprobs=logprobs,
            finish_reason=finish_reason,
        )

    def _words(self, index: int, choice: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """(delta, text) of one choice; what counts as output is remembered for the count."""
        if not self._request.chat:
            text = choice.get("text") or ""
            if not isinstance(text, str):
                raise _nonsense("text")
            self._say([text])
            return {}, text
        given = choice.get("delta") or choice.get("message") or {}
        if not isinstance(given, dict):
            raise _nonsense("delta")
        delta = {name: value for name, value in given.items() if name != "role" and value not in (None, "", [])}
        if "tool_calls" in delta:
            delta["tool_calls"] = self._tool_calls(index, delta["tool_calls"])
            delta.pop("function_call", None)  # llama-cpp-python says the same a second time in the older form
        content = delta.get("content", "")
        if not isinstance(content, str):
            raise _nonsense("content")
        self._say(_strings(delta))
        return delta, content

    def _say(self, texts: list[str]) -> None:
        said = [text for text in texts if text]
        self._said += said
        self._pieces += bool(said)

    def _tool_calls(self, index: int, calls: Any) -> list[dict[str, Any]]:
        """Each with the `index` by which clients put the pieces together; some servers leave it out."""
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise _nonsense("tool_calls")
        numbered = []
        for call in calls:
            number = call.get("index")
            if number is None:
                begins = bool(call.get("id")) or index not in self._calls
                number = self._calls.get(index, -1) + begins
            if type(number) is not int or not 0 <= number < 1024:
                raise _nonsense("tool_calls")
            self._calls[index] = number
            numbered.append({"index": number, **{name: value for name, value in call.items() if name != "index"}})
        return numbered


def _object(text: str) -> dict[str, Any]:
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:
            value = _whole_characters(value)
    except (ValueError, RecursionError):
        raise UpstreamLost("the upstream sent something that is not JSON") from None
    if not isinstance(value, dict):
        raise UpstreamLost("the upstream sent something that is not an object")
    return value


def _whole_characters(value: Any) -> Any:
    """Halves of surrogate pairs, which JavaScript servers can tear apart, become U+FFFD: UTF-8 has no halves."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole_characters(item) for item in value]
    if isinstance(value, dict):
        return {_whole_characters(name): _whole_characters(item) for name, item in value.items()}
    return value


def _nonsense(field: str) -> SignalboxError:
    return UpstreamLost(f"the upstream sent an event whose {field!r} makes no sense")


def _strings(value: Any) -> list[str]:
    """What the model wrote: contents, reasoning, and names and arguments of tool calls."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in _strings(item)]
    if isinstance(value, dict):
        return [text for name, item in value.items() if name not in ("id", "type") for text in _strings(item)]
    return []


def _usage(usage: Mapping[str, Any]) -> UpstreamUsage | None:
    prompt, completion = _number(usage.get("prompt_tokens")), _number(usage.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    cached = _number(_inner(usage, "prompt_tokens_details", "cached_tokens")) or 0
    reasoning = _number(_inner(usage, "completion_tokens_details", "reasoning_tokens")) or 0
    return UpstreamUsage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        cached_tokens=min(cached, prompt),
        reasoning_tokens=min(reasoning, completion),
    )


def _inner(value: Mapping[str, Any], outer: str, inner: str) -> Any:
    details = value.get(outer)
    return details.get(inner) if isinstance(details, dict) else None


def _number(value: Any) -> int | None:
    """A number of tokens. One that no answer has is no figure: it would not fit on the books."""
    return value if type(value) is int and 0 <= value < 2**31 else None
