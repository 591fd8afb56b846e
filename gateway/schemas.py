"""Shapes of the answers, for /openapi.json and for the tests that hold the hand-written bytes to them."""

from __future__ import annotations

from typing import Literal

from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict

# Only says in /openapi.json what the admin routes ask for; `admin_tokens` checks it.
ADMIN = HTTPBearer(scheme_name="admin", description="An admin token, adm-...", auto_error=False)

FinishReason = Literal["stop", "length"]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorDetail(_Closed):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(_Closed):
    error: ErrorDetail


class PromptTokensDetails(_Closed):
    cached_tokens: int


class UsageObject(_Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(_Closed):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Closed):
    content: list[ChatTokenLogprob]
    refusal: None


class ChatMessage(_Closed):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Closed):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(_Closed):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageObject


class ChatDelta(_Closed):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(_Closed):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(_Closed):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageObject | None = None


class CompletionLogprobs(_Closed):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Closed):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class Completion(_Closed):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageObject


class CompletionChunkChoice(CompletionChoice):
    finish_reason: FinishReason | None  # type: ignore[assignment]


class CompletionChunk(_Closed):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: UsageObject | None = None


class ModelObject(_Closed):
    """`root` is the model that answers when `id` is an alias."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    max_model_len: int | None


class ModelList(_Closed):
    object: Literal["list"] = "list"
    data: list[ModelObject]


class Health(_Closed):
    """`ok`: every model has a ready replica; `degraded`: some have; `unavailable` (503): none has."""

    status: Literal["ok", "degraded", "unavailable"]
    ready_replicas: dict[str, int]
