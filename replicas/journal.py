"""What a replica produced for whom, kept until the gateway that asked has it on its books.

One file per replica process (`replicas.journal_records` has its layout), appended to; the entries are also in memory. A
gateway acknowledges a request once its usage is committed, and the entry is forgotten. When a gateway dies, another one
reads here what to charge. When the replica dies, its file stays, and a journal in the same folder takes it over: the
next one to open, or a living one that looks (`claim`, `inherit`). Whose files it holds it says itself (`owners`), so
that whoever asks knows when everybody has been heard.

What `flush` has written is in the kernel and survives the death of this process, by whatever signal. It is not forced
to the disk, so a power failure may lose the last seconds, which are then charged as reserved. Owned by one thread, save
for `claim`; knows no sockets and no engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from replicas import journal_records as records
from replicas.journal_records import SUFFIX, Entry, Outcome, Read
from replicas.protocol import Chunk, ConfigError, Usage

log = logging.getLogger(__name__)

_DRAFT = ".new"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalLimits:
    """progress_s: how often the tokens of running requests are written; 0 at every flush, so that nothing is told that
    is not written. Beyond `entries`, the oldest that have ended are forgotten without acknowledgement (counted in
    `Journal.dropped`), beyond `owners` the oldest of those; beyond `bytes` the file is written anew.
    """

    progress_s: float = 0.0
    entries: int = 50_000
    owners: int = 1_000
    bytes: int = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Estate:
    """A dead process' file, locked by whoever holds this: to be inherited."""

    path: Path
    file: int
    contents: Read


