"""GET /admin/v1/requests/{x-request-id}: what became of a request, and why, whichever gateway it went through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Security
from pydantic import BaseModel, ConfigDict

from gateway.admin_tokens import AdminTokens
from gateway.edge import header
from gateway.explain import EXPLAIN, UnknownRequest
from gateway.mailbox import Mailbox
from gateway.schemas import ADMIN, ErrorResponse

_REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": ErrorResponse, "description": "No admin token, or a wrong or revoked one."},
    404: {"model": ErrorResponse, "description": "No gateway remembers a request of that id."},
}


class Explained(BaseModel):
    """`data`: one entry per gateway that knows the id, newest first: more than one only if a caller used it twice."""

    model_config = ConfigDict(extra="forbid")

    data: list[dict[str, Any]]


def create_router(tokens: Callable[[], AdminTokens], mailbox: Callable[[], Mailbox]) -> APIRouter:
    router = APIRouter(
        prefix="/admin/v1/requests", tags=["requests"], responses=_REFUSALS, dependencies=[Security(ADMIN)]
    )

    @router.get("/{request_id:path}")
    async def explain(request_id: str, request: Request) -> Explained:
        """Candidates, every score term, generation, predicted and actual time to first token, cost and length."""
        await tokens().authenticate(header(request.scope, b"authorization"))
        return Explained(data=newest_first(await mailbox().ask(EXPLAIN, request_id), request_id))

    return router


def newest_first(answers: list[Any], request_id: str) -> list[dict[str, Any]]:
    """What the gateways that know the request said; UnknownRequest when none does."""
    known = [answer for answer in answers if answer is not None]
    if not known:
        raise UnknownRequest(f"no gateway remembers a request {request_id!r}; they keep the last hour", param="id")
    return sorted(known, key=lambda answer: float(answer["created_at"]), reverse=True)
