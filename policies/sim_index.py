"""The prefix index of simulated gateways: the answers of `policies.prefix_index`, at the cost of simulating thousands.

One dictionary from a block's hash to who holds it: most often one replica, told by its number, else the set of them as
the bits of a whole number of any length, inverted so that it is negative. `PrefixIndex` holds millions of blocks in
little memory and asks one table per 64 replicas; here following a chain costs an `and` a block, for a thousand of them.
Events never get lost here, so there are no snapshots. tests/policies/test_sim_index.py holds it to PrefixIndex.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.prefix_index import Counts
from replicas.protocol import KVEvent

_FEW = 4  # replicas whose bits are found faster one by one than by numpy


def _set(holders: int) -> int:
    """As bits, whichever way it is written."""
    return ~holders if holders < 0 else 1 << holders


class HolderIndex:
    """A `PrefixSource`. A replica that comes back has another bit; the old one answers for nobody."""

    def __init__(self) -> None:
        self._holders: dict[bytes, int] = {}
        self._number: dict[str, int] = {}
        self._bits = 0
        self._live = 0
        self._slots: tuple[tuple[str, ...], np.ndarray[tuple[int], np.dtype[np.int64]]] | None = None

    def join(self, replica_id: str) -> None:
        """It is there, and holds nothing."""
        self.drop(replica_id)
        self._number[replica_id] = self._bits
        self._live |= 1 << self._bits
        self._bits += 1
        self._slots = None

    def drop(self, replica_id: str) -> None:
        """It is gone; unknown names are no error."""
        number = self._number.pop(replica_id, None)
        if number is not None:
            self._live &= ~(1 << number)
            self._slots = None

    def apply(self, replica_id: str, events: Sequence[KVEvent]) -> None:
        """What the replica stored and removed, in its order."""
        holders, number = self._holders, self._number[replica_id]
        for event in events:
            if event.kind == "stored":
                for digest in event.hashes:
                    held = holders.setdefault(digest, number)
                    if held != number:
                        holders[digest] = ~(_set(held) | 1 << number)
            else:
                assert event.kind == "removed", f"a simulated cache sends no {event.kind!r}"
                for digest in event.hashes:
                    held = holders[digest]
                    if held == number:
                        del holders[digest]
                    else:
                        rest = _set(held) & ~(1 << number)
                        holders[digest] = ~rest if rest & (rest - 1) else rest.bit_length() - 1

    def leading(self, hashes: Sequence[bytes], replica_ids: tuple[str, ...]) -> Counts:
        """Leading blocks that each replica holds; int64[len(replica_ids)]."""
        counts = np.zeros(self._bits + 1, np.int64)
        held, holders = self._live, self._holders
        length = 0
        for digest in hashes:
            found = holders.get(digest)
            still = 0 if found is None else _set(found) & held
            if still != held:
                if length:
                    self._end(counts, held & ~still, length)
                held = still
                if not held:
                    break
            length += 1
        self._end(counts, held, length)
        return counts[self._slots_of(replica_ids)]

    def _end(self, counts: Counts, replicas: int, length: int) -> None:
        """The chains of these replicas, the bits of a set, are so long."""
        if replicas.bit_count() <= _FEW:
            while replicas:
                lowest = replicas & -replicas
                counts[lowest.bit_length() - 1] = length
                replicas ^= lowest
            return
        octets = np.frombuffer(replicas.to_bytes(self._bits // 8 + 1, "little"), np.uint8)
        counts[np.flatnonzero(np.unpackbits(octets, bitorder="little"))] = length

    def _slots_of(self, replica_ids: tuple[str, ...]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Where each replica's count stands; of a name that is not known, the zero at the end."""
        if self._slots is None or self._slots[0] is not replica_ids:
            if self._slots is not None and self._slots[0] == replica_ids:
                return self._slots[1]  # another gateway's equal tuple
            numbers = [self._number.get(name, self._bits) for name in replica_ids]
            self._slots = (replica_ids, np.array(numbers, np.int64))
        return self._slots[1]