class Journal:
    """This process's journal. `owner` must be unique among living and dead processes (an incarnation is)."""

    def __init__(self, folder: Path, owner: str, limits: JournalLimits | None = None) -> None:
        """ConfigError where the folder cannot be written: what is produced could not be accounted for."""
        self._limits = limits or JournalLimits()
        self._folder = folder
        self._path = folder / f"{owner}{SUFFIX}"
        self._entries: dict[str, Entry] = {}
        self._running: dict[str, int] = {}
        self._progressed: dict[str, None] = {}
        self._progress_at = time.monotonic()
        self._owners: dict[str, None] = {owner: None}
        self._forgot: set[str] = set()
        self._buffer = bytearray()
        self._written = 0
        self._failing = False
        self.dropped = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = records.open_locked(self._path)
        except OSError as error:
            raise ConfigError(f"no journal can be kept in {folder}: {error.strerror or error}") from error
        self.inherit(self.claim())

    def __len__(self) -> int:
        return len(self._entries)

    def owners(self, gateway_id: str) -> tuple[str, ...]:
        """Of whose journals everything is here that concerns the gateway and that nobody has acknowledged: this
        process's, and those of the dead whose files it took over whole. None where something had to be forgotten.
        """
        return () if gateway_id in self._forgot else tuple(self._owners)

    # ---------------------------------------------------------------- what the engine's thread notes

    def begin(self, gateway_id: str, request_id: str, prompt_tokens: int, note: str = "") -> None:
        """The engine has taken the request."""
        entry = Entry(gateway_id=gateway_id, request_id=request_id, prompt_tokens=prompt_tokens, note=note)
        self._entries[request_id] = entry
        self._running[request_id] = 0
        self._buffer += records.began(entry)

    def saw(self, chunk: Chunk) -> None:
        """What a step brought for a request; nothing happens for one that was not begun here."""
        if chunk.request_id in self._running:
            self.progress(chunk.request_id, len(chunk.token_ids))
            if chunk.timing is not None and chunk.timing.cached_tokens:
                self._cached(chunk.request_id, chunk.timing.cached_tokens)
            if chunk.usage is not None:
                self.end(chunk.request_id, chunk.usage)

    def _cached(self, request_id: str, tokens: int) -> None:
        entry = self._entries[request_id]
        if entry.cached_tokens != tokens:
            self._entries[request_id] = entry = replace(entry, cached_tokens=tokens)
            self._buffer += records.cached(entry)

    def progress(self, request_id: str, tokens: int) -> None:
        """So many more tokens were made for it."""
        if tokens and request_id in self._running:
            self._running[request_id] += tokens
            self._progressed[request_id] = None

    def end(self, request_id: str, usage: Usage | None = None) -> None:
        """The request has left the engine: with the usage of its last chunk, or aborted with what it had made."""
        made = self._running.pop(request_id, None)
        if made is None:
            return
        self._progressed.pop(request_id, None)
        entry = self._entries.pop(request_id)
        if usage is None:
            entry = replace(entry, completion_tokens=made, outcome=Outcome.ABORTED)
        else:
            entry = replace(
                entry,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                outcome=Outcome.FINISHED,
            )
        self._entries[request_id] = entry  # at the end: the order in which they may be dropped
        self._buffer += records.ended(entry)
        self._bound()

    def flush(self) -> None:
        """Write what was noted. To be called before a gateway is told of it."""
        if self._progressed:
            now = time.monotonic()
            if now - self._progress_at >= self._limits.progress_s:
                self._progress_at = now
                self._buffer += records.so_far({id: self._running[id] for id in self._progressed})
                self._progressed.clear()
        if self._buffer:
            self._write()
            if self._written > self._limits.bytes:
                self._rewrite()

    # ---------------------------------------------------------------- what gateways ask

    def read(self, gateway_id: str) -> list[Entry]:
        """Everything of that gateway which nobody has acknowledged; running ones with what they have made so far."""
        return [self._now(entry) for entry in self._entries.values() if entry.gateway_id == gateway_id]

    def ended(self) -> list[Entry]:
        """Everything that has ended and that nobody has acknowledged, of all gateways."""
        return [entry for entry in self._entries.values() if entry.request_id not in self._running]

    def _now(self, entry: Entry) -> Entry:
        made = self._running.get(entry.request_id)
        return entry if made is None else replace(entry, completion_tokens=made)

    def acknowledge(self, request_ids: Iterable[str]) -> None:
        """Their usage is on the books. Requests that still run are kept."""
        done = [id for id in dict.fromkeys(request_ids) if id in self._entries and id not in self._running]
        for id in done:
            del self._entries[id]
        if done:
            self._buffer += records.acknowledged(done)

    # ---------------------------------------------------------------- what the dead left

    def claim(self) -> list[Estate]:
        """The files of dead processes in the folder, locked and read. From any thread: it may take a while."""
        found = []
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            file = None if path == self._path else records.lock_orphan(path)
            if file is not None:
                found.append(Estate(path, file, records.read(file)))
        return found

    def inherit(self, estates: Sequence[Estate]) -> int:
        """Take over what was claimed; how many."""
        inherited = 0
        for estate in estates:
            for entry in estate.contents.entries.values():
                self._entries[entry.request_id] = entry
                self._buffer += records.began(entry) + records.ended(entry)
            owners = dict.fromkeys(estate.contents.owners)
            if estate.contents.whole:
                owners[estate.path.name.removesuffix(SUFFIX)] = None
            self._owners |= owners
            self._forgot |= estate.contents.forgot
            self._buffer += records.taken_over(owners) + records.forgotten(estate.contents.forgot)
            self._write()
            if not self._failing:
                estate.path.unlink(missing_ok=True)
                estate.path.with_suffix(_DRAFT).unlink(missing_ok=True)
                inherited += 1
            os.close(estate.file)
        for owner in list(self._owners)[1 : len(self._owners) - self._limits.owners]:
            del self._owners[owner]
        self._bound()
        return inherited

    def close(self) -> None:
        """Stop writing. The file stays, be it empty: who takes it over knows that there is nothing more to come."""
        self._write()
        os.close(self._file)

    # ---------------------------------------------------------------- the file

    def _write(self) -> None:
        try:
            while self._buffer:
                count = os.write(self._file, self._buffer)
                del self._buffer[:count]
                self._written += count
            self._failing = False
        except OSError as error:  # a full disk: serving goes on, and what is noted stays in memory
            if not self._failing:
                log.error("the journal cannot be written: %s", error)
            self._failing = True
            if len(self._buffer) > self._limits.bytes:
                self._buffer.clear()

    def _rewrite(self) -> None:
        """A new file with what is still to be acknowledged, in place of the old one."""
        fresh = self._path.with_suffix(_DRAFT)
        old, kept = self._file, self._written
        try:
            self._file = records.open_locked(fresh)
        except OSError as error:
            log.error("the journal cannot be shortened: %s", error)
            self._written = 0
            return
        self._written = 0
        self._buffer += records.taken_over(list(self._owners)[1:]) + records.forgotten(self._forgot)
        for entry in self._entries.values():
            self._buffer += records.began(entry)
            if entry.request_id not in self._running:
                self._buffer += records.ended(entry)
            elif entry.cached_tokens:
                self._buffer += records.cached(entry)
        self._buffer += records.so_far(self._running)
        self._write()
        if self._failing:
            os.close(self._file)
            fresh.unlink(missing_ok=True)
            self._file, self._written = old, kept
            self._buffer.clear()
            return
        os.replace(fresh, self._path)
        os.close(old)
        self._written = 0

    def _bound(self) -> None:
        excess = len(self._entries) - self._limits.entries
        if excess <= 0:
            return
        forgotten = [id for id in self._entries if id not in self._running][:excess]
        if forgotten:
            of = {self._entries.pop(id).gateway_id for id in forgotten}
            self._forgot |= of
            self._buffer += records.acknowledged(forgotten) + records.forgotten(of)
            self.dropped += len(forgotten)
            log.error("the journal is full: %d requests were forgotten unacknowledged", len(forgotten))


def read_folder(folder: Path, gateway_id: str) -> list[Entry]:
    """The entries of a gateway in all files of a folder, whether or not their processes live; running ones as last
    written. For whoever shares the disk with the replicas.
    """
    found: dict[str, Entry] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            for entry in records.read(file.fileno(), dead=False).entries.values():
                if entry.gateway_id == gateway_id:
                    found[entry.request_id] = entry
    return list(found.values())
