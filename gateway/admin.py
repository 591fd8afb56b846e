"""/admin/v1/policies: what `signalbox policy` does, over HTTP, for whoever holds an admin token.

The token is checked before anything of the body is read. Everything that touches the database for long (a publication
waits for every gateway) runs in threads of its own, with connections of its own: neither the event loop nor the thread
that checks API keys ever waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Message, Scope

from gateway.admin_tokens import AdminTokens
from gateway.db.database import Database
from gateway.edge import header, read_body
from gateway.generations import MOST_ID, HistoryEntry, StoredGeneration
from gateway.policy_register import Change, PolicyRegister
from gateway.schemas import ADMIN, ErrorResponse
from policies.document import FleetNames
from policies.document_schema import schema
from policies.yaml_text import MAX_BYTES
from replicas.protocol import InvalidRequest

T = TypeVar("T")

# JSON may write a character of a document as six
MAX_BODY_BYTES = 6 * MAX_BYTES + 20_000
BODY_TIMEOUT_S = 30.0
_THREADS = 4


class Admin:
    """What the admin routes need between start and stop. Names and predictors as for PolicyRegister."""

    def __init__(
        self,
        database: Database,
        database_url: str,
        secret: bytes,
        *,
        names: FleetNames | None = None,
        predictors: Path | None = None,
    ) -> None:
        self.tokens = AdminTokens(database, secret)
        self._register = PolicyRegister(database_url, names=names, predictors=predictors)
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="gateway-admin")

    async def run(self, work: Callable[[PolicyRegister], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, self._register)

    async def aclose(self) -> None:
        """A publication that still waits for gateways gives up."""
        self._register.stop()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)
        self._register.close()


# ------------------------------------------------------------------------------------------------------------- messages


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


Share = Annotated[float, Field(gt=0, le=1)]
Why = Annotated[str, Field(max_length=2000)]


class DocumentBody(_Closed):
    """A policy document as YAML text."""

    document: str


class PublishBody(_Closed):
    """canary: share of the keys to begin with (1: all). parent: only if this generation is the active one."""

    document: str
    why: Why = ""
    canary: Share | None = None
    parent: int | None = None


class RollbackBody(_Closed):
    """to: a generation; by default the end of the canary or, without one, the active generation's parent."""

    why: Why = ""
    to: int | None = None


class PromoteBody(_Closed):
    """share: of the keys; by default all."""

    why: Why = ""
    share: Share | None = None


class CancelBody(_Closed):
    why: Why = ""


class Validated(_Closed):
    """`normalised` is what the document states as JSON; `changes` against the active generation."""

    valid: bool
    normalised: str
    changes: list[str]


class Changes(_Closed):
    changes: list[str]


class Serving(_Closed):
    """Which generation serves, and which one a share of the keys is served by."""

    active: int
    canary: int | None
    share: float


class Changed(Serving):
    """A change that every live gateway has confirmed, except `unanswered`. late_ms: 0, or how late the last one was."""

    changes: list[str]
    gateways: list[str]
    unanswered: list[str]
    late_ms: float


class GenerationSummary(_Closed):
    """state: active, canary, proposed, refused or past. share: of the keys that it serves now."""

    number: int
    state: str
    share: float
    sha256: str
    author: str
    created_at: float
    note: str
    parent: int | None


class GenerationDetail(_Closed):
    """A generation with its document as it was given."""

    number: int
    document: str
    normalised: str
    sha256: str
    author: str
    created_at: float
    note: str
    parent: int | None


class History(Serving):
    data: list[GenerationSummary]


class AuditRow(_Closed):
    """outcome: done, refused (the request is wrong) or failed (a gateway refused it), with the reason in `detail`."""

    id: int
    at: float
    actor: str
    action: str
    target: str
    diff: str
    why: str
    outcome: str
    detail: str


class AuditLog(_Closed):
    data: list[AuditRow]


class GatewayState(_Closed):
    id: str
    seen_at: float
    prepared: int
    refusal: str | None
    serving: int


class GatewayStates(_Closed):
    data: list[GatewayState]


# --------------------------------------------------------------------------------------------------------------- router


_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The document or the request is wrong; the message names the line."},
    401: {"model": ErrorResponse, "description": "No admin token, or a wrong or revoked one."},
    404: {"model": ErrorResponse, "description": "No generation of that number."},
    409: {"model": ErrorResponse, "description": "Somebody else is changing, or has changed, the policy."},
    422: {"model": ErrorResponse, "description": "A gateway cannot serve it. Nothing has changed."},
}


def create_router(admin: Callable[[], Admin]) -> APIRouter:
    """The routes. `admin` answers while the gateway runs. Errors are raised as SignalboxError for the edge to write."""
    router = APIRouter(
        prefix="/admin/v1/policies",
        tags=["policies"],
        route_class=_guarded(admin),
        dependencies=[Security(ADMIN)],
        responses=_REFUSALS,
    )
    _add_looking(router, admin)
    _add_changing(router, admin)
    return router


