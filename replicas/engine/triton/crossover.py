"""Which of several kernels is fastest for a number of rows: measured once a shape and device, kept on disk."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from replicas.engine.native.compiler import cache_dir

logger = logging.getLogger(__name__)

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
Measure = Callable[[Callable[[], object]], float]


class Crossover:
    """file: JSON {key: {bucket: kernel}}; an unreadable one is measured anew. measure: how long a call takes."""

    def __init__(self, file: Path, measure: Measure) -> None:
        self._file, self._measure = file, measure
        self._known = _read(file)

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
    """Times on the current CUDA device, kept in the user's cache beside the C++ kernels."""
    from triton.testing import do_bench

    def measure(call: Callable[[], object]) -> float:
        call()  # compiles
        return float(do_bench(call, warmup=3, rep=12, return_mode="median"))

    return Crossover(cache_dir() / "triton" / "crossover.json", measure)
