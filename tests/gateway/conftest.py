"""A gateway on a real socket, in front of real replica servers with fake engines. Teardown asserts no leaks."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from gateway.admin_tokens import AdminTokenRegister
from gateway.app import create_app
from gateway.config import GatewayConfig, ServedModel, new_gateway_id
from gateway.connection import Connect
from gateway.directory import StaticDirectory
from gateway.fleet import Fleet
from gateway.keys import KeyRegister, load_secret
from gateway.policy_register import PolicyRegister
from replicas.client import Journaled
from replicas.fake import FakeEngine, FakeSettings, fake_card
from replicas.journal import Journal
from replicas.protocol import (
    Chunk,
    EngineStats,
    GenerateRequest,
    ModelCard,
    ReplicaAddress,
    ReplicaState,
    ReplicaStatus,
)
from replicas.server import ReplicaServer

MODEL = "fake"
# Names of tasks that run for as long as a gateway does.
OWN_TASKS = ("keep-", "leave-", "fleet-", "key-", "snapshot-", "policy-", "mailbox", "ledger-")


@dataclass
class Replica:
    engine: FakeEngine
    server: ReplicaServer

    @classmethod
    def start(cls, settings: FakeSettings, name: str, model: str = MODEL, journals: Path | None = None) -> Replica:
        engine = FakeEngine(settings, card=fake_card(settings, model))
        incarnation = f"{name}-{time.monotonic_ns()}"
        journal = Journal(journals, incarnation) if journals else None
        server = ReplicaServer(engine, replica_id=name, incarnation=incarnation, journal=journal)
        server.start()
        return cls(engine, server)

    def idle(self) -> bool:
        stats = self.engine.stats()
        return stats.num_requests_running + stats.num_requests_waiting == 0

    def assert_clean(self) -> None:
        stats = self.engine.stats()
        assert stats.kv_blocks_free == stats.kv_blocks_total
        self.engine.check_integrity()


class ScriptedConnection:
    """A replica whose every answer a test writes down: lists of chunks to yield, errors to raise, seconds to wait."""

    def __init__(self, card: ModelCard, script: list[Any], name: str = "scripted") -> None:
        self.address = ReplicaAddress(replica_id=name, incarnation="1", model=MODEL, endpoint="", events_endpoint="")
        self.card = card
        self.script = script
        self.requests: list[GenerateRequest] = []
        self.in_flight = 0
        self.closed = asyncio.Event()
        stats = EngineStats(kv_blocks_total=4, kv_blocks_free=3, num_requests_running=2)
        self.status = ReplicaStatus(
            replica_id=name, incarnation="1", model=MODEL, state=ReplicaState.READY, stats=stats
        )

    @property
    def alive(self) -> bool:
        return not self.closed.is_set()

    @property
    def next_seq(self) -> int:
        return len(self.requests) + 1

    def resync(self) -> None:
        pass

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        self.requests.append(request)
        self.in_flight += 1
        try:
            for action in self.script:
                if isinstance(action, Exception):
                    raise action
                if isinstance(action, float):
                    await asyncio.sleep(action)
                else:
                    yield action
        finally:
            self.in_flight -= 1

    async def journal(self, gateway_id: str, timeout_s: float = 0.0) -> Journaled:
        return Journaled((), ())

    def acknowledge(self, request_ids: Collection[str], *, foreign: bool = False) -> None:
        pass

    async def wait_closed(self) -> None:
        await self.closed.wait()

    async def aclose(self) -> None:
        self.closed.set()


@dataclass
class Gateway:
    """A running gateway and what a test may want to reach behind it."""

    base_url: str
    key: str
    config: GatewayConfig
    directory: StaticDirectory
    replicas: list[Replica] = field(default_factory=list)
    loop: Any = None
    server_tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    app: Any = None

    @property
    def fleet(self) -> Fleet:
        fleet: Fleet = self.app.state.gateway.running.fleet
        return fleet

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            **{"base_url": self.base_url, "headers": self.headers, "timeout": 20, "verify": False, **options}
        )

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(
            **{"base_url": self.base_url, "headers": self.headers, "timeout": 20, "verify": False, **options}
        )

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.base_url}/v1", "api_key": self.key, "max_retries": 0, **options})

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        given = {"base_url": f"{self.base_url}/v1", "api_key": self.key, "max_retries": 0, **options}
        return openai.AsyncOpenAI(**given)

    def publish(self) -> None:
        addresses = [replica.server.address for replica in self.replicas]
        self.loop.call_soon_threadsafe(self.directory.publish, addresses)

    def add(self, settings: FakeSettings | None = None, name: str = "", model: str = MODEL) -> Replica:
        journals = Path(self.config.state_dir) / "journals"
        replica = Replica.start(settings or FakeSettings(), name or f"r{len(self.replicas)}", model, journals)
        self.replicas.append(replica)
        self.publish()
        return replica

    def remove(self, replica: Replica) -> None:
        self.replicas.remove(replica)
        self.publish()

    def wait_ready(self, count: int) -> None:
        """Until so many replicas, of all models together, take work."""
        elsewhere = {upstream.name for upstream in self.config.upstreams}

        def ready() -> int:
            counts = http.get("/health").json()["ready_replicas"]
            return sum(number for name, number in counts.items() if name not in elsewhere)

        with self.http() as http:
            self.wait_until(lambda: ready() == count)

    def config_of_another(self) -> GatewayConfig:
        """Of a second gateway over the same fleet and database."""
        return replace(self.config, gateway_id=new_gateway_id())

    def register(self) -> PolicyRegister:
        return PolicyRegister(self.config.database_url)

    def admin_token(self) -> str:
        with AdminTokenRegister(self.config.database_url, load_secret(self.config.state_dir)) as register:
            return register.create(f"admin-{time.monotonic_ns()}")

    def explain(self, request_id: str, token: str) -> list[dict[str, Any]]:
        with self.http(headers={"authorization": f"Bearer {token}"}) as http:
            answer = http.get(f"/admin/v1/requests/{request_id}")
        assert answer.status_code == 200, answer.text
        data: list[dict[str, Any]] = answer.json()["data"]
        return data

    def request_tasks(self) -> list[asyncio.Task[Any]]:
        """Tasks that requests have started: all but the server's and the gateway's own."""
        tasks = asyncio.all_tasks(self.loop) - self.server_tasks
        return [task for task in tasks if not task.get_name().startswith(OWN_TASKS)]

    @staticmethod
    def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.005)

    def assert_idle(self, timeout_s: float = 5.0) -> None:
        """No request in any engine, every block free, no task of a request; all of it within `timeout_s`."""
        self.wait_until(lambda: all(replica.idle() for replica in self.replicas), timeout_s)
        self.wait_until(lambda: not self.request_tasks(), timeout_s)
        for replica in self.replicas:
            replica.assert_clean()


def free_socket() -> socket.socket:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


def make_config(state_dir: Path, **changes: Any) -> GatewayConfig:
    url = f"sqlite:///{state_dir}/signalbox.db"
    model = ServedModel(name=MODEL, aliases=("gpt-fake",))
    return replace(GatewayConfig(models=(model,), database_url=url, state_dir=str(state_dir)), **changes)


def make_key(config: GatewayConfig, name: str) -> str:
    with KeyRegister(config.database_url, load_secret(config.state_dir)) as register:
        return register.create(name)


@contextmanager
def running(config: GatewayConfig, key: str, connect: Connect | None = None) -> Iterator[Gateway]:
    """A gateway in a thread of its own, so that synchronous clients can be used on it."""
    directory = StaticDirectory()
    sock = free_socket()
    app = create_app(config, directory, connect=connect)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=5, lifespan="on"))
    gateway = Gateway(f"http://127.0.0.1:{sock.getsockname()[1]}", key, config, directory, app=app)
    ready = threading.Event()

    async def serve() -> None:
        gateway.loop = asyncio.get_running_loop()
        serving = asyncio.create_task(server._serve([sock]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.002)
        gateway.server_tasks = {
            task
            for task in asyncio.all_tasks()
            if not task.get_name().startswith(("keep-", "fleet-", "key-", "policy-", "mailbox"))
        }
        ready.set()
        await serving
        await asyncio.sleep(0)  # the lifespan's task ends one turn later
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        assert not rest, f"tasks outlived the gateway: {rest}"

    failures: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            failures.append(error)
            ready.set()

    thread = threading.Thread(target=run, name="gateway-under-test")
    thread.start()
    try:
        assert ready.wait(10)
        yield gateway
        gateway.assert_idle()
    finally:
        server.should_exit = True
        thread.join(15)
        for replica in gateway.replicas:
            replica.server.stop()
        sock.close()
    assert not failures, failures
    assert not thread.is_alive()


StartGateway = Callable[..., Gateway]


@pytest.fixture(scope="module")
def module_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One for all tests of a module that leave it as it was; fast fake engine, 8192 tokens of context."""
    config = make_config(tmp_path_factory.mktemp("gateway"))
    with no_leaked_threads(), running(config, make_key(config, "shared")) as gateway:
        gateway.add()
        gateway.wait_ready(1)
        yield gateway


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[StartGateway]:
    """`start_gateway(replicas=[FakeSettings(...)], connections=[ScriptedConnection], **config changes)`."""
    with no_leaked_threads(), ExitStack() as stack:
        keys: list[str] = []

        def start(
            *, replicas: list[FakeSettings] | None = None, connections: list[Any] | None = None, **changes: Any
        ) -> Gateway:
            config = make_config(tmp_path, **changes)
            if not keys:
                keys.append(make_key(config, "test"))
            if connections is None:
                gateway = stack.enter_context(running(config, keys[0]))
                for settings in replicas if replicas is not None else [FakeSettings()]:
                    gateway.add(settings)
                count = len(gateway.replicas)
            else:
                by_address = {connection.address: connection for connection in connections}

                async def connect(address: ReplicaAddress, listener: object) -> Any:
                    return by_address[address]

                gateway = stack.enter_context(running(config, keys[0], connect))
                gateway.loop.call_soon_threadsafe(gateway.directory.publish, list(by_address))
                count = len(by_address)
            gateway.wait_ready(count)
            return gateway

        yield start


@contextmanager
def no_leaked_threads() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    Gateway.wait_until(lambda: not {t for t in threading.enumerate() if t.is_alive()} - before)


@pytest.fixture
def scripted() -> Callable[..., ScriptedConnection]:
    """`scripted(script, name)`: a connection that answers every request with that script."""

    def make(script: list[Any], name: str = "scripted") -> ScriptedConnection:
        return ScriptedConnection(fake_card(FakeSettings(), MODEL), script, name)

    return make
