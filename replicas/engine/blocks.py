"""The KV block pool: who holds which block, and which cached prefix lives where. Knows no tensors.

A block is in one of three states:

    held      refs > 0                          in nobody's list
    cached    refs == 0, hash known             in the free list, still found by `match`
    blank     refs == 0, no hash                in the free list

The free list is a doubly linked list threaded through two int arrays (index num_blocks is the sentinel), so taking the
head, returning to either end and pulling a cached block out of the middle are all O(1). Blank blocks come first, the
last one returned foremost: its memory is warm, where one never used yet costs page faults on a CPU. Cached blocks
follow in LRU order: `release` returns a sequence's blocks tail first, so of one prefix the far end is evicted before
the near end.

With a host store (`host_store.py`) a cached block that is evicted is kept there, and `match` finds it still. To those
who listen to events both places are one cache: "stored" when a block enters it, "removed" when neither has it any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from replicas.engine.host_store import HostStore
from replicas.protocol import KVEvent


@dataclass(slots=True)
class Block:
    """refs: sequences that hold it. hash: set once full and cached; parent and token_ids then say what it holds."""

    refs: int = 0
    hash: bytes | None = None
    parent: bytes = b""
    token_ids: tuple[int, ...] = ()


class BlockPool:
    """host: where evicted prefix blocks go, None if nowhere."""

    def __init__(
        self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True, host: HostStore | None = None
    ) -> None:
        assert min(num_blocks, block_size) > 0, f"pool of {num_blocks} blocks of {block_size} tokens"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.host = host
        self.num_free = num_blocks
        self.released = 0  # blocks ever returned: the engine turns it into a rate
        self._blocks = [Block() for _ in range(num_blocks)]
        self._cached: dict[bytes, int] = {}
        self._events: list[KVEvent] = []
        end = num_blocks
        self._next = [*range(1, num_blocks + 1), 0]
        self._prev = [end, *range(num_blocks)]

    # ---------------------------------------------------------------- taking and returning

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks: blank ones, then the least recently used, evicted. Caller checked `num_free`."""
        assert count <= self.num_free, f"asked for {count} blocks, {self.num_free} are free"
        taken = []
        for _ in range(count):
            block_id = self._next[self.num_blocks]
            self._unlink(block_id)
            self._evict(block_id)
            self._blocks[block_id].refs = 1
            taken.append(block_id)
        return taken

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Add one holder to each block: a cache hit, or a fork that shares its parent's blocks."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            if block.refs == 0:
                self._unlink(block_id)
            block.refs += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop one holder from each block of a sequence, last block first (see the module's LRU order)."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.refs > 0, f"block {block_id} released more often than held"
            block.refs -= 1
            if block.refs == 0:
                self._link(block_id, self._prev[self.num_blocks] if block.hash else self.num_blocks)
                self.released += 1

    def is_shared(self, block_id: int) -> bool:
        return self._blocks[block_id].refs > 1

    def refs(self, block_id: int) -> int:
        return self._blocks[block_id].refs

    # ---------------------------------------------------------------- the prefix cache

    def match(self, parent: bytes, hashes: Sequence[bytes], token_ids: Sequence[int]) -> list[int | None]:
        """Where the blocks of the longest cached prefix of `token_ids` are; nothing is acquired.

        A block's id, or None for one that only the host store has. hashes[i] belongs to
        token_ids[i * block_size : (i + 1) * block_size]. The stored tokens are compared: a hash collision is a miss,
        never another prompt's keys and values.
        """
        found: list[int | None] = []
        if not self.enable_prefix_caching:
            return found
        for i, digest in enumerate(hashes):
            block_id = self._cached.get(digest)
            if block_id is None and (self.host is None or digest not in self.host):
                break
            mine = self._tokens_of(i, token_ids)
            if block_id is not None:
                block = self._blocks[block_id]
                if block.parent != parent or block.token_ids != mine:
                    break
            elif self.host is None or not self.host.holds(digest, parent, mine):
                break
            found.append(block_id)
            parent = digest
        return found

    def take(
        self, found: Sequence[int | None], parent: bytes, hashes: Sequence[bytes], token_ids: Sequence[int]
    ) -> list[int]:
        """Acquire a prefix that `match` found, each of its blocks on the device; caller checked `num_free`.

        Those that only the host store has get a block and are cached in it at once: they are copied there before the
        step that is being scheduled computes anything.
        """
        self.acquire([block_id for block_id in found if block_id is not None])
        absent = [digest for block_id, digest in zip(found, hashes, strict=True) if block_id is None]
        if not absent:
            return [block_id for block_id in found if block_id is not None]
        assert self.host is not None, "match found blocks in a host store that is not there"
        self.host.pin(absent)  # first: what is evicted to make room for them goes to the host store, too
        fresh = iter(self.allocate(len(absent)))
        taken = []
        for i, (block_id, digest) in enumerate(zip(found, hashes, strict=True)):
            if block_id is None:
                block_id = next(fresh)
                self._cache(block_id, digest, parent, self._tokens_of(i, token_ids))
                self.host.fetch(digest, block_id)
            taken.append(block_id)
            parent = digest
        return taken

    def store(self, block_ids: Sequence[int], parent: bytes, hashes: Sequence[bytes], token_ids: Sequence[int]) -> None:
        """Make full blocks findable. A prefix that is cached elsewhere already stays there; ours remains private."""
        if not self.enable_prefix_caching:
            return
        fresh: list[bytes] = []
        first_parent = parent
        for i, (block_id, digest) in enumerate(zip(block_ids, hashes, strict=True)):
            block = self._blocks[block_id]
            assert block.refs > 0, f"block {block_id} is stored but nobody holds it"
            new = digest not in self._cached and block.hash is None
            if new:
                self._cache(block_id, digest, parent, self._tokens_of(i, token_ids))
            if new and (self.host is None or digest not in self.host):
                fresh.append(digest)
            else:
                self._emit_stored(first_parent, fresh)
                first_parent, fresh = digest, []
            parent = digest
        self._emit_stored(first_parent, fresh)

    def clear_cache(self) -> None:
        """Forget every cached prefix, in both places; blocks that sequences hold stay theirs."""
        for block_id in self._cached.values():
            self._blank(block_id)
        self._cached.clear()
        if self.host is not None:
            self.host.clear()
        self._events.append(KVEvent(kind="cleared"))

    def take_events(self) -> list[KVEvent]:
        events, self._events = self._events, []
        return events

    def cached_hashes(self) -> list[bytes]:
        """Every prefix block that can be found now; with the events that follow, what a late listener needs."""
        kept = self.host.hashes() if self.host is not None else []
        return list(dict.fromkeys([*self._cached, *kept]))

    def check_integrity(self, holders: Sequence[Sequence[int]]) -> None:
        """Recount everything against `holders` (the block lists of all live sequences); AssertionError if it is off."""
        counts = [0] * self.num_blocks
        for block_ids in holders:
            for block_id in block_ids:
                counts[block_id] += 1
        free = self._walk()
        for block_id, block in enumerate(self._blocks):
            assert block.refs == counts[block_id], f"block {block_id}: refs {block.refs}, held by {counts[block_id]}"
            assert (block.refs == 0) == (block_id in free), f"block {block_id}: refs {block.refs}, wrong list"
            if block.hash is not None:
                assert self._cached.get(block.hash) == block_id, f"block {block_id} has a hash that leads elsewhere"
                assert len(block.token_ids) == self.block_size, f"block {block_id} is cached but not full"
        cached = [self._blocks[block_id].hash is not None for block_id in free]
        assert cached == sorted(cached), "a blank block is behind a cached one"
        assert len(free) == self.num_free, f"{len(free)} blocks in the free list, {self.num_free} counted"
        assert sum(b.hash is not None for b in self._blocks) == len(self._cached), (
            "a cached hash leads to a blank block"
        )
        if self.host is not None:
            self.host.check_integrity(self.block_size)

    # ---------------------------------------------------------------- the linked list

    def _walk(self) -> dict[int, None]:
        """The free list from its head."""
        seen: dict[int, None] = {}
        block_id = self._next[self.num_blocks]
        while block_id != self.num_blocks:
            assert block_id not in seen, "the free list has a cycle"
            seen[block_id] = None
            block_id = self._next[block_id]
        return seen

    def _unlink(self, block_id: int) -> None:
        before, after = self._prev[block_id], self._next[block_id]
        self._next[before], self._prev[after] = after, before
        self.num_free -= 1

    def _link(self, block_id: int, before: int) -> None:
        """Into the list, right behind `before`: the sentinel makes it the head, the last block makes it the tail."""
        after = self._next[before]
        self._next[before] = self._prev[after] = block_id
        self._prev[block_id], self._next[block_id] = before, after
        self.num_free += 1

    def _evict(self, block_id: int) -> None:
        """Blank a block that is about to be written to; what is cached in it goes to the host store, or is lost."""
        block = self._blocks[block_id]
        if block.hash is None:
            return
        lost: bytes | None = block.hash
        del self._cached[block.hash]
        if self.host is not None:
            lost = self.host.keep(block_id, block.hash, block.parent, block.token_ids)
        self._blank(block_id)
        if lost is not None and lost not in self._cached:
            self._events.append(KVEvent(kind="removed", hashes=(lost,)))

    def _cache(self, block_id: int, digest: bytes, parent: bytes, token_ids: tuple[int, ...]) -> None:
        block = self._blocks[block_id]
        block.hash, block.parent, block.token_ids = digest, parent, token_ids
        self._cached[digest] = block_id

    def _tokens_of(self, i: int, token_ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(token_ids[i * self.block_size : (i + 1) * self.block_size])

    def _blank(self, block_id: int) -> None:
        block = self._blocks[block_id]
        block.hash, block.parent, block.token_ids = None, b"", ()

    def _emit_stored(self, parent: bytes, hashes: list[bytes]) -> None:
        if hashes:
            self._events.append(KVEvent(kind="stored", hashes=tuple(hashes), parent=parent))
