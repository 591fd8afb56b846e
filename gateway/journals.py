"""The replicas' journals as a gateway sees them, through the connections it has anyway.

What this gateway has on its books is acknowledged as it is committed. Of a dead gateway everything is asked for, of all
replicas; the answer is complete when every incarnation that the dead one was ever connected to is among those whose
journals were shown. Every now and then whatever lies unacknowledged in a journal is held against the books: of what was
cut short more may have been made than came, and acknowledgements are lost with the replica or the gateway they were on
the way between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Iterable

from sqlalchemy.exc import SQLAlchemyError

from gateway.connection import Connection
from gateway.fleet import Fleet
from gateway.ledger.entries import CUT, Close
from gateway.ledger.ledger import Ledger
from gateway.ledger.recovery import Journals
from replicas.client import Journaled
from replicas.protocol import SignalboxError
from replicas.wire import journaled_usage

logger = logging.getLogger(__name__)

# Between two comparisons; the shorter while something that was cut short waits for one. It does for _WAIT_S at most, as
# its replica's journal may be lost.
_TIDY_S, _SOON_S, _WAIT_S = 30.0, 5.0, 120.0
_ANSWER_S = 2.0


class ReplicaJournals:
    """A JournalSource over the fleet's connections. elsewhere: models whose answers no journal of ours knows."""

    def __init__(self, fleet: Fleet, ledger: Ledger, elsewhere: Iterable[str] = ()) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._elsewhere = frozenset(elsewhere)
        self._cut: dict[str, float] = {}
        self._tidying: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._ledger.on_closed = self._closed
        self._tidying = asyncio.create_task(self._tidy(), name="ledger-journals")

    async def aclose(self) -> None:
        self._ledger.on_closed = None
        if self._tidying is not None:
            self._tidying.cancel()
            await asyncio.gather(self._tidying, return_exceptions=True)

    def _closed(self, endings: Collection[Close]) -> None:
        done = [one.id for one in endings if one.ending.source != CUT]
        for connection in self._fleet.connections:
            connection.acknowledge(done)
        if len(done) < len(endings):
            until = time.monotonic() + _WAIT_S
            self._cut.update((one.id, until) for one in endings if one.ending.source == CUT)

    async def read(self, gateway_id: str) -> Journals:
        linked = await self._ledger.links(gateway_id)
        answers = await asyncio.gather(*(_asked(one, gateway_id) for one in self._fleet.connections))
        shown = {owner for answer in answers for owner in answer.owners}
        if missing := linked - shown:
            logger.info("gateway %s: %d of %d journals cannot be read", gateway_id, len(missing), len(linked))
        entries = [entry for answer in answers for entry in answer.entries]
        return Journals(
            usages={e.request_id: (journaled_usage(e), e.note) for e in entries if not e.running},
            running=any(entry.running for entry in entries),
            complete=linked <= shown,
            elsewhere=self._elsewhere,
        )

    async def acknowledge(self, gateway_id: str, request_ids: Collection[str]) -> None:
        for connection in self._fleet.connections:
            connection.acknowledge(request_ids, foreign=True)

    async def _tidy(self) -> None:
        waited = 0.0
        while True:
            await asyncio.sleep(_SOON_S)
            waited += _SOON_S
            if waited < _TIDY_S and not self._cut:
                continue
            waited = 0.0
            for connection in list(self._fleet.connections):
                try:
                    await self.tidy(connection)
                except SQLAlchemyError as error:
                    logger.warning("journals cannot be compared with the books: %s", type(error).__name__)

    async def tidy(self, connection: Connection) -> None:
        """Hold what has ended there against the books, and acknowledge what they are done with, whoever's it was."""
        entries = (await _asked(connection, "")).entries
        if entries:
            made = {entry.request_id: journaled_usage(entry).completion_tokens for entry in entries}
            done = await self._ledger.compare(made)
            connection.acknowledge(done, foreign=True)
            for id in done & self._cut.keys():
                del self._cut[id]
        now = time.monotonic()
        self._cut = {id: until for id, until in self._cut.items() if until > now}


async def _asked(connection: Connection, gateway_id: str) -> Journaled:
    """Nobody's journal where the replica does not answer."""
    try:
        return await connection.journal(gateway_id, _ANSWER_S)
    except SignalboxError as error:
        logger.info("a journal cannot be read: %s", error.message)
        return Journaled((), ())
