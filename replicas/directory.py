"""Which replicas there are: they register with a lease and renew it, gateways long-poll for changes.

`Directory` is the logic alone. `directory_actor` gives the named Ray actor that runs one; it keeps nothing on disk:
when it is restarted, every replica notices at its next renewal and registers again. Until a lease's time has passed
since its start its view says `complete=False`, so that no gateway takes a missing replica for a dead one.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from replicas.protocol import ReplicaAddress

NAMESPACE = "signalbox"
DIRECTORY = "directory"
LEASE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryView:
    """All replicas at one version. Versions are compared for equality only: they differ between directory processes."""

    version: str
    complete: bool
    addresses: tuple[ReplicaAddress, ...]


class Directory:
    """Registrations by replica id; a new incarnation replaces the old one. Times are seconds of `clock`."""

    def __init__(self, lease_s: float = LEASE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._started = clock()
        self._epoch = uuid.uuid4().hex[:8]
        self._changes = 0
        self._leases: dict[str, tuple[ReplicaAddress, float]] = {}
        self._complete = False

    def register(self, address: ReplicaAddress) -> None:
        known = self._leases.get(address.replica_id)
        self._leases[address.replica_id] = (address, self._clock() + self._lease_s)
        self._changes += known is None or known[0] != address

    def renew(self, replica_id: str, incarnation: str) -> bool:
        """False if this incarnation is not known here: it must register."""
        known = self._leases.get(replica_id)
        if known is None or known[0].incarnation != incarnation:
            return False
        self._leases[replica_id] = (known[0], self._clock() + self._lease_s)
        return True

    def deregister(self, replica_id: str, incarnation: str) -> None:
        """A late call of an old incarnation does not harm the new one."""
        known = self._leases.get(replica_id)
        if known is not None and known[0].incarnation == incarnation:
            del self._leases[replica_id]
            self._changes += 1

    def view(self) -> DirectoryView:
        """The present state; leases that ran out are forgotten first."""
        now = self._clock()
        expired = [replica_id for replica_id, (_, until) in self._leases.items() if until <= now]
        for replica_id in expired:
            del self._leases[replica_id]
        complete = self._complete or now - self._started >= self._lease_s
        self._changes += len(expired) + (complete is not self._complete)
        self._complete = complete
        addresses = tuple(address for address, _ in self._leases.values())
        return DirectoryView(version=f"{self._epoch}-{self._changes}", complete=complete, addresses=addresses)


class DirectoryService:
    """`Directory` with long polling, for an asyncio actor."""

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self._directory = Directory(lease_s)
        self._poll_s = min(lease_s / 4, 0.5)
        self._changed = asyncio.Event()

    async def register(self, address: ReplicaAddress) -> None:
        self._directory.register(address)
        self._announce()

    async def renew(self, replica_id: str, incarnation: str) -> bool:
        return self._directory.renew(replica_id, incarnation)

    async def deregister(self, replica_id: str, incarnation: str) -> None:
        self._directory.deregister(replica_id, incarnation)
        self._announce()

    async def watch(self, version: str, timeout_s: float = 30.0) -> DirectoryView:
        """The view as soon as its version is not `version`, at the latest after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            changed, view = self._changed, self._directory.view()
            left = deadline - time.monotonic()
            if view.version != version or left <= 0:
                return view
            try:
                async with asyncio.timeout(min(left, self._poll_s)):  # leases run out without anybody calling
                    await changed.wait()
            except TimeoutError:
                pass

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def directory_actor(name: str) -> Any:
    """Handle of the directory called `name`, created if there is none. Needs a connection to Ray; blocks briefly."""
    import ray

    actor = ray.remote(DirectoryService).options(
        name=name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=0,
        max_concurrency=1000,
    )
    return actor.remote()
