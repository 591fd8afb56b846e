"""The gateway as a Ray Serve ingress. The only file of this room that imports ray."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import LoggingConfig

from gateway.app import create_app
from gateway.config import GatewayConfig, new_gateway_id
from replicas.directory import DirectoryView, directory_actor
from replicas.protocol import ReplicaAddress

logger = logging.getLogger(__name__)

_POLL_S = 30.0
_RETRY_S = 0.2


class RayDirectory:
    """Long-polls the directory actor, and outlives it.

    A directory that has just restarted does not know everybody yet; until it says that its view is complete, replicas
    it does not mention are kept.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    async def watch(self) -> AsyncGenerator[Sequence[ReplicaAddress], None]:
        version, known = "", dict[str, ReplicaAddress]()
        async for view in self._views():
            if view.version == version:
                continue
            version = view.version
            listed = {address.replica_id: address for address in view.addresses}
            known = listed if view.complete else known | listed
            yield tuple(known.values())

    async def _views(self) -> AsyncGenerator[DirectoryView, None]:
        actor: Any = None
        version = ""
        while True:
            try:
                if actor is None:
                    actor = await asyncio.to_thread(directory_actor, self._name)
                view: DirectoryView = await actor.watch.remote(version, _POLL_S)
            except RayError as error:
                logger.warning("the replica directory does not answer: %s", type(error).__name__)
                actor, version = None, ""
                await asyncio.sleep(_RETRY_S)
                continue
            version = view.version
            yield view


@serve.deployment(
    max_ongoing_requests=10_000, logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING")
)
@serve.ingress()
class Gateway:
    """One gateway process. `replicas` only ties the models' deployments to this application; no call goes through."""

    def __init__(self, config: GatewayConfig, directory: str, replicas: Sequence[Any]) -> None:
        self._config = replace(config, gateway_id=new_gateway_id(), server_sends_request_id=True, alone=True)
        self._directory = directory
        self._replicas = replicas

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._config, RayDirectory(self._directory))


def build(
    config: GatewayConfig, *, directory: str, replicas: Sequence[Any] = (), options: Mapping[str, Any] | None = None
) -> Any:
    """The bound Serve application: this ingress in front of `replicas` (bound deployments).

    directory: name of the directory actor. options: of the ingress deployment, as `Deployment.options` takes them.
    """
    deployment: Any = Gateway  # what the decorators made of it
    return deployment.options(**(options or {})).bind(config, directory, tuple(replicas))
