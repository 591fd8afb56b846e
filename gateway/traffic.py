"""Records traffic for replay: hashes, lengths and times of every request, never a word of a prompt. `policies.traffic`
states the format.

On a request's path there is one append to a bounded ring; a thread hashes, writes and forgets. What it cannot keep
up with is counted and left out. Files lie in `traffic/` of the state directory, one series for every gateway, and the
oldest go as soon as all of them together are too many, too large or too old.

Block hashes are put through blake2b under a key derived from the gateways' secret, so that who holds a file cannot
confirm a guessed prompt, while all gateways of one secret write the same hash for the same prefix.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from gateway.config import Traffic
from gateway.explain import Record, Step
from policies.fleet_view import RouteRequest
from replicas.protocol import Usage

logger = logging.getLogger(__name__)

FOLDER = "traffic"
_RING = 20_000
_FLUSH_S = 0.5
_SLICE = 16  # requests written before other threads get a turn
_KNOWN = 100_000  # keyed hashes remembered: prefixes repeat
_FILE_REQUESTS = 10_000
_FILES_OF_BYTES = 16  # the bound of bytes is kept by dropping files of at most this share of it

# (route, most tokens, usage) of each of a request's prompts
_Jobs = tuple[tuple[RouteRequest | None, int, Usage | None], ...]
_Item = tuple[Record, str, _Jobs]


@dataclass(slots=True)
class _File:
    path: Path
    stream: TextIOWrapper
    requests: int = 0
    size: int = 0


class TrafficRecorder:
    """`add` from the event loop; `start` and `close` around its life. Never raises on a request's path."""

    def __init__(self, keep: Traffic, folder: Path, gateway_id: str, secret: bytes) -> None:
        self._keep = keep
        self._folder = folder
        self._gateway_id = gateway_id
        self._key = traffic_key(secret)
        self._known: dict[bytes, str] = {}
        self._ring: deque[_Item] = deque(maxlen=_RING)
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._file: _File | None = None
        self._series = 0
        self.added = self.written = 0

    @property
    def dropped(self) -> int:
        """Requests that the writer did not come to, or could not write."""
        return self.added - self.written - len(self._ring)

    def add(self, record: Record, team: str) -> None:
        """The request has ended. Its prompts are let go of here: only their hashes are kept until they are written."""
        jobs: _Jobs = ()
        for step in reversed(record.steps):
            if step.role != "shadow":
                jobs = tuple([(job.route, job.max_tokens, job.used) for job in step.jobs])
                break
        if jobs:
            self.added += 1
            self._ring.append((record, team, jobs))

    def start(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._thread = threading.Thread(target=self._write_on, name="traffic", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write what is left. Blocking, for as long as that takes."""
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ---------------------------------------------------------------- the writer's thread

    def _write_on(self) -> None:
        while not self._wake.wait(_FLUSH_S):
            self._drain()
        self._drain()
        self._end_file()

    def _drain(self) -> None:
        try:
            while self._ring:
                for _ in range(min(_SLICE, len(self._ring))):
                    self._write(self._ring.popleft())
                time.sleep(0)  # others may run
            if self._file is not None:
                self._file.stream.flush()
            self._retain()
        except OSError as error:  # a full disk must not end recording for good
            logger.warning("traffic cannot be recorded: %s", error)
            self._end_file()

    def _write(self, item: _Item) -> None:
        record, team, jobs = item
        file = self._open()
        step = next(step for step in reversed(record.steps) if step.role != "shadow")
        for route, max_tokens, used in jobs:
            line = json.dumps(self._line(record, step, team, route, max_tokens, used), separators=(",", ":")) + "\n"
            file.stream.write(line)
            file.size += len(line)
        file.requests += 1
        self.written += 1

    def _line(
        self, record: Record, step: Step, team: str, route: RouteRequest | None, max_tokens: int, used: Usage | None
    ) -> dict[str, Any]:
        usage = used or Usage(prompt_tokens=0, completion_tokens=0)
        line: dict[str, Any] = {
            "time": round(record.at, 6),
            "prompt_tokens": route.prompt_tokens if route else record.prompt_tokens,
            "output_tokens": usage.completion_tokens,
            "key_id": record.key_id,
            "key": record.key_name,
            "team": team,
            "asked": record.asked,
            "model": step.model if 200 <= record.status < 300 else "",
            "generation": record.generation,
            "status": record.status,
            "failure": record.failure,
            "max_tokens": max_tokens,
            "cached_tokens": usage.cached_tokens,
            "ttft_s": None if step.ttft_s is None else round(step.ttft_s, 6),
            "e2e_s": None if record.ended_s is None else round(record.ended_s, 6),
            "cost": step.price.cost(usage) if used and (usage.prompt_tokens or usage.completion_tokens) else 0,
        }
        if route is not None:
            line |= {"block_tokens": route.block_size, "hashes": self._keyed(route.hashes)}
        if record.choice is not None:
            line["quality"] = {one.model: round(one.quality, 6) for one in record.choice.candidates}
        return line

    def _keyed(self, hashes: Sequence[bytes]) -> list[str]:
        known = self._known
        if len(known) > _KNOWN:
            known.clear()
        found = []
        for digest in hashes:
            name = known.get(digest)
            if name is None:
                name = known[digest] = keyed_hash(self._key, digest)
            found.append(name)
        return found

    # ---------------------------------------------------------------- files

    def _open(self) -> _File:
        file = self._file
        if file is not None and (
            file.requests >= _FILE_REQUESTS or file.size >= self._keep.max_mib * 2**20 / _FILES_OF_BYTES
        ):
            self._end_file()
            file = None
        if file is None:
            self._series += 1
            path = self._folder / f"{self._gateway_id}-{self._series:06}.jsonl"
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            file = self._file = _File(path, open(descriptor, "w", encoding="utf-8"))
        return file

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.stream.close()
            self._file = None

    def _retain(self) -> None:
        """Drop the oldest files, whoever wrote them, until the bounds hold."""
        keep, oldest_at = self._keep, time.time() - self._keep.max_days * 86_400
        files = []
        for path in self._folder.glob("*.jsonl"):
            try:
                found = path.stat()
            except FileNotFoundError:
                continue  # another gateway was first
            files.append((found.st_mtime, found.st_size, path))
        files.sort()
        size = sum(one[1] for one in files)
        most = max(1, keep.max_requests // _FILE_REQUESTS)
        own = self._file.path if self._file is not None else None
        for number, (changed, own_size, path) in enumerate(files):
            if size <= keep.max_mib * 2**20 and len(files) - number <= most and changed >= oldest_at:
                break
            if path != own:
                path.unlink(missing_ok=True)
                size -= own_size


def traffic_key(secret: bytes) -> bytes:
    """Of the gateways' secret, for hashes of recorded blocks alone."""
    return hmac.new(secret, b"signalbox traffic", hashlib.sha256).digest()


def keyed_hash(key: bytes, digest: bytes) -> str:
    """64 bits in hexadecimal."""
    return hashlib.blake2b(digest, digest_size=8, key=key).hexdigest()
