"""Puts the gateway together as one FastAPI application. No Ray here: a directory of replicas is handed in."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import admin_requests, admin_usage, logs, openapi
from gateway.admin import Admin, create_router
from gateway.answering import Answering, Kind
from gateway.config import GatewayConfig, ServedModel
from gateway.connection import Connect
from gateway.db.database import Database
from gateway.directory import Directory
from gateway.edge import EXCHANGE, Edge, header
from gateway.errors import routing_error_body
from gateway.explain import EXPLAIN, RecordBook, explained
from gateway.fleet import Fleet
from gateway.gauges import gauges
from gateway.generate import CHAT, COMPLETION, Generate, Services
from gateway.journals import ReplicaJournals
from gateway.keys import KeyRing, load_secret
from gateway.ledger.books import Books
from gateway.ledger.ledger import Ledger, LedgerSettings
from gateway.mailbox import Mailbox
from gateway.metrics import Metrics
from gateway.policy_follower import PolicyFollower
from gateway.rules import Rules, compiler, fleet_names, predictor_folder, rules_for
from gateway.schemas import ErrorResponse, Health, ModelList, ModelObject
from gateway.sessions import Sessions
from gateway.shadow import Shadows
from gateway.telemetry import traces_wanted
from gateway.totals import METRICS, Totals
from gateway.traffic import FOLDER, TrafficRecorder
from policies.selection import ModelGroup
from replicas.process import settle_down

if TYPE_CHECKING:
    from gateway.tracing import Tracing


@dataclass(slots=True)
class _Running:
    """What exists only between start and stop of the application."""

    services: Services
    fleet: Fleet
    endpoints: dict[str, Generate]
    admin: Admin
    mailbox: Mailbox


class _Gateway:
    """The application's parts and their life time."""

    def __init__(self, config: GatewayConfig, directory: Directory, connect: Connect | None) -> None:
        self.config = config
        self.metrics = Metrics(model.name for model in config.models)
        self.totals = Totals(self.metrics)
        self.started_at = int(time.time())
        self._directory = directory
        self._connect = connect
        self._running: _Running | None = None

    @property
    def running(self) -> _Running:
        assert self._running is not None, "the application's lifespan has not been started"
        return self._running

    async def rules_of(self, request: Request) -> Rules:
        """The generation that serves the caller's key; AuthenticationFailed."""
        services = self.running.services
        key = await services.keys.authenticate(header(request.scope, b"authorization"))
        return await rules_for(services.policies, key.id)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncGenerator[None, None]:
        config = self.config
        async with AsyncExitStack() as stack:
            # Blocking, but before the first request: the schema may have to be brought up to date.
            database = Database(config.database_url)
            stack.callback(database.close)
            secret = load_secret(config.state_dir)
            keys = KeyRing(database, secret, poll_s=config.key_poll_s, stale_s=config.key_stale_s)
            stack.push_async_callback(keys.aclose)
            await keys.start()
            ledger = Ledger(database, config.gateway_id, settings=LedgerSettings(lease_s=config.lease_s))
            stack.push_async_callback(ledger.aclose)
            await ledger.start()
            fleet = Fleet(config, self._directory, self._connect, ledger)
            stack.push_async_callback(fleet.aclose)
            await fleet.start()
            policies = PolicyFollower(database, config.gateway_id, fleet_names(config), compiler(config))
            stack.push_async_callback(policies.aclose)
            await policies.start()
            admin = Admin(
                database,
                config.database_url,
                secret,
                names=fleet_names(config),
                predictors=predictor_folder(config),
            )
            stack.push_async_callback(admin.aclose)
            book = RecordBook()
            mailbox = Mailbox(
                database, config.gateway_id, {EXPLAIN: partial(explained, book, database), METRICS: self.totals.export}
            )
            stack.push_async_callback(mailbox.aclose)
            await mailbox.start()
            journals = ReplicaJournals(fleet, ledger, fleet.upstreams)
            stack.push_async_callback(journals.aclose)
            journals.start()
            books = Books(database, ledger, secret, journals)
            stack.push_async_callback(books.aclose)
            books.start()
            sessions = Sessions(database, secret)
            stack.push_async_callback(sessions.aclose)
            answering = Answering(fleet, self.metrics, ledger, sessions)
            tracing = await self._telemetry(stack)
            shadows = Shadows(answering, self.metrics)
            stack.push_async_callback(shadows.aclose)
            services = Services(
                config=config,
                keys=keys,
                policies=policies,
                answering=answering,
                shadows=shadows,
                metrics=self.metrics,
                book=book,
                traffic=self._recorder(stack, secret),
                tracing=tracing,
            )
            endpoints = {kind.id_prefix: Generate(kind, services) for kind in (CHAT, COMPLETION)}
            self.metrics.follow(
                lambda: fleet.connections, lambda: gauges(fleet.upstreams, fleet.routes, ledger, policies)
            )
            self._running = _Running(services, fleet, endpoints, admin, mailbox)
            if config.alone:
                settle_down()
            try:
                yield
            finally:
                self._running = None

    def _recorder(self, stack: AsyncExitStack, secret: bytes) -> TrafficRecorder | None:
        """What keeps traffic for replay, where the fleet file wants it and there is a directory to keep it in."""
        config = self.config
        if not (config.traffic.record and config.state_dir):
            return None
        recorder = TrafficRecorder(config.traffic, Path(config.state_dir) / FOLDER, config.gateway_id, secret)
        recorder.start()
        stack.push_async_callback(asyncio.to_thread, recorder.close)
        return recorder

    async def _telemetry(self, stack: AsyncExitStack) -> Tracing | None:
        """Logs and traces, where the environment asks for them; `stack` ends both. ConfigError."""
        handler = logs.destination(os.environ, self.config.state_dir)
        if handler is not None:
            stack.callback(logs.install(handler))
        if not traces_wanted(os.environ):
            return None
        from gateway.tracing import from_environment  # a tenth of a second, for nothing elsewhere

        tracing = from_environment(os.environ, self.config.gateway_id)
        stack.push_async_callback(tracing.aclose)
        return tracing

    def model_object(self, name: str, target: ServedModel | ModelGroup) -> ModelObject:
        """`target` is what the name stands for; a group is as long as its longest model."""
        fleet = self.running.fleet
        members = [target.name] if isinstance(target, ServedModel) else [model.name for model in target.models]
        lengths = [card.max_model_len for card in map(fleet.card, members) if card is not None]
        return ModelObject(
            id=name,
            created=(target.created if isinstance(target, ServedModel) else 0) or self.started_at,
            owned_by=target.owned_by if isinstance(target, ServedModel) else "signalbox",
            root=target.name,
            max_model_len=max(lengths, default=0) or None,
        )


