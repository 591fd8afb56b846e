"""/openapi.json: FastAPI's own document, plus the two endpoints that FastAPI does not parse for us."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from gateway.deadline import HEADER, LONGEST_MS
from gateway.requests import ChatRequest, CompletionRequest
from gateway.schemas import ChatCompletion, ChatCompletionChunk, Completion, CompletionChunk, ErrorResponse

_REFUSALS = {
    "400": "The request is malformed, asks for something that is not supported, or is too long.",
    "401": "No key, or a wrong or revoked one.",
    "404": "No such model.",
    "413": "The body is too large.",
    "500": "Our fault.",
    "503": "No replica can take the request now, or its queue is full; see Retry-After.",
    "504": "The time limit has passed.",
}

_ENDPOINTS: dict[str, tuple[str, type[BaseModel], type[BaseModel], type[BaseModel]]] = {
    "/v1/chat/completions": ("Continue a conversation.", ChatRequest, ChatCompletion, ChatCompletionChunk),
    "/v1/completions": ("Continue one or several prompts.", CompletionRequest, Completion, CompletionChunk),
}


def install(app: FastAPI) -> None:
    """Make `app.openapi()` tell of every endpoint and of the key that they need."""
    plain = app.openapi

    def whole() -> dict[str, Any]:
        document = plain()
        if "/v1/completions" not in document["paths"]:
            _extend(document)
        return document

    app.openapi = whole  # type: ignore[method-assign]


def _extend(document: dict[str, Any]) -> None:
    models = {model for _, *models in _ENDPOINTS.values() for model in models} | {ErrorResponse}
    _, definitions = models_json_schema(
        [(model, "validation") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(definitions["$defs"])
    components.setdefault("securitySchemes", {})["key"] = {"type": "http", "scheme": "bearer"}
    for path, (summary, request, whole, chunk) in _ENDPOINTS.items():
        document["paths"][path] = {"post": _operation(summary, request, whole, chunk)}
    for path, operations in document["paths"].items():
        if path.startswith("/v1/"):
            for operation in operations.values():
                operation["security"] = [{"key": []}]


def _operation(
    summary: str, request: type[BaseModel], whole: type[BaseModel], chunk: type[BaseModel]
) -> dict[str, Any]:
    answers: dict[str, Any] = {
        "200": {
            "description": "The whole answer, or with stream: true its events, ended by `data: [DONE]`.",
            "content": {
                "application/json": {"schema": _ref(whole)},
                "text/event-stream": {"schema": _ref(chunk)},
            },
        }
    }
    for status, description in _REFUSALS.items():
        answers[status] = {
            "description": description,
            "content": {"application/json": {"schema": _ref(ErrorResponse)}},
        }
    return {
        "summary": summary,
        "operationId": f"create_{whole.__name__.lower()}",
        "parameters": [
            {
                "name": HEADER,
                "in": "header",
                "required": False,
                "description": "Milliseconds after which nobody wants the answer.",
                "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_MS},
            }
        ],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": answers,
    }


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}
