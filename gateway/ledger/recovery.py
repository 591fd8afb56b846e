"""Closes what dead gateways left open, from the replicas' journals where there are any. Every gateway runs one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from sqlalchemy.exc import SQLAlchemyError

from gateway.ledger.ledger import Ledger
from gateway.ledger.transaction import Journaled
from replicas.protocol import SignalboxError

logger = logging.getLogger(__name__)

PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Journals:
    """What the replicas' journals know of one gateway.

    usages: by attempt id, with the note that went along (`entries.note`). running: something is still being computed
    for that gateway, so the numbers are not final. complete: every journal that can know of it has been read.
    elsewhere: models that keep none.
    """

    usages: Journaled = field(default_factory=dict)
    running: bool = False
    complete: bool = False
    elsewhere: Collection[str] = ()


class JournalSource(Protocol):
    """How to reach the journals. Both may raise SignalboxError, and are then tried again."""

    async def read(self, gateway_id: str) -> Journals: ...
    async def acknowledge(self, gateway_id: str, request_ids: Collection[str]) -> None: ...


class Recovery:
    """Looks for dead gateways every half lease. Journals that are missing or not final are waited for, `patience_s` at
    most after a death was noticed (by default a lease, or PATIENCE_S if that is longer: time for a replica to come back
    and take over its predecessor's journal); then what they lack is charged as reserved.
    """

    def __init__(self, ledger: Ledger, source: JournalSource, *, patience_s: float | None = None) -> None:
        self._ledger = ledger
        self._source = source
        self._patience_s = max(ledger.settings.lease_s, PATIENCE_S) if patience_s is None else patience_s
        self._noticed: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="ledger-recovery")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except (SignalboxError, SQLAlchemyError) as error:
                logger.warning("dead gateways cannot be looked for: %s", type(error).__name__)
            await asyncio.sleep(self._ledger.settings.lease_s / 2)

    async def look(self) -> None:
        """One round over the gateways that are dead now."""
        dead = await self._ledger.dead()
        self._noticed = {id: self._noticed.get(id, self._ledger.clock()) for id in dead}
        for id in dead:
            await self._close(id)

    async def _close(self, dead: str) -> None:
        try:
            journals = await self._source.read(dead)
        except SignalboxError as error:
            logger.warning("the journals for gateway %s cannot be read: %s", dead, error.message)
            journals = Journals()
        final = journals.complete and not journals.running
        if not final and self._ledger.clock() - self._noticed[dead] < self._patience_s:
            return
        taken = await self._ledger.take_over(dead, journals.usages, complete=final, elsewhere=journals.elsewhere)
        if taken is None:
            return
        del self._noticed[dead]
        logger.warning(
            "gateway %s is dead; of its requests %d were settled from journals, %d charged as reserved, %d released and"
            " %d recorded%s",
            *(dead, taken.settled, taken.charged, taken.released, taken.recorded),
            "" if final else "; not all journals could be read",
        )
        if journals.usages:
            try:
                await self._source.acknowledge(dead, list(journals.usages))
            except SignalboxError as error:
                logger.warning("journals keep what is on the books: %s", error.message)