class _Endpoint:
    """An ASGI application, as Starlette wants for a route that exists before the gateway has started."""

    def __init__(self, gateway: _Gateway, kind: Kind, path: str) -> None:
        self._gateway = gateway
        self._kind = kind
        self.path = path

    @property
    def route(self) -> Route:
        return Route(self.path, self, methods=["POST"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[EXCHANGE].route = self.path
        await self._gateway.running.endpoints[self._kind.id_prefix](scope, receive, send)


class _App(FastAPI):
    """A FastAPI application whose loaded endpoints do not pass through its middlewares and its router.

    Between the server and Edge those are six layers, each of which also wraps every event that is sent. `direct`: by
    path, what answers POST.
    """

    direct: Mapping[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and not scope.get("root_path"):
            direct = self.direct.get(scope["path"])
            if direct is not None:
                await direct(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def create_app(config: GatewayConfig, directory: Directory, *, connect: Connect | None = None) -> FastAPI:
    """The application. Its lifespan opens the database (migrating it), follows the directory and, at the end, aborts
    whatever still runs. `connect` replaces how replicas are reached, for tests.
    """
    gateway = _Gateway(config, directory, connect)
    app = _App(
        title="Signalbox",
        version=version("signalbox"),
        lifespan=gateway.lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.gateway = gateway
    edge = partial(
        Edge,
        metrics=gateway.metrics,
        server_sends_request_id=config.server_sends_request_id,
        logged=logs.wanted(os.environ),
    )
    app.add_middleware(edge)
    app.add_exception_handler(HTTPException, _routing_error)
    loaded = [_Endpoint(gateway, CHAT, "/v1/chat/completions"), _Endpoint(gateway, COMPLETION, "/v1/completions")]
    app.direct = {endpoint.path: edge(endpoint) for endpoint in loaded}
    # For what else may be asked of these paths: another method, or behind a prefix.
    app.router.routes[:0] = [endpoint.route for endpoint in loaded]
    _add_plain_routes(app, gateway)
    app.include_router(create_router(lambda: gateway.running.admin))
    app.include_router(
        admin_requests.create_router(lambda: gateway.running.admin.tokens, lambda: gateway.running.mailbox)
    )
    app.include_router(admin_usage.create_router(lambda: gateway.running.admin))
    openapi.install(app)
    return app


async def _routing_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for HTTPException only"
    body = routing_error_body(error.status_code, str(error.detail))
    return Response(body, error.status_code, error.headers, media_type="application/json")


def _add_plain_routes(app: FastAPI, gateway: _Gateway) -> None:
    refusals: dict[int | str, dict[str, Any]] = {401: {"model": ErrorResponse}}

    @app.get("/v1/models", responses=refusals)
    async def list_models(request: Request) -> ModelList:
        """What a caller may ask for: models, groups, and their aliases."""
        rules = await gateway.rules_of(request)
        return ModelList(data=[gateway.model_object(name, rules.resolve(name)) for name in rules.names()])

    @app.get("/v1/models/{model:path}", responses={**refusals, 404: {"model": ErrorResponse}})
    async def retrieve_model(model: str, request: Request) -> ModelObject:
        rules = await gateway.rules_of(request)
        return gateway.model_object(model, rules.resolve(model))

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether requests can be answered now. Needs no key."""
        ready = {model.name: gateway.running.fleet.ready(model.name) for model in gateway.config.models}
        status = "ok" if all(ready.values()) else "degraded" if any(ready.values()) else "unavailable"
        return JSONResponse(
            {"status": status, "ready_replicas": ready}, status_code=503 if status == "unavailable" else 200
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus text of all gateways and of every replica's last report. Needs no key; holds no caller's data."""
        text = await gateway.totals.text(gateway.running.mailbox)
        return Response(text, media_type=CONTENT_TYPE_LATEST)
