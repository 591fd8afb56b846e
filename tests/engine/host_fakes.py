"""Parts for tests of the host tier: streams without a device, an engine that fetches whatever it can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from replicas.engine import Engine
from replicas.engine.host_store import HostStore


class Mark:
    """A point in the order in which work was launched; `stream` "side" or "compute"."""

    def __init__(self, stream: str, at: int) -> None:
        self.stream, self.at = stream, at

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: Mark) -> float:
        assert end_event.at > self.at, "a copy ended before it began"
        return float(end_event.at - self.at)


class OrderedStreams:
    """Everything runs at once, in the order of launching. Notes which stream waited for what."""

    def __init__(self) -> None:
        self.stream, self.marks = "compute", 0
        self.waits: list[tuple[str, Mark]] = []

    @contextmanager
    def side(self) -> Iterator[None]:
        self.stream = "side"
        yield
        self.stream = "compute"

    def mark(self) -> Mark:
        self.marks += 1
        return Mark(self.stream, self.marks)

    def wait(self, event: Mark) -> None:
        self.waits.append((self.stream, event))

    def synchronize(self) -> None:
        pass


def store_of(engine: Engine) -> HostStore:
    assert engine.host_cache is not None
    return engine.host_cache.store


def fetch_always(engine: Engine) -> Engine:
    """Whatever the clock says: how fast a machine copies and computes decides nothing in a test."""
    store_of(engine).rule.pays = lambda blocks, tokens: True  # type: ignore[method-assign]
    return engine
