"""Virtual time: one heap of what happens next."""

from __future__ import annotations

import gc
import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Clock:
    """Of what happens at the same instant, the first that was foreseen comes first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.foreseen = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, when: float, happens: Callable[..., None], *args: Any) -> None:
        """`happens(*args, when)` when it is time."""
        self.foreseen += 1
        heapq.heappush(self._heap, (when, self.foreseen, happens, args))

    def run(self) -> None:
        """Until nothing is foreseen any more."""
        heap = self._heap
        with _uncollected():
            while heap:
                self.now, _, happens, args = heapq.heappop(heap)
                happens(*args, self.now)


@contextmanager
def _uncollected() -> Iterator[None]:
    """A simulation makes millions of objects and no cycles: looking for these would take time that grows with both."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
