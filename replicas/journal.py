"""What a replica produced for whom, kept until the gateway that asked has it on its books.

One file per replica process, appended to; the entries are also in memory. A gateway acknowledges a request once its
usage is committed, and the entry is forgotten. When a gateway dies, another one reads here what to charge. When the
replica dies, its file stays: the next journal that opens in the same folder adopts it, as can `adopt` at any time.

    record = length (uint32 LE) | crc32 of body (uint32 LE) | body (msgpack array)
    body   = [1, gateway, request, prompt tokens, note]                 began
           | [2, request, completion tokens]                           so far
           | [3, request, prompt, cached, completion tokens, outcome]  ended
           | [4, [request, ...]]                                       acknowledged

What `flush` has written is in the kernel and survives the death of this process, by whatever signal. It is not forced
to the disk, so a power failure may lose the last seconds, which are then charged as reserved. A torn or garbled record
ends what is read of a file. Owned by one thread; knows no sockets and no engine.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from replicas.protocol import Usage

log = logging.getLogger(__name__)

_SUFFIX = ".journal"
_HEAD = struct.Struct("<II")
_MOST_BODY = 2**20
_BEGAN, _SO_FAR, _ENDED, _ACKNOWLEDGED = 1, 2, 3, 4

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Outcome(StrEnum):
    """RUNNING: not ended yet. FINISHED: all of its tokens were made. ABORTED: ended before. LOST: the replica died."""

    RUNNING = "running"
    FINISHED = "finished"
    ABORTED = "aborted"
    LOST = "lost"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One request. `note` is the gateway's own and comes back as it was given."""

    gateway_id: str
    request_id: str
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    outcome: Outcome = Outcome.RUNNING
    note: str = ""

    @property
    def usage(self) -> Usage:
        """What is to be paid: the prompt only if it was computed to the end, which the first token shows."""
        if not self.completion_tokens and self.outcome is not Outcome.FINISHED:
            return Usage(prompt_tokens=0, completion_tokens=0)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalLimits:
    """progress_s: how often the tokens of running requests are written. Beyond `entries`, the oldest that have ended
    are forgotten without acknowledgement (counted in `Journal.dropped`); beyond `bytes` the file is written anew.
    """

    progress_s: float = 0.5
    entries: int = 50_000
    bytes: int = 32 * 2**20


