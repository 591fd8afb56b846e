"""What a replica's server remembers of its gateways and of the requests that they have running."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from replicas.wire import ChunkPart


@dataclass(slots=True, eq=False)
class Peer:
    """A gateway's connection. last_seq: of its latest submission. sent/read: bytes of Chunks frames."""

    routing_id: bytes
    gateway_id: str
    last_seq: int = 0
    sent: int = 0
    read: int = 0
    outbox: list[ChunkPart] = field(default_factory=list)


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """A request that runs, by the names that both sides give it."""

    request_id: str
    peer: Peer
    seq: int


class Streams:
    """Every running request exactly once: by request id, and by its gateway's connection and sequence number."""

    def __init__(self) -> None:
        self._by_id: dict[str, Stream] = {}
        self._by_seq: dict[tuple[bytes, int], Stream] = {}
        self._started: set[str] = set()

    def __len__(self) -> int:
        return len(self._by_id)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def __iter__(self) -> Iterator[Stream]:
        """Over a copy: streams may be closed meanwhile."""
        return iter(list(self._by_id.values()))

    def open(self, request_id: str, peer: Peer, seq: int) -> None:
        stream = Stream(request_id, peer, seq)
        self._by_id[request_id] = self._by_seq[peer.routing_id, seq] = stream

    def get(self, request_id: str) -> Stream | None:
        return self._by_id.get(request_id)

    def find(self, peer: Peer, seq: int) -> Stream | None:
        return self._by_seq.get((peer.routing_id, seq))

    def close(self, stream: Stream) -> None:
        del self._by_id[stream.request_id], self._by_seq[stream.peer.routing_id, stream.seq]
        self._started.discard(stream.request_id)

    def mark_started(self, stream: Stream) -> None:
        """Its gateway has been sent something of it."""
        self._started.add(stream.request_id)

    def has_started(self, stream: Stream) -> bool:
        return stream.request_id in self._started
