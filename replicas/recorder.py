"""A replica's server and its journal: what is noted of requests, and what gateways are told when they ask.

Without a journal everything here does nothing, and costs next to nothing; with one, only requests that came with a note
(something is reserved for them) are written down. Used by the engine's thread, save for `adopt`.
"""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue

from replicas import wire
from replicas.journal import Estate, Journal
from replicas.journal_records import Outcome
from replicas.protocol import Chunk, GenerateRequest

# Of one page: some hundred kilobytes, so that no connection is held up for long.
_ENTRIES = 2_000


class Recorder:
    """Owns `journal` from here on."""

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._estates: SimpleQueue[list[Estate]] = SimpleQueue()

    def adopt(self) -> bool:
        """Claim what dead replicas left in the journal's folder, for the next `flush` to take over; whether there is
        anything. From any thread but an event loop's: it reads files.
        """
        estates = self._journal.claim() if self._journal is not None else []
        if estates:
            self._estates.put(estates)
        return bool(estates)

    def began(self, gateway_id: str, request: GenerateRequest) -> None:
        if self._journal is not None and request.note:
            self._journal.begin(gateway_id, request.request_id, len(request.prompt_token_ids), request.note)

    def saw(self, chunk: Chunk) -> None:
        if self._journal is not None:
            self._journal.saw(chunk)

    def ended(self, request_id: str) -> None:
        """However it ended; what its last chunk said stands."""
        if self._journal is not None:
            self._journal.end(request_id)

    def flush(self) -> None:
        """Write everything, so that gateways may be told."""
        if self._journal is not None:
            self._inherit(self._journal)
            self._journal.flush()

    def _inherit(self, journal: Journal) -> None:
        while not self._estates.empty():
            journal.inherit(self._estates.get())

    def acknowledge(self, command: wire.JournalAck) -> None:
        if self._journal is not None:
            self._journal.acknowledge(command.request_ids)

    def pages(self, command: wire.JournalAsk) -> Iterator[wire.JournalPage]:
        """The answer, at least one page of it."""
        if self._journal is None:
            yield wire.JournalPage(command.nonce, (), (), last=True)
            return
        self._inherit(self._journal)
        found = self._journal.read(command.gateway_id) if command.gateway_id else self._journal.ended()
        entries = [
            wire.journal_entry(entry.request_id, entry.usage, entry.outcome is Outcome.RUNNING, entry.note)
            for entry in found
        ]
        owners = self._journal.owners(command.gateway_id)
        for at in range(0, max(len(entries), 1), _ENTRIES):
            last = at + _ENTRIES >= len(entries)
            yield wire.JournalPage(command.nonce, owners, tuple(entries[at : at + _ENTRIES]), last)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
