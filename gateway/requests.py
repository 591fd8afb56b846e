"""The request bodies of OpenAI's API: validated here, once, and nowhere behind this door.

Types are strict (a number in quotes is an error) and the first thing wrong becomes an InvalidRequest whose `param` is
the path of the field, e.g. "messages.0.content". Beyond OpenAI's fields, vLLM's top_k, min_p, repetition_penalty,
min_tokens, ignore_eos, stop_token_ids and priority are understood.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway import refused
from replicas.protocol import InvalidRequest, NotSupported, SamplingParams

_Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
_Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Positive = Annotated[int, Field(ge=1, le=2**31 - 1)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
# How many ranks later than its class a request may ask to be served.
MOST_LATER = 100
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]

# extra="allow" only so that `refused` can tell unimplemented from unknown; nothing extra is ever let through.
_STRICT = ConfigDict(
    extra="allow",
    strict=True,
    allow_inf_nan=False,
    json_schema_extra=lambda schema: schema.update(additionalProperties=False),
)


class StreamOptions(BaseModel):
    model_config = _STRICT

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Generation(BaseModel):
    """What both endpoints share. `sampling` is the engine's view of it."""

    model_config = _STRICT

    model: Annotated[str, Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: _Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    seed: _Int64 | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[_Count] | None = None
    priority: Annotated[int, Field(ge=0, le=MOST_LATER)] | None = None
    service_tier: str | None = None

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, logprobs: int | None, vocab_size: int) -> SamplingParams:
        """Everything the engine needs. InvalidRequest where fields contradict each other or leave the vocabulary."""
        given: dict[str, Any] = {
            name: value
            for name in self.model_fields_set & _SAMPLING_FIELDS
            if (value := getattr(self, name)) is not None
        }
        if self.top_k == -1:  # vLLM's other spelling of "off"
            given["top_k"] = 0
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.stop_token_ids:
            given["stop_token_ids"] = tuple(self.stop_token_ids)
            check_token_ids(self.stop_token_ids, vocab_size, "stop_token_ids")
        if self.logit_bias:
            given["logit_bias"] = _logit_bias(self.logit_bias, vocab_size)
        params = SamplingParams(max_tokens=max_tokens, logprobs=logprobs, **given)
        params.validate()
        return params


_SAMPLING_FIELDS = frozenset(
    [
        "n",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "min_tokens",
        "ignore_eos",
    ]
)


class TextPart(BaseModel):
    model_config = _STRICT

    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None


class ChatRequest(Generation):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: _Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def prompt_count(self) -> int:
        return 1

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        refused.check_extra(self.model_extra, refused.CHAT, type(self).model_fields, "")
        _check_stream_options(self)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise InvalidRequest(
                f"max_tokens ({both[0]}) and max_completion_tokens ({both[1]}) differ; give one of them",
                param="max_completion_tokens",
            )
        for index, message in enumerate(self.messages):
            _check_message(message, f"messages.{index}.")

    @property
    def subject(self) -> str:
        """What is asked: the last message of the user, or the last one."""
        asked = next((message for message in reversed(self.messages) if message.role == "user"), self.messages[-1])
        return _template_message(asked)["content"]

    @property
    def turns(self) -> Sequence[Mapping[str, Any]]:
        """What a conversation is known by."""
        return self.template_messages()

    def template_messages(self) -> list[dict[str, str]]:
        """What a chat template reads. Text parts are joined with newlines, as vLLM does for templates of plain text."""
        return [_template_message(message) for message in self.messages]


class CompletionRequest(Generation):
    prompt: str | list[str] | list[_Count] | list[list[_Count]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None

    @property
    def turns(self) -> None:
        """A text is no conversation."""

    @property
    def token_limit(self) -> int:
        # The default that OpenAI and vLLM document for this endpoint.
        return self.max_tokens if self.max_tokens is not None else 16

    @property
    def logprobs_wanted(self) -> int | None:
        return self.logprobs

    def check(self) -> None:
        refused.check_extra(self.model_extra, refused.COMPLETION, type(self).model_fields, "")
        _check_stream_options(self)
        if self.best_of is not None and self.best_of != self.choices:
            raise NotSupported("best_of other than n is not supported", param="best_of")

    @property
    def prompt_count(self) -> int:
        return (
            1 if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)) else len(self.prompt)
        )

    @property
    def subject(self) -> str:
        """What is asked, as far as it is text."""
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return "\n\n".join(text for text in texts if isinstance(text, str))

    def prompts(self) -> list[str] | list[list[int]]:
        """All texts, or all token ids; InvalidRequest when there is none."""
        prompt: Any = self.prompt
        if not prompt:
            raise InvalidRequest("prompt must not be empty", param="prompt")
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


