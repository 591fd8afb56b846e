"""What a gateway does for the ledger beside its requests: heirs, webhooks, and keeping the books bounded."""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy.exc import SQLAlchemyError

from gateway.db.database import Database
from gateway.ledger.alerts import Webhooks
from gateway.ledger.ledger import Ledger
from gateway.ledger.recovery import JournalSource, Recovery
from gateway.ledger.usage import prune

logger = logging.getLogger(__name__)

_PRUNE_S = 3600.0


class Books:
    def __init__(self, database: Database, ledger: Ledger, secret: bytes, journals: JournalSource) -> None:
        self._database = database
        self._recovery = Recovery(ledger, journals)
        self._webhooks = Webhooks(database, secret)
        self._pruning: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._recovery.start()
        self._webhooks.start()
        self._pruning = asyncio.create_task(self._prune(), name="ledger-prune")

    async def aclose(self) -> None:
        if self._pruning is not None:
            self._pruning.cancel()
            await asyncio.gather(self._pruning, return_exceptions=True)
        await self._webhooks.aclose()
        await self._recovery.aclose()

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(_PRUNE_S)
            try:
                await self._database.write(lambda connection: prune(connection, time.time()))
            except SQLAlchemyError as error:
                logger.warning("the books could not be pruned: %s", type(error).__name__)