class Journal:
    """This process's journal. `owner` must be unique among living and dead processes (an incarnation is)."""

    def __init__(self, folder: Path, owner: str, limits: JournalLimits | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._limits = limits or JournalLimits()
        self._folder = folder
        self._path = folder / f"{owner}{_SUFFIX}"
        self._entries: dict[str, Entry] = {}
        self._running: dict[str, int] = {}
        self._progressed: set[str] = set()
        self._progress_at = time.monotonic()
        self._buffer = bytearray()
        self._written = 0
        self._failing = False
        self.dropped = 0
        self._file = _open_locked(self._path)
        self.adopt()

    def __len__(self) -> int:
        return len(self._entries)

    # ---------------------------------------------------------------- what the engine's thread notes

    def begin(self, gateway_id: str, request_id: str, prompt_tokens: int, note: str = "") -> None:
        """The engine has taken the request."""
        entry = Entry(gateway_id=gateway_id, request_id=request_id, prompt_tokens=prompt_tokens, note=note)
        self._entries[request_id] = entry
        self._running[request_id] = 0
        self._append(_began(entry))

    def progress(self, request_id: str, tokens: int) -> None:
        """So many more tokens were made for it. Written at intervals."""
        if request_id in self._running:
            self._running[request_id] += tokens
            self._progressed.add(request_id)

    def end(self, request_id: str, usage: Usage | None = None) -> None:
        """The request has left the engine: with the usage of its last chunk, or aborted with what it had made."""
        made = self._running.pop(request_id, None)
        if made is None:
            return
        self._progressed.discard(request_id)
        entry = self._entries[request_id]
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
        del self._entries[request_id]
        self._entries[request_id] = entry  # at the end: the order in which they may be dropped
        self._append(_ended(entry))
        self._bound()

    def flush(self) -> None:
        """Write what was noted. To be called before a gateway is told of an end, and after every step of the engine."""
        now = time.monotonic()
        if self._progressed and now - self._progress_at >= self._limits.progress_s:
            self._progress_at = now
            for request_id in self._progressed:
                self._append([_SO_FAR, request_id, self._running[request_id]])
            self._progressed.clear()
        if self._buffer:
            self._write()
            if self._written > self._limits.bytes:
                self._rewrite()

    # ---------------------------------------------------------------- what gateways ask

    def read(self, gateway_id: str) -> list[Entry]:
        """Everything of that gateway which nobody has acknowledged; running ones with what they have made so far."""
        found = []
        for entry in self._entries.values():
            if entry.gateway_id == gateway_id:
                made = self._running.get(entry.request_id)
                found.append(entry if made is None else replace(entry, completion_tokens=made))
        return found

    def acknowledge(self, request_ids: Iterable[str]) -> None:
        """Their usage is on the books. Requests that still run are kept."""
        done = [id for id in request_ids if id in self._entries and id not in self._running]
        for id in done:
            del self._entries[id]
        if done:
            self._append([_ACKNOWLEDGED, done])

    def adopt(self) -> int:
        """Take over the files that dead processes left in the folder; how many."""
        adopted = 0
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            if path == self._path:
                continue
            with _locked_orphan(path) as file:
                if file is None:
                    continue
                for entry in _replayed(file):
                    self._entries[entry.request_id] = entry
                    self._append(_began(entry))
                    self._append(_ended(entry))
                self._write()
                if not self._failing:
                    path.unlink()
                    adopted += 1
        self._bound()
        return adopted

    def close(self) -> None:
        """Stop writing. The file goes if there is nothing left in it, else the next journal adopts it."""
        self._write()
        if not self._entries:
            self._path.unlink(missing_ok=True)
        os.close(self._file)

    # ---------------------------------------------------------------- the file

    def _append(self, body: list[Any]) -> None:
        packed = _encode(body)
        self._buffer += _HEAD.pack(len(packed), zlib.crc32(packed)) + packed

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
        fresh = self._path.with_suffix(".new")
        old, kept = self._file, self._written
        try:
            self._file = _open_locked(fresh)
        except OSError as error:
            log.error("the journal cannot be shortened: %s", error)
            self._written = 0
            return
        self._written = 0
        for entry in self._entries.values():
            self._append(_began(entry))
            if entry.request_id not in self._running:
                self._append(_ended(entry))
            elif self._running[entry.request_id]:
                self._append([_SO_FAR, entry.request_id, self._running[entry.request_id]])
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
        for id in forgotten:
            del self._entries[id]
        if forgotten:
            self._append([_ACKNOWLEDGED, forgotten])
            self.dropped += len(forgotten)
            log.error("the journal is full: %d requests were forgotten unacknowledged", len(forgotten))


def read_folder(folder: Path, gateway_id: str) -> list[Entry]:
    """The entries of a gateway in all files of a folder, whether or not their processes live; running ones as last
    written. For whoever shares the disk with the replicas.
    """
    found: dict[str, Entry] = {}
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            found.update((e.request_id, e) for e in _replayed(file.fileno(), dead=False) if e.gateway_id == gateway_id)
    return list(found.values())


def _began(entry: Entry) -> list[Any]:
    return [_BEGAN, entry.gateway_id, entry.request_id, entry.prompt_tokens, entry.note]


def _ended(entry: Entry) -> list[Any]:
    counts = (entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens)
    return [_ENDED, entry.request_id, *counts, entry.outcome.value]


def _open_locked(path: Path) -> int:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


@contextlib.contextmanager
def _locked_orphan(path: Path) -> Iterator[int | None]:
    """The open file if its owner is dead and nobody else is adopting it."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # it may have been replaced or removed between opening and locking
        yield file if os.fstat(file).st_ino == os.stat(path).st_ino else None
    except (BlockingIOError, FileNotFoundError):
        yield None
    finally:
        os.close(file)


def _replayed(file: int, *, dead: bool = True) -> list[Entry]:
    """What is left to acknowledge in a file. Requests that ran when their process died are LOST."""
    entries: dict[str, Entry] = {}
    with os.fdopen(os.dup(file), "rb") as reader:
        data = reader.read()
    for body in _bodies(data):
        _apply(entries, body)
    if not dead:
        return list(entries.values())
    return [replace(e, outcome=Outcome.LOST) if e.outcome is Outcome.RUNNING else e for e in entries.values()]


def _bodies(data: bytes) -> Iterator[list[Any]]:
    at = 0
    while at + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) < length or length > _MOST_BODY or zlib.crc32(body) != checksum:
            return
        yield _decode(body)
        at += _HEAD.size + length


def _apply(entries: dict[str, Entry], body: list[Any]) -> None:
    kind, first, *rest = body
    if kind == _BEGAN:
        request_id, prompt_tokens, note = rest
        entries[request_id] = Entry(gateway_id=first, request_id=request_id, prompt_tokens=prompt_tokens, note=note)
    elif kind == _ACKNOWLEDGED:
        for request_id in first:
            entries.pop(request_id, None)
    elif first in entries:
        if kind == _SO_FAR:
            entries[first] = replace(entries[first], completion_tokens=rest[0])
        else:
            prompt_tokens, cached, completion, outcome = rest
            entries[first] = replace(
                entries[first],
                prompt_tokens=prompt_tokens,
                cached_tokens=cached,
                completion_tokens=completion,
                outcome=Outcome(outcome),
            )