R = TypeVar("R", ChatRequest, CompletionRequest)


def parse(kind: type[R], body: bytes) -> R:
    """The validated request, or InvalidRequest / NotSupported naming the first thing that is wrong."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _invalid(error, body) from None
    request.check()
    return request


def check_token_ids(ids: Sequence[int], vocab_size: int, param: str) -> None:
    if max(ids) >= vocab_size:
        index = next(i for i, token in enumerate(ids) if token >= vocab_size)
        raise InvalidRequest(
            f"{param}.{index}: token id {ids[index]} is outside the vocabulary of {vocab_size}",
            param=f"{param}.{index}",
        )


def _logit_bias(bias: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        # isdecimal alone would let other scripts' digits and 4301-digit numbers (a ValueError) through
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            shown = key[:32]
            raise InvalidRequest(
                f"logit_bias: {shown!r} is not a token id below {vocab_size}", param=f"logit_bias.{shown}"
            )
        pairs[int(key)] = value
    return tuple(pairs.items())


def _check_stream_options(request: Generation) -> None:
    options = request.stream_options
    if options is None:
        return
    if not request.stream:
        raise InvalidRequest("stream_options is only allowed with stream: true", param="stream_options")
    refused.check_extra(options.model_extra, {}, StreamOptions.model_fields, "stream_options.")


def _check_message(message: Message, at: str) -> None:
    refused.check_extra(message.model_extra, refused.MESSAGE, Message.model_fields, at)
    if isinstance(message.content, str):
        return
    if not message.content:
        raise InvalidRequest(f"{at}content must not be an empty list", param=f"{at}content")
    for index, part in enumerate(message.content):
        path = f"{at}content.{index}."
        if part.type != "text":
            raise NotSupported(f"content parts of type {part.type[:64]!r} are not supported", param=f"{path}type")
        refused.check_extra(part.model_extra, refused.PART, TextPart.model_fields, path)
        if part.text is None:
            raise InvalidRequest(f"{path}text is missing", param=f"{path}text")


def _template_message(message: Message) -> dict[str, str]:
    content = message.content
    if not isinstance(content, str):
        content = "\n".join(part.text or "" for part in content)
    plain = {"role": message.role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _invalid(error: ValidationError, body: bytes) -> InvalidRequest:
    problems = error.errors(include_url=False, include_input=False, include_context=False)
    if problems[0]["type"] == "json_invalid":
        return InvalidRequest(f"the request body is not valid JSON: {problems[0]['msg']}")
    data = json.loads(body)
    # Every member of a union reports; the one that got deepest into the caller's data is the one that was meant.
    first = _path(problems[0], data)
    related = [(path, problem) for problem in problems if (path := _path(problem, data))[:1] == first[:1]]
    path, problem = max(related, key=lambda pair: len(pair[0]))
    if not path:
        return InvalidRequest("the request body must be a JSON object")
    alternatives = dict.fromkeys(other["msg"] for where, other in related if where == path)
    param = ".".join(str(part) for part in path)[:200]
    message = "field required" if problem["type"] == "missing" else " or ".join(alternatives)
    return InvalidRequest(f"{param}: {message}", param=param)


def _path(problem: Mapping[str, Any], data: Any) -> tuple[str | int, ...]:
    """The part of pydantic's location that exists in the body, without the names it gives to members of a union."""
    return tuple(_walk(problem["loc"], data, problem["type"] == "missing"))


def _walk(loc: tuple[str | int, ...], data: Any, missing: bool) -> Iterator[str | int]:
    for depth, part in enumerate(loc):
        if isinstance(data, dict) and part in data:
            data = data[str(part)]
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
        elif not (missing and depth == len(loc) - 1):
            continue
        yield part
