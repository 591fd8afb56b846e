"""Prefix blocks that lost their place on the device and are kept in host memory: which lies where, and when it pays to
fetch them back. Knows no tensors.

A block of host memory (a *slot*) is either free or keeps one prefix block under its hash. A kept block stays when it is
fetched, so that its next eviction costs no copy; it goes when its slot is needed and no other was unused for longer.
What a schedule decides is only noted here, and carried out before its step computes anything:

    offloads  (device block, slot)    first, all of them: nothing has been written over these blocks yet
    fetches   (slot, device block)    then; their slots are pinned until they are handed out, so that no offload of
                                      the same step can be written over what is to be fetched
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

_MEMORY = 0.9  # weight of what was known before, per copy


class FetchRule:
    """Fetch what is there sooner that way than computed again:

        overhead_s + blocks * block_bytes / copy_rate < tokens / prefill_rate

    block_bytes: of one block's keys and values. overhead_s: of a copy, however small. copy_rate: bytes/s, either way.
    prefill_rate: prompt tokens/s that the engine computes. A rate of 0 is not known yet, and then nothing pays.
    """

    def __init__(self, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.overhead_s = 0.0
        self.prefill_rate = 0.0
        self._bytes = self._seconds = 0.0

    @property
    def copy_rate(self) -> float:
        return self._bytes / self._seconds if self._seconds else 0.0

    def pays(self, blocks: int, tokens: int) -> bool:
        """Whether to copy `blocks` rather than compute the `tokens` that they spare."""
        if not (self.copy_rate and self.prefill_rate):
            return False
        return self.overhead_s + blocks * self.block_bytes / self.copy_rate < tokens / self.prefill_rate

    def calibrate(self, one_s: float, blocks: int, blocks_s: float) -> None:
        """Copying one block took one_s and copying `blocks` at once took blocks_s, at the least."""
        each = max(blocks_s - one_s, 0.0) / (blocks - 1) if blocks > 1 else 0.0
        self.overhead_s = max(one_s - each, 0.0) if each else 0.0
        self._bytes = self._seconds = 0.0
        self.record(blocks, blocks_s)

    def record(self, blocks: int, seconds: float) -> None:
        """A copy of `blocks` at once took `seconds`."""
        self._bytes = self._bytes * _MEMORY + blocks * self.block_bytes
        self._seconds = self._seconds * _MEMORY + max(seconds - self.overhead_s, seconds / 2)


@dataclass(slots=True)
class _Kept:
    """A prefix block. parent and token_ids say what it holds, as in the pool."""

    slot: int
    parent: bytes
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class HostStore:
    """num_slots blocks of host memory. offloaded, fetched: blocks copied so far, each way."""

    num_slots: int
    rule: FetchRule
    offloaded: int = 0
    fetched: int = 0
    _kept: OrderedDict[bytes, _Kept] = field(default_factory=OrderedDict)  # least recently used first
    _free: list[int] = field(init=False)
    _pinned: set[bytes] = field(default_factory=set)
    _offloads: list[tuple[int, int]] = field(default_factory=list)
    _fetches: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.num_slots > 0, f"a host store of {self.num_slots} slots"
        self._free = list(range(self.num_slots - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._kept

    def hashes(self) -> list[bytes]:
        return list(self._kept)

    def holds(self, digest: bytes, parent: bytes, token_ids: Sequence[int]) -> bool:
        """The stored tokens are compared: a hash collision is a miss."""
        kept = self._kept.get(digest)
        return kept is not None and kept.parent == parent and kept.token_ids == token_ids

    def keep(self, block_id: int, digest: bytes, parent: bytes, token_ids: tuple[int, ...]) -> bytes | None:
        """Keep what is about to be lost from device block `block_id`; the hash that is not kept any more for it.

        That is `digest` itself where every slot is pinned.
        """
        if digest in self._kept:  # it came from here, or was computed again beside it
            self._kept.move_to_end(digest)
            return None
        lost = None
        if not self._free:
            lost = next((old for old in self._kept if old not in self._pinned), None)
            if lost is None:
                return digest
            self._free.append(self._kept.pop(lost).slot)
        slot = self._free.pop()
        self._kept[digest] = _Kept(slot, parent, token_ids)
        self._offloads.append((block_id, slot))
        self.offloaded += 1
        return lost

    def pin(self, digests: Sequence[bytes]) -> None:
        """They are going to be fetched in the order of their chain: until then none of them loses its slot."""
        for digest in reversed(digests):  # the near end of a prefix stays longer than its far end
            self._kept.move_to_end(digest)
        self._pinned.update(digests)

    def fetch(self, digest: bytes, block_id: int) -> None:
        """Have a pinned block copied to device block `block_id`."""
        assert digest in self._pinned, "a block is fetched that may lose its slot before"
        self._fetches.append((self._kept[digest].slot, block_id))
        self.fetched += 1

    def take_transfers(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(offloads, fetches) to carry out now, in this order; see the module's text."""
        offloads, fetches = self._offloads, self._fetches
        self._offloads, self._fetches = [], []
        self._pinned.clear()
        return offloads, fetches

    def clear(self) -> None:
        self._free += [kept.slot for kept in self._kept.values()]
        self._kept.clear()
        self.take_transfers()

    def check_integrity(self, block_size: int) -> None:
        """Between steps: every slot is in one place, and nothing is left to copy. AssertionError if it is off."""
        assert not [*self._offloads, *self._fetches, *self._pinned], "copies were decided on and never made"
        slots = sorted([*self._free, *(kept.slot for kept in self._kept.values())])
        assert slots == list(range(self.num_slots)), "a slot of the host store is lost or used twice"
        for kept in self._kept.values():
            assert len(kept.token_ids) == block_size, f"slot {kept.slot} keeps a block that is not full"
