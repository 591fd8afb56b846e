"""A replica's prefix cache in virtual time: the engine's block pool without block numbers, tokens or tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from replicas.protocol import KVEvent

Key = bytes | int  # a cached block's hash, or a number for one that only its sequence knows


class BlockCache:
    """Reference counts and the LRU list over `num_blocks` blocks; a cached block is known by its hash."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.released = 0
        self._refs: dict[bytes, int] = {}
        self._idle: OrderedDict[Key, None] = OrderedDict()  # nobody's, still cached; the next to be evicted first
        self._blank = num_blocks  # nobody's and not cached: taken ahead of all idle ones
        self._private = 0
        self._stored: list[bytes] = []
        self._parent = b""
        self._removed: list[bytes] = []
        self._events: list[KVEvent] = []

    @property
    def num_free(self) -> int:
        return self._blank + len(self._idle)

    def leading(self, hashes: Sequence[bytes]) -> int:
        refs = self._refs
        for number, digest in enumerate(hashes):
            if digest not in refs:
                return number
        return len(hashes)

    def idle_among(self, hashes: Sequence[bytes]) -> int:
        refs = self._refs
        return sum(refs[digest] == 0 for digest in hashes)

    def acquire(self, hashes: Sequence[bytes]) -> None:
        for digest in hashes:
            if self._refs[digest] == 0:
                del self._idle[digest]
            self._refs[digest] += 1

    def allocate(self, count: int) -> list[Key]:
        """Blocks of one's own, evicting what was used least recently. The caller checked `num_free`."""
        assert count <= self.num_free, f"asked for {count} blocks, {self.num_free} are free"
        fresh = min(count, self._blank)
        self._blank -= fresh
        for _ in range(count - fresh):
            evicted, _nothing = self._idle.popitem(last=False)
            if isinstance(evicted, bytes):
                del self._refs[evicted]
                self._emit(removed=evicted)
        first, self._private = self._private, self._private + count
        return list(range(first, self._private))

    def store(self, blocks: list[Key], hashes: Sequence[bytes], first: int, end: int, root: bytes) -> None:
        """Make blocks[first:end] findable under their hashes; a hash that is cached already leaves ours private."""
        for number in range(first, end):
            digest = hashes[number]
            if digest not in self._refs:
                self._refs[digest] = 1
                blocks[number] = digest
                self._emit(stored=digest, parent=hashes[number - 1] if number else root)

    def release(self, blocks: Sequence[Key], sampled: Sequence[int] = ()) -> None:
        """Let go of a sequence's blocks, the last first.

        sampled: which of them are full and hold sampled tokens; the engine caches these too, under hashes of no prompt.
        """
        for number in reversed(range(len(blocks))):
            key = blocks[number]
            if isinstance(key, bytes):
                self._refs[key] -= 1
                if self._refs[key]:
                    continue
            if isinstance(key, bytes) or number in sampled:
                self._idle[key] = None
            else:
                self._blank += 1
            self.released += 1

    def take_events(self) -> list[KVEvent]:
        self._flush()
        events, self._events = self._events, []
        return events

    def check_integrity(self, holders: Sequence[Sequence[Key]]) -> None:
        """Recount against the block lists of all sequences; AssertionError if it is off."""
        counts: dict[bytes, int] = dict.fromkeys(self._refs, 0)
        private: set[int] = set()
        for blocks in holders:
            for key in blocks:
                if isinstance(key, bytes):
                    counts[key] += 1
                else:
                    assert key not in private, f"block {key} is held twice"
                    assert key not in self._idle, f"block {key} is held and idle"
                    private.add(key)
        assert counts == self._refs, "reference counts differ from the holders'"
        idle = {key for key in self._idle if isinstance(key, bytes)}
        assert idle == {key for key, refs in counts.items() if refs == 0}, "idle list and reference counts differ"
        held = len(private) + sum(refs > 0 for refs in counts.values())
        assert held + self.num_free == self.num_blocks, f"{held} held + {self.num_free} free != {self.num_blocks}"

    def _emit(self, *, stored: bytes | None = None, parent: bytes = b"", removed: bytes | None = None) -> None:
        """Neighbours of one kind travel in one event."""
        if removed is not None:
            if self._stored:
                self._flush()
            self._removed.append(removed)
        elif stored is not None:
            if self._removed or (self._stored and self._stored[-1] != parent):
                self._flush()
            if not self._stored:
                self._parent = parent
            self._stored.append(stored)

    def _flush(self) -> None:
        if self._stored:
            self._events.append(KVEvent(kind="stored", hashes=tuple(self._stored), parent=self._parent))
            self._stored = []
        if self._removed:
            self._events.append(KVEvent(kind="removed", hashes=tuple(self._removed)))
            self._removed = []
