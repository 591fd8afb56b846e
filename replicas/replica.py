"""One replica as a Ray Serve deployment: builds the engine, puts it on a socket, registers, and answers for its health.

Ray carries no token and no request here. It places the process, restarts it when `check_health` fails or the process
dies, and calls the destructor when the replica is to go, which is where it drains.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

from replicas.directory import DIRECTORY, directory_actor
from replicas.journal import Journal
from replicas.process import settle_down
from replicas.protocol import TokenEngine
from replicas.server import ReplicaServer
from replicas.sources import resolved

log = logging.getLogger(__name__)

HEALTH_PERIOD_S = 1.0
HEALTH_TIMEOUT_S = 20.0
# How often a replica looks for journals that others have left for good.
ADOPT_PERIOD_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """What a replica process is told. Plain values: it crosses a process boundary.

    engine: a key of ENGINES. source: of the checkpoint, of the tokenizer for a fake engine, or "".
    drain_s: how long requests that run may go on when the replica is told to go. journals: the folder for what this
    machine's replicas have produced and no gateway has on its books yet; "" keeps no journal.
    """

    model: str
    engine: str
    source: str = ""
    engine_settings: Mapping[str, Any] = field(default_factory=dict)
    default_max_tokens: int = 0
    drain_s: float = 30.0
    directory: str = DIRECTORY
    journals: str = ""


def _signalbox(spec: ReplicaSpec) -> TokenEngine:
    import torch

    from replicas.engine import Engine, EngineConfig

    # Ray sets OMP_NUM_THREADS=1 for a share of a CPU; that is a share for placement, not a wish to compute slowly.
    if not spec.engine_settings.get("num_threads"):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    return Engine(EngineConfig(model=spec.source, **spec.engine_settings))


def _fake(spec: ReplicaSpec) -> TokenEngine:
    from replicas.fake import FakeEngine, FakeSettings

    settings = FakeSettings(**spec.engine_settings)
    if not spec.source:
        return FakeEngine(settings)
    from tokenizers import Tokenizer as Backend

    from replicas.engine import EngineConfig
    from replicas.engine.tokenizer import Tokenizer, model_card
    from replicas.engine.weights import open_checkpoint

    checkpoint = open_checkpoint(spec.source)
    config = EngineConfig(model=spec.source, block_size=settings.block_size)
    card = model_card(spec.model, config, checkpoint, Tokenizer.load(checkpoint))
    card = replace(card, revision=f"fake-{card.revision}", max_model_len=settings.max_model_len)
    return FakeEngine(settings, card=card, tokenizer=Backend.from_str(card.tokenizer_json.decode()))


ENGINES: Mapping[str, Callable[[ReplicaSpec], TokenEngine]] = {"signalbox": _signalbox, "fake": _fake}


class Replica:
    """The deployment's class. Serve calls the constructor, `check_health` every HEALTH_PERIOD_S, and the destructor."""

    def __init__(self, spec: ReplicaSpec, resolve: Callable[[str], str], prepare: Callable[[], object]) -> None:
        """In the replica's process: `prepare` is called first, `resolve` turns the spec's sources into local paths."""
        prepare()
        source = resolve(spec.source) if spec.source else ""
        spec = replace(spec, source=source, engine_settings=resolved(spec.engine_settings, resolve))
        self._spec = spec
        self._server: ReplicaServer | None = None
        engine = ENGINES[spec.engine](spec)
        incarnation = uuid.uuid4().hex
        self._adopted_at = time.monotonic()
        self._server = ReplicaServer(
            engine,
            card=replace(engine.card, model=spec.model, default_max_tokens=spec.default_max_tokens),
            replica_id=serve.get_replica_context().replica_id.unique_id,
            incarnation=incarnation,
            host=ray.util.get_node_ip_address(),
            journal=Journal(Path(spec.journals), incarnation) if spec.journals else None,
        )
        settle_down()
        self._address = self._server.start()
        self._directory = directory_actor(spec.directory)
        self._directory.register.remote(self._address)
        log.info("replica %s of %s listens on %s", self._address.replica_id, spec.model, self._address.endpoint)

    async def check_health(self) -> None:
        """Raises when the engine's thread is stuck, broken or gone; Ray then replaces this process."""
        assert self._server is not None, "Serve asks for health only after the constructor"
        if not self._server.healthy():
            raise RuntimeError(f"engine thread of {self._address.replica_id} is {self._server.state} or stuck")
        if time.monotonic() - self._adopted_at >= ADOPT_PERIOD_S:
            self._adopted_at = time.monotonic()
            await asyncio.to_thread(self._server.adopt)
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S / 4):
                if not await self._directory.renew.remote(self._address.replica_id, self._address.incarnation):
                    await self._directory.register.remote(self._address)
        except (ray.exceptions.RayActorError, TimeoutError):
            # The directory's trouble is not this replica's: the lease outlasts several tries.
            log.warning("the replica directory does not answer")
            self._directory = directory_actor(self._spec.directory)

    def status(self) -> dict[str, Any]:
        """For `signalbox status`: address, state and the engine's numbers."""
        assert self._server is not None, "Serve calls methods only after the constructor"
        return {**asdict(self._address), "state": self._server.state.value, "stats": asdict(self._server.stats)}

    def __del__(self) -> None:
        """Serve's last call before it kills the process: leave the directory, finish what runs, stop."""
        server, self._server = self._server, None
        if server is None:
            return
        self._directory.deregister.remote(self._address.replica_id, self._address.incarnation)
        if not server.drain(self._spec.drain_s):
            log.warning("replica %s handed back requests after %s s", self._address.replica_id, self._spec.drain_s)
        server.stop()


def application(
    spec: ReplicaSpec,
    *,
    resolve: Callable[[str], str],
    prepare: Callable[[], object],
    name: str,
    replicas: int,
    ray_actor_options: Mapping[str, Any],
) -> Any:
    """`spec` as a bound Serve deployment called `name`."""
    deployment = serve.deployment(Replica).options(
        name=name,
        num_replicas=replicas,
        max_ongoing_requests=1000,  # control calls only, but the default of 5 would let them queue
        graceful_shutdown_timeout_s=spec.drain_s + 10.0,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        ray_actor_options=dict(ray_actor_options),
    )
    return deployment.bind(spec, resolve, prepare)
