"""The fake engine's book of KV blocks: who holds how many, and which prefixes are cached. Nothing is stored in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from replicas.protocol import KVEvent, block_hashes


class PrefixBlocks:
    """Who holds how many of `total` blocks; cached ones are known by hash, private ones only counted.

    total = private + len(refs) + never used; a cached block with no reference waits in `idle`, oldest first.
    """

    def __init__(self, total: int, block_size: int) -> None:
        self.total = total
        self.block_size = block_size
        self.private = 0
        self.refs: dict[bytes, int] = {}
        self.idle: OrderedDict[bytes, None] = OrderedDict()
        self.events: list[KVEvent] = []

    @property
    def num_free(self) -> int:
        return self.total - self.private - (len(self.refs) - len(self.idle))

    def chain(self, root: bytes, tokens: tuple[int, ...]) -> list[bytes]:
        return list(block_hashes(root, tokens, self.block_size))

    def num_cached(self, hashes: list[bytes]) -> int:
        """Leading blocks of the chain that are in the cache."""
        return next((i for i, known in enumerate(hashes) if known not in self.refs), len(hashes))

    def can_acquire(self, hashes: list[bytes], private: int) -> bool:
        held = sum(1 for known in hashes if self.refs.get(known, 0) > 0)
        return len(hashes) - held + private <= self.num_free

    def acquire(self, root: bytes, hashes: list[bytes], private: int) -> None:
        assert self.can_acquire(hashes, private), "blocks are acquired only when can_acquire said so"
        self._store(root, hashes)
        for known in hashes:
            self.refs[known] += 1
            self.idle.pop(known, None)
        self.private += private
        self._evict()

    def release(self, hashes: list[bytes]) -> None:
        # The tail goes first into the queue, so that it is evicted first: a chain is of no use without its head.
        for known in reversed(hashes):
            self.refs[known] -= 1
            if self.refs[known] == 0:
                self.idle[known] = None

    def release_private(self, count: int, parent: bytes, written: list[bytes]) -> None:
        """Give back `count` private blocks; those that hold the full blocks `written`, after `parent`, stay cached."""
        self.private -= count
        self._store(parent, written)

    def _store(self, parent: bytes, hashes: list[bytes]) -> None:
        cached = self.num_cached(hashes)
        fresh = hashes[cached:]
        if fresh:
            new = [known for known in reversed(fresh) if known not in self.refs]
            self.refs.update(dict.fromkeys(new, 0))
            self.idle.update(dict.fromkeys(new))
            self.events.append(
                KVEvent(kind="stored", hashes=tuple(fresh), parent=hashes[cached - 1] if cached else parent)
            )

    def _evict(self) -> None:
        excess = self.private + len(self.refs) - self.total
        if excess > 0:
            gone = tuple(self.idle.popitem(last=False)[0] for _ in range(excess))
            for known in gone:
                del self.refs[known]
            self.events.append(KVEvent(kind="removed", hashes=gone))

    def check_integrity(self, held: Mapping[bytes, int], private: int) -> None:
        assert self.private == private, f"{self.private} private blocks on the books, {private} held"
        assert {known: n for known, n in self.refs.items() if n} == held, "cached blocks' references are off"
        assert set(self.idle) == {known for known, n in self.refs.items() if not n}, "idle blocks are off"
        assert self.private + len(self.refs) <= self.total, "more blocks in use than there are"
