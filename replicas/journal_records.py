"""How a replica's journal lies on the disk: records, and what is read out of a file.

    record = length (uint32 LE) | crc32 of body (uint32 LE) | body (msgpack array)
    body   = [1, gateway, request, prompt tokens, note]                 began
           | [2, request, tokens so far, request, tokens so far, ...]   progress
           | [3, request, prompt, cached, completion tokens, outcome]   ended
           | [4, [request, ...]]                                        acknowledged
           | [5, [owner, ...]]                                          what these left was taken over
           | [6, request, cached tokens]                                its prompt is computed
           | [7, [gateway, ...]]                                        some of these' was forgotten unacknowledged

A torn or garbled record ends what is read of a file. A living owner holds a lock on its file (flock), so an unlocked
file is what a dead process left.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec

from replicas.protocol import Usage

SUFFIX = ".journal"
_HEAD = struct.Struct("<II")
_MOST_BODY = 2**24
_BEGAN, _SO_FAR, _ENDED, _ACKNOWLEDGED, _OWNERS, _CACHED, _FORGOT = 1, 2, 3, 4, 5, 6, 7

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


@dataclass(slots=True)
class Read:
    """What a file says: what is left to acknowledge, by request id, and whose journals it has taken over.

    forgot: gateways of whose entries some are missing. whole: it could be read to its end.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    owners: dict[str, None] = field(default_factory=dict)
    forgot: set[str] = field(default_factory=set)
    whole: bool = True


# -------------------------------------------------------------------------------------------------------------- writing


def record(body: list[Any]) -> bytes:
    packed = _encode(body)
    return _HEAD.pack(len(packed), zlib.crc32(packed)) + packed


def began(entry: Entry) -> bytes:
    return record([_BEGAN, entry.gateway_id, entry.request_id, entry.prompt_tokens, entry.note])


def so_far(tokens: Mapping[str, int]) -> bytes:
    """`tokens`: made until now, by request id."""
    return record([_SO_FAR, *(part for pair in tokens.items() for part in pair)])


def cached(entry: Entry) -> bytes:
    return record([_CACHED, entry.request_id, entry.cached_tokens])


def ended(entry: Entry) -> bytes:
    counts = (entry.prompt_tokens, entry.cached_tokens, entry.completion_tokens)
    return record([_ENDED, entry.request_id, *counts, entry.outcome.value])


def acknowledged(request_ids: Iterable[str]) -> bytes:
    return record([_ACKNOWLEDGED, list(request_ids)])


def forgotten(gateway_ids: Iterable[str]) -> bytes:
    return record([_FORGOT, list(gateway_ids)])


def taken_over(owners: Iterable[str]) -> bytes:
    return record([_OWNERS, list(owners)])


# -------------------------------------------------------------------------------------------------------------- reading


def read(file: int, *, dead: bool = True) -> Read:
    """Of an open file. Requests that ran when their process died are LOST."""
    with os.fdopen(os.dup(file), "rb") as reader:
        data = reader.read()
    found, end = Read(), 0
    for body, end in _bodies(data):  # noqa: B007 - where the last one ended is looked at below
        _apply(found, body)
    found.whole = end == len(data)
    if dead:
        for entry in list(found.entries.values()):
            if entry.outcome is Outcome.RUNNING:
                found.entries[entry.request_id] = replace(entry, outcome=Outcome.LOST)
    return found


def _bodies(data: bytes) -> Iterator[tuple[list[Any], int]]:
    """Every whole record, and where it ends."""
    at = 0
    while at + _HEAD.size <= len(data):
        length, checksum = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) < length or length > _MOST_BODY or zlib.crc32(body) != checksum:
            return
        at += _HEAD.size + length
        yield _decode(body), at


def _apply(found: Read, body: list[Any]) -> None:
    kind, *rest = body
    entries = found.entries
    if kind == _BEGAN:
        gateway_id, request_id, prompt_tokens, note = rest
        entries[request_id] = Entry(
            gateway_id=gateway_id, request_id=request_id, prompt_tokens=prompt_tokens, note=note
        )
    elif kind == _SO_FAR:
        for request_id, tokens in zip(rest[::2], rest[1::2], strict=True):
            if request_id in entries:
                entries[request_id] = replace(entries[request_id], completion_tokens=tokens)
    elif kind == _ACKNOWLEDGED:
        for request_id in rest[0]:
            entries.pop(request_id, None)
    elif kind == _OWNERS:
        found.owners.update(dict.fromkeys(rest[0]))
    elif kind == _FORGOT:
        found.forgot.update(rest[0])
    elif rest[0] in entries:
        entries[rest[0]] = _changed(entries[rest[0]], kind, rest[1:])


def _changed(entry: Entry, kind: int, rest: list[Any]) -> Entry:
    if kind == _CACHED:
        return replace(entry, cached_tokens=rest[0])
    prompt_tokens, cached_tokens, completion_tokens, outcome = rest
    return replace(
        entry,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        completion_tokens=completion_tokens,
        outcome=Outcome(outcome),
    )


# ---------------------------------------------------------------------------------------------------------------- files


def open_locked(path: Path) -> int:
    """A new file, locked for as long as it is open."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def lock_orphan(path: Path) -> int | None:
    """The open file, locked, if its owner is dead and nobody else is taking it over."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # it may have been replaced or removed between opening and locking
        if os.fstat(file).st_ino == os.stat(path).st_ino:
            return file
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(file)
    return None