def _guarded(admin: Callable[[], Admin]) -> type[APIRoute]:
    """Routes that know who is there before they read a byte of the body, and then read a bounded number."""

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()

            async def guarded(request: Request) -> Response:
                token = await admin().tokens.authenticate(header(request.scope, b"authorization"))
                request.state.author = token.name
                body = await read_body(request.scope, request.receive, MAX_BODY_BYTES, BODY_TIMEOUT_S)
                try:
                    return await handle(Request(_as_json(request.scope), _again(body, request)))
                except RequestValidationError as error:
                    raise _invalid(error) from None

            return guarded

    return Guarded


def _as_json(scope: Scope) -> Scope:
    """Bodies are JSON here, whatever a client calls them: curl says application/x-www-form-urlencoded unless told."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*headers, (b"content-type", b"application/json")]}


def _again(body: bytes, request: Request) -> Callable[[], Coroutine[Any, Any, Message]]:
    """A receive that gives the body that was read, then what really comes."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return rest.pop() if rest else await request.receive()

    return receive


def _invalid(error: RequestValidationError) -> InvalidRequest:
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return InvalidRequest("the request body is not valid JSON")
    path = ".".join(str(part) for part in problem["loc"][1:])
    return InvalidRequest(f"{path or 'body'}: {problem['msg']}", param=path or None)


def _author(request: Request) -> str:
    author: str = request.state.author
    return author


Author = Annotated[str, Depends(_author)]


def _add_looking(router: APIRouter, admin: Callable[[], Admin]) -> None:
    @router.get("")
    async def history(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> History:
        """What serves, and the newest generations."""
        state, entries = await admin().run(lambda register: (register.state(), register.history(limit)))
        data = [_summary(entry) for entry in entries]
        return History(active=state.active, canary=state.canary, share=state.share, data=data)

    @router.get("/schema")
    async def json_schema() -> dict[str, Any]:
        """JSON Schema of the policy document."""
        return schema()

    @router.get("/audit")
    async def audit(
        limit: Annotated[int, Query(ge=1, le=1000)] = 50, before: Annotated[int | None, Query(ge=0, le=MOST_ID)] = None
    ) -> AuditLog:
        """Every change that was made or tried, newest first; `before` continues at that id."""
        entries = await admin().run(lambda register: register.audit(limit, before))
        return AuditLog(data=[AuditRow(**asdict(entry)) for entry in entries])

    @router.get("/gateways")
    async def gateways() -> GatewayStates:
        """The live gateways and the switch that each one serves by."""
        live = await admin().run(lambda register: register.gateways())
        return GatewayStates(
            data=[
                GatewayState(id=g.id, seen_at=g.seen_at, prepared=g.prepared, refusal=g.refusal, serving=g.serving)
                for g in live
            ]
        )

    @router.get("/active")
    async def active() -> GenerationDetail:
        """The active generation."""
        return _detail(await admin().run(lambda register: register.active()))

    @router.get("/diff")
    async def compare(
        before: Annotated[int, Query(alias="from", ge=0)], after: Annotated[int, Query(alias="to", ge=0)]
    ) -> Changes:
        """What differs between two generations: a line per path."""
        return Changes(changes=await admin().run(lambda register: register.compare(before, after)))

    @router.get("/{number}")
    async def show(number: int) -> GenerationDetail:
        """One generation."""
        return _detail(await admin().run(lambda register: register.show(number)))

    @router.post("/validate")
    async def validate(body: DocumentBody) -> Validated:
        """Check a document, also against the running fleet; an invalid one is answered with 400."""
        document, changes = await admin().run(
            lambda register: (register.validate(body.document), register.diff(body.document))
        )
        return Validated(valid=True, normalised=document.normalised(), changes=changes)

    @router.post("/diff")
    async def diff(body: DocumentBody) -> Changes:
        """What a document would change of the active generation."""
        return Changes(changes=await admin().run(lambda register: register.diff(body.document)))


def _add_changing(router: APIRouter, admin: Callable[[], Admin]) -> None:
    @router.post("")
    async def publish(body: PublishBody, author: Author) -> Changed:
        """Publish a document. Answered when every live gateway serves by it."""
        return _changed(
            await admin().run(
                lambda register: register.publish(
                    body.document, author=author, why=body.why, canary=body.canary, parent=body.parent
                )
            )
        )

    @router.post("/rollback")
    async def rollback(body: RollbackBody, author: Author) -> Changed:
        """Serve by an earlier generation again."""
        return _changed(await admin().run(lambda register: register.rollback(author=author, why=body.why, to=body.to)))

    @router.post("/canary/promote")
    async def promote(body: PromoteBody, author: Author) -> Changed:
        """Serve more keys by the canary, or all."""
        return _changed(
            await admin().run(lambda register: register.promote(author=author, why=body.why, share=body.share))
        )

    @router.post("/canary/cancel")
    async def cancel(body: CancelBody, author: Author) -> Changed:
        """End the canary."""
        return _changed(await admin().run(lambda register: register.cancel(author=author, why=body.why)))


def _summary(entry: HistoryEntry) -> GenerationSummary:
    return GenerationSummary(**asdict(entry))


def _detail(generation: StoredGeneration) -> GenerationDetail:
    return GenerationDetail(**asdict(generation))


def _changed(change: Change) -> Changed:
    switch = change.switch
    return Changed(
        active=switch.active,
        canary=switch.canary,
        share=switch.share,
        changes=list(change.diff),
        gateways=list(change.gateways),
        unanswered=list(change.unanswered),
        late_ms=round(change.late_s * 1e3, 3),
    )
