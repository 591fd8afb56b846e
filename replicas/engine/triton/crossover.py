"""Which of several kernels is fastest for a number of rows: measured once a shape and device, kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from replicas.engine.graphs import CudaGraphs
from replicas.engine.native.compiler import cache_dir
from replicas.engine.triton.device import seconds_of

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_FLUSHED, _TRIES = 256 << 20, 15
Measure = Callable[[Callable[[], object]], float]


class Crossover:
    """file: JSON {key: {bucket: kernel}}; an unreadable one is measured anew. measure: how long a call takes."""

    def __init__(self, file: Path, measure: Measure) -> None:
        self._file, self._measure = file, measure
        self._known = _read(file)
        self._short_of_memory = False  # then what was left out may run another time, and nothing more is kept

    def choose(
        self,
        key: str,
        candidates: Callable[[int], Sequence[str]],
        run: Callable[[str, int], Callable[[], object]],
        buckets: Sequence[int] = BUCKETS,
    ) -> dict[int, str]:
        """The fastest kernel for each bucket.

        key: names everything that times depend on. candidates(rows): kernels that take so many. run(kernel, rows)
        gives what is to be timed.
        """
        stored = self._known.get(key, {})
        chosen = {rows: stored.get(str(rows), "") for rows in buckets}
        if all(name in candidates(rows) for rows, name in chosen.items()):
            return chosen
        for rows in buckets:
            times = self._times(candidates(rows), rows, run)
            chosen[rows] = min(times, key=lambda name: times[name])
        logger.info("kernels of %s: %s", key, chosen)
        self._known[key] = {str(rows): name for rows, name in chosen.items()}
        if not self._short_of_memory:
            self._write()
        return chosen

    def _times(
        self, names: Sequence[str], rows: int, run: Callable[[str, int], Callable[[], object]]
    ) -> dict[str, float]:
        """Seconds of those that can run: a device may have less shared memory than a kernel wants. One alone is not
        timed."""
        if len(names) == 1:
            return {names[0]: 0.0}
        times, refused = {}, None
        for name in names:
            try:
                times[name] = self._measure(run(name, rows))
            except Exception as error:
                logger.info("%s does not run on %d rows: %s", name, rows, error)
                self._short_of_memory |= isinstance(error, torch.OutOfMemoryError)
                refused = error
        if refused is not None and not times:
            raise refused
        return times

    def _write(self) -> None:
        """Other processes' entries are kept; a cache that cannot be written costs the next start its measuring."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._known = {**_read(self._file), **self._known}
            with tempfile.NamedTemporaryFile("w", dir=self._file.parent, delete=False) as scratch:
                json.dump(self._known, scratch, indent=1)
            os.replace(scratch.name, self._file)
        except OSError as error:
            logger.warning("%s cannot be written: %s", self._file, error)


def bucket_of(rows: int) -> int:
    """The smallest of BUCKETS that is not less; the largest for more."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), BUCKETS[-1])


def _read(file: Path) -> dict[str, dict[str, str]]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(value, dict) for value in found.values()) else {}


@cache
def device_crossover() -> Crossover:
    """Times on the current CUDA device, kept in the user's cache beside the C++ kernels, for these kernels only."""
    return Crossover(cache_dir() / "triton" / f"crossover-{_kernels()}.json", _device_s)


def _kernels() -> str:
    """A digest of what was timed: the kernels' sources and who compiles them."""
    digest = hashlib.sha256(f"{torch.__version__} {version('triton')}".encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _device_s(call: Callable[[], object]) -> float:
    """Seconds on the device, recorded and replayed as in a step, so that launching from Python is not timed; the L2
    cache is cold, as another layer's weights leave it."""
    call()  # compiles

    def work() -> None:
        call()

    flush = torch.empty(_FLUSHED, dtype=torch.int8, device="cuda")
    graph = CudaGraphs()()
    graph.record(work)
    return seconds_of(graph.replay, _TRIES, before=flush.zero_)
