"""Where the gateway learns which replicas exist. Knows nothing of who keeps the list (Ray, a test, a file)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Protocol

from replicas.protocol import ReplicaAddress


class Directory(Protocol):
    def watch(self) -> AsyncGenerator[Sequence[ReplicaAddress], None]:
        """The whole set: once at once, then again whenever it has changed. Ends only when closed."""
        ...


class StaticDirectory:
    """A list that only `publish` changes; one event loop."""

    def __init__(self, addresses: Iterable[ReplicaAddress] = ()) -> None:
        self._addresses = tuple(addresses)
        self._changed = asyncio.Event()

    def publish(self, addresses: Iterable[ReplicaAddress]) -> None:
        self._addresses = tuple(addresses)
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncGenerator[Sequence[ReplicaAddress], None]:
        while True:
            changed = self._changed
            yield self._addresses
            await changed.wait()
