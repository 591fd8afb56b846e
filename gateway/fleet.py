"""The replicas this gateway can reach right now, kept so by following a directory.

One task follows the directory; one task per listed replica connects, waits until the connection is lost, and tries
again for as long as the replica stays listed. A replica that leaves the list takes no new request but finishes those
it has. Knows nothing of HTTP or of what is in a request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from typing import Protocol

from gateway.config import GatewayConfig, ServedModel
from gateway.connection import Connect, Connection
from gateway.directory import Directory
from gateway.models import Model
from gateway.routes import Choice, Routes, takes_work
from gateway.upstreams import UpstreamModel, connect_all
from policies.fleet_view import RouteRequest
from replicas.client import Listener, ReplicaConnection
from replicas.protocol import (
    ConfigError,
    ModelCard,
    ModelNotFound,
    NoReplica,
    ReplicaAddress,
    Unavailable,
)
from replicas.upstream import UpstreamCard

logger = logging.getLogger(__name__)

_RECONNECT_FIRST_S, _RECONNECT_MAX_S = 0.05, 2.0
_LINGER_S = 0.2


class Links(Protocol):
    """Whoever keeps account of which incarnations of replicas this gateway may have given something to."""

    async def link(self, incarnation: str) -> None:
        """Awaited before it is given anything."""
        ...

    def unlink(self, incarnation: str) -> None:
        """The connection is gone."""
        ...


class _NoLinks:
    async def link(self, incarnation: str) -> None:
        pass

    def unlink(self, incarnation: str) -> None:
        pass


class Fleet:
    """Models by name and alias, and their live connections. waiting: requests that wait for a replica, by model."""

    def __init__(
        self,
        config: GatewayConfig,
        directory: Directory,
        connect: Connect | None = None,
        links: Links | None = None,
    ) -> None:
        self._served = {name: model for model in config.models for name in (model.name, *model.aliases)}
        self._directory = directory
        self._connect = connect or _connector(config)
        self._links = links or _NoLinks()
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="gateway-tokenizer")
        self.routes = {model.name: Routes(config.gateway_id) for model in config.models}
        self._models: dict[str, Model] = {}
        self._connections: dict[ReplicaAddress, Connection] = {}
        self._keepers: dict[ReplicaAddress, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._follower: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self.waiting: Counter[str] = Counter()
        self._config = config
        self._stack = AsyncExitStack()
        self.upstreams: dict[str, UpstreamModel] = {}

    async def start(self) -> None:
        """ConfigError when an upstream cannot be used as configured."""
        self.upstreams = await connect_all(self._config, self._stack)
        self._follower = asyncio.create_task(self._follow(), name="fleet-directory")

    async def aclose(self) -> None:
        tasks = [*([self._follower] if self._follower else []), *self._keepers.values(), *self._leaving]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._stack.aclose()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------------------------------------ who is there

    @property
    def connections(self) -> Iterable[Connection]:
        return self._connections.values()

    def served(self, name: str) -> ServedModel:
        """The model behind a name or alias; ModelNotFound."""
        served = self._served.get(name)
        if served is None:
            raise ModelNotFound(f"the model {name!r} does not exist", param="model")
        return served

    def card(self, model: str) -> ModelCard | UpstreamCard | None:
        """The card of a model by its name proper, if any of its replicas has ever described it."""
        if model in self.upstreams:
            return self.upstreams[model].card
        known = self._models.get(model)
        return known.card if known else None

    def ready(self, model: str) -> int:
        """How many replicas of a model take work now; an upstream counts as one while it is not left alone."""
        if model in self.upstreams:
            return int(self.upstreams[model].ready)
        return len(self._ready(model))

    def _ready(self, model: str) -> list[Connection]:
        spared = self.routes[model].spared
        shunned = set(spared.names(time.monotonic())) if spared else ()
        return [
            connection
            for address, connection in self._connections.items()
            if address.model == model
            and address in self._keepers
            and address.replica_id not in shunned
            and takes_work(connection)
        ]

    def choose(
        self, model: str, request: RouteRequest, avoid: Collection[str], policy: str, generation: int
    ) -> Choice | None:
        """Where the named policy sends the request now; None while no replica outside `avoid` takes work."""
        return self.routes[model].choose(request, avoid, policy, generation)

    async def model(self, served: ServedModel, wait_s: float) -> Model:
        """The model, once any of its replicas has described it; NoReplica after `wait_s`."""
        if (model := self._models.get(served.name)) is not None:
            return model
        try:
            async with asyncio.timeout(wait_s):
                while served.name not in self._models:
                    await self.change()
        except TimeoutError:
            raise NoReplica(f"no replica of {served.name!r} is ready") from None
        return self._models[served.name]

    async def change(self) -> None:
        """Return when a connection has come or gone since this call."""
        await self._changed.wait()

    # ------------------------------------------------------------------------------------------------- keeping up

    async def _follow(self) -> None:
        async with aclosing(self._directory.watch()) as views:
            async for addresses in views:
                self._apply(addresses)

    def _apply(self, addresses: Sequence[ReplicaAddress]) -> None:
        wanted = {address for address in addresses if address.model in self._served}
        for address in self._keepers.keys() - wanted:
            self._dismiss(address)
        for address in wanted - self._keepers.keys():
            self._keepers[address] = asyncio.create_task(self._keep(address), name=f"keep-{address.replica_id}")
        self._notify()

    def _dismiss(self, address: ReplicaAddress) -> None:
        keeper = self._keepers.pop(address)
        connection = self._connections.get(address)
        if connection is None or not connection.alive:
            keeper.cancel()
            return
        self.routes[address.model].leave(connection)
        leaving = asyncio.create_task(_when_idle(connection, keeper), name=f"leave-{address.replica_id}")
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _keep(self, address: ReplicaAddress) -> None:
        pause = _RECONNECT_FIRST_S
        while True:
            routes = self.routes[address.model]
            published = routes.listener(address.replica_id, address.incarnation)
            try:
                connection = await self._connect(address, published)
            except Unavailable as error:
                logger.info("replica %s is listed but not reachable yet: %s", address.replica_id, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _RECONNECT_MAX_S)
                continue
            except ConfigError as error:
                logger.error("replica %s cannot be used: %s", address.replica_id, error)
                return
            pause = _RECONNECT_FIRST_S
            try:
                await self._describe(address.model, connection.card)
                await self._links.link(address.incarnation)
                self._connections[address] = connection
                routes.join(connection, published)
                self._notify()
                await connection.wait_closed()
            except ConfigError as error:
                logger.error("model %s cannot be served: %s", address.model, error)
                return
            finally:
                self._connections.pop(address, None)
                self._links.unlink(address.incarnation)
                routes.leave(connection)
                await connection.aclose()
                self._notify()

    async def _describe(self, name: str, card: ModelCard) -> None:
        known = self._models.get(name)
        if known is None or known.card != card:
            default = self._served[name].default_max_tokens
            loop = asyncio.get_running_loop()
            try:
                self._models[name] = await loop.run_in_executor(
                    self._threads, Model, name, card, default, self._threads
                )
            except ConfigError:
                raise
            except Exception as error:  # the tokenizers library raises bare Exception
                raise ConfigError(f"its tokenizer cannot be read: {error}") from error

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _connector(config: GatewayConfig) -> Connect:
    async def connect(address: ReplicaAddress, listener: Listener) -> Connection:
        return await ReplicaConnection.connect(
            address, gateway_id=config.gateway_id, timeout_s=config.connect_timeout_s, listener=listener
        )

    return connect


async def _when_idle(connection: Connection, keeper: asyncio.Task[None]) -> None:
    """A replica that left the list is let go when its last request of ours has ended."""
    try:
        while connection.alive and connection.in_flight:
            await asyncio.sleep(_LINGER_S)
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
