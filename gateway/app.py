"""Puts the gateway together as one FastAPI application. No Ray here: a directory of replicas is handed in."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway import openapi
from gateway.config import GatewayConfig, ServedModel
from gateway.connection import Connect
from gateway.db.database import Database
from gateway.directory import Directory
from gateway.edge import EXCHANGE, Edge, header
from gateway.errors import routing_error_body
from gateway.fleet import Fleet
from gateway.generate import CHAT, COMPLETION, Generate, Kind
from gateway.keys import KeyRing, load_secret
from gateway.metrics import Metrics
from gateway.schemas import ErrorResponse, Health, ModelList, ModelObject


@dataclass(slots=True)
class _Running:
    """What exists only between start and stop of the application."""

    keys: KeyRing
    fleet: Fleet
    endpoints: dict[str, Generate]


class _Gateway:
    """The application's parts and their life time."""

    def __init__(self, config: GatewayConfig, directory: Directory, connect: Connect | None) -> None:
        self.config = config
        self.metrics = Metrics(model.name for model in config.models)
        self.started_at = int(time.time())
        self._directory = directory
        self._connect = connect
        self._running: _Running | None = None

    @property
    def running(self) -> _Running:
        assert self._running is not None, "the application's lifespan has not been started"
        return self._running

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncGenerator[None, None]:
        config = self.config
        # Blocking, but before the first request: the schema may have to be brought up to date.
        database = Database(config.database_url)
        try:
            secret = load_secret(config.state_dir)
            keys = KeyRing(database, secret, poll_s=config.key_poll_s, stale_s=config.key_stale_s)
            fleet = Fleet(config, self._directory, self._connect)
            try:
                await keys.start()
                fleet.start()
                kinds = {kind.id_prefix: kind for kind in (CHAT, COMPLETION)}
                endpoints = {name: Generate(kind, config, keys, fleet, self.metrics) for name, kind in kinds.items()}
                self._running = _Running(keys, fleet, endpoints)
                self.metrics.follow(lambda: fleet.connections)
                yield
            finally:
                self._running = None
                await fleet.aclose()
                await keys.aclose()
        finally:
            database.close()

    def model_object(self, name: str, served: ServedModel) -> ModelObject:
        card = self.running.fleet.card(served.name)
        return ModelObject(
            id=name,
            created=served.created or self.started_at,
            owned_by=served.owned_by,
            root=served.name,
            max_model_len=card.max_model_len if card else None,
        )


class _Endpoint:
    """An ASGI application, as Starlette wants for a route that exists before the gateway has started."""

    def __init__(self, gateway: _Gateway, kind: Kind, path: str) -> None:
        self._gateway = gateway
        self._kind = kind
        self._path = path

    @property
    def route(self) -> Route:
        return Route(self._path, self, methods=["POST"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[EXCHANGE].route = self._path
        await self._gateway.running.endpoints[self._kind.id_prefix](scope, receive, send)


def create_app(config: GatewayConfig, directory: Directory, *, connect: Connect | None = None) -> FastAPI:
    """The application. Its lifespan opens the database (migrating it), follows the directory and, at the end, aborts
    whatever still runs. `connect` replaces how replicas are reached, for tests.
    """
    gateway = _Gateway(config, directory, connect)
    app = FastAPI(
        title="Signalbox",
        version=version("signalbox"),
        lifespan=gateway.lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.gateway = gateway
    app.add_middleware(Edge, metrics=gateway.metrics, server_sends_request_id=config.server_sends_request_id)
    app.add_exception_handler(HTTPException, _routing_error)
    # first, because routes are tried in order and these two carry the load
    app.router.routes[:0] = [
        _Endpoint(gateway, CHAT, "/v1/chat/completions").route,
        _Endpoint(gateway, COMPLETION, "/v1/completions").route,
    ]
    _add_plain_routes(app, gateway)
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
        """The models served here, by name and by alias."""
        await gateway.running.keys.authenticate(header(request.scope, b"authorization"))
        models = gateway.config.models
        named = [(name, model) for model in models for name in (model.name, *model.aliases)]
        return ModelList(data=[gateway.model_object(name, model) for name, model in named])

    @app.get("/v1/models/{model:path}", responses={**refusals, 404: {"model": ErrorResponse}})
    async def retrieve_model(model: str, request: Request) -> ModelObject:
        await gateway.running.keys.authenticate(header(request.scope, b"authorization"))
        return gateway.model_object(model, gateway.running.fleet.served(model))

    @app.get("/health", response_model=Health, responses={503: {"model": Health}})
    async def health() -> Response:
        """Whether requests can be answered now. Needs no key."""
        ready = {model.name: len(gateway.running.fleet.ready(model.name)) for model in gateway.config.models}
        status = "ok" if all(ready.values()) else "degraded" if any(ready.values()) else "unavailable"
        return JSONResponse(
            {"status": status, "ready_replicas": ready}, status_code=503 if status == "unavailable" else 200
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Prometheus text of this gateway and of every replica's last report. Needs no key; holds no caller's data."""
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)
