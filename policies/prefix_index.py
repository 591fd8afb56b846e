"""Which replica holds which prefix block: exact from KV events, approximate from our own history. No I/O, no clock.

    index = PrefixIndex()
    index.apply("replica-1", incarnation, first, events)     # True: events were lost, ask for a snapshot
    index.leading(hashes, ("replica-1", "replica-2"))        # leading blocks of a prompt that each one holds

One entry is a block's 8-byte fingerprint and a 64-bit set of replicas, whatever the number of replicas that hold the
block. Entries live in chunks of 256 rows; a row is one cache line of fingerprints and one of sets:

    prints  | fp fp fp fp fp fp fp fp |            8 slots, an empty one has fp 0
    sets    | set set set set set set set set |
    chunk   256 rows; a fingerprint may be in either of two rows of its chunk (two-choice hashing)
    top g bits of the fingerprint ─► directory[2^g] ─► chunk

When both rows are full the chunk is split in two by the next bit (extendible hashing: Fagin et al., ACM TODS 1979).
Rows do not depend on that bit, so a split is two masked copies and no rehash: no update ever waits for the whole table,
and a removal leaves no tombstone. A look-up reads two rows, always: a prompt's whole chain is answered by a few
vectorised operations and its cost does not depend on which blocks are where. Every block of the chain is looked up, so
the answer is right even where a replica evicted the middle of a prefix before its end.

A wrong "held" needs an absent block whose fingerprint equals a stored one's: n / 2^64 for n entries, 3.5e-13 at 64 x
100,000. It costs a worse choice of replica, never a wrong answer: engines compare tokens.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from replicas.protocol import KVEvent

Counts = npt.NDArray[np.int64]
_U64 = npt.NDArray[np.uint64]

GROUP = 64  # replicas that share a table: the bits of a set
_SLOTS = 8
_ROWS = 256
_CHUNK_SLOTS = _ROWS * _SLOTS
_CHOICES = np.array([[32], [40]], np.uint64)  # where the fingerprint says its two rows
_LAST_ROW = np.uint64(_ROWS - 1)
_ONE = np.uint64(1)
_MASK = (1 << 64) - 1
_MAX_DEPTH = 20
_SWEPT_PER_UPDATE = 4  # chunks cleaned of departed replicas by every update
_FEW = 16  # blocks up to which a chain is followed one by one, at about a microsecond each
_MAX_BACKLOG = 4096  # events kept while a snapshot is on its way


class PrefixSource(Protocol):
    """Where a policy learns what is cached."""

    def leading(self, hashes: Sequence[bytes], replica_ids: tuple[str, ...]) -> Counts:
        """For each replica the number of blocks it holds of the chain's unbroken beginning; int64[len(replica_ids)]."""
        ...


class _Table:
    """Fingerprint -> set of up to 64 replicas. `max_chunks` bounds it: what no longer fits is counted in `dropped`."""

    def __init__(self, max_chunks: int, odd: int) -> None:
        # Reserved as a whole but committed by the operating system page by page, as chunks are first used.
        self._max_chunks = max_chunks
        size = max_chunks * _CHUNK_SLOTS
        raw = _blank(2 * size + _SLOTS)
        skip = (-raw.ctypes.data % 64) // 8  # rows begin on a cache line
        self._prints: _U64 = raw[skip : skip + size].reshape(-1, _SLOTS)
        self._sets: _U64 = raw[skip + size : skip + 2 * size].reshape(-1, _SLOTS)
        # The same memory, four times faster than numpy for one word.
        self._print, self._set = raw[skip : skip + size].data, raw[skip + size : skip + 2 * size].data
        self._odd = odd
        self._global_depth = 1
        self._keep(np.zeros(2, np.int64))
        self._depths = [0]
        self._retired = 0
        self._sweep_next = 0
        self.live = 0
        self.entries = 0
        self.dropped = 0

    def _keep(self, directory: npt.NDArray[np.int64]) -> None:
        self._directory, self._chunks = directory, directory.data

    @property
    def memory_bytes(self) -> int:
        return len(self._depths) * (_CHUNK_SLOTS * 16 + 8) + self._directory.nbytes

    # ---------------------------------------------------------------- look-up

    def fingerprint(self, digest: bytes) -> int:
        return (int.from_bytes(digest[:8], "little") * self._odd & _MASK) or 1

    def fingerprints(self, hashes: Sequence[bytes]) -> _U64:
        words = np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), -1)[:, 0]
        mixed: _U64 = np.maximum(words * np.uint64(self._odd), _ONE)
        return mixed

    def leading(self, hashes: Sequence[bytes]) -> Counts:
        """int64[64]: leading blocks held by the replica of each bit."""
        if len(hashes) <= _FEW or not self._holder(hashes[0]) & self.live:
            return np.array(self.leading_one_by_one(hashes), np.int64)
        holders = self._holders(self.fingerprints(hashes)) & np.uint64(self.live)
        held = np.bitwise_and.accumulate(holders)
        # The accumulated set only shrinks: a few distinct sets, each with the length at which it ends, stand for all.
        last = np.empty(len(held), np.bool_)
        np.not_equal(held[1:], held[:-1], out=last[:-1])
        last[-1] = True
        ends = np.flatnonzero(last)
        bits = np.unpackbits(held.take(ends).view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
        lengths = ends.astype(np.float32)
        lengths[1:] -= lengths[:-1].copy()
        lengths[0] += 1
        counts: Counts = (lengths @ bits.astype(np.float32)).astype(np.int64)  # exact below 2^24 blocks
        return counts

    def leading_one_by_one(self, hashes: Sequence[bytes]) -> list[int]:
        """The same, block by block until nobody holds the next: for short chains, and those that nobody holds."""
        counts = [0] * GROUP
        held = self.live
        for length, digest in enumerate(hashes):
            if not held:
                return counts
            still = held & self._holder(digest)
            if still != held:
                _end(counts, held & ~still, length)
            held = still
        _end(counts, held, len(hashes))
        return counts

    def _holder(self, digest: bytes) -> int:
        """The replicas that hold one block, departed ones among them."""
        # `fingerprint` and `_places` once more: calling them would take half the time of this.
        print_ = (int.from_bytes(digest[:8], "little") * self._odd & _MASK) or 1
        base = self._chunks[print_ >> (64 - self._global_depth)] * _CHUNK_SLOTS
        place = base + (print_ >> 32 & 255) * _SLOTS
        row = self._print[place : place + _SLOTS].tolist()
        if print_ not in row:
            place = base + (print_ >> 40 & 255) * _SLOTS
            row = self._print[place : place + _SLOTS].tolist()
            if print_ not in row:
                return 0
        return self._set[place + row.index(print_)]

    def _holders(self, prints: _U64) -> _U64:
        base = self._directory.take(prints >> np.uint64(64 - self._global_depth)) * _ROWS
        rows = (base + ((prints >> _CHOICES) & _LAST_ROW).view(np.int64)).reshape(-1)
        # Both rows of all blocks at once: every vector operation costs about as much as looking up twenty blocks.
        hit = np.flatnonzero(self._prints.take(rows, axis=0).reshape(2, -1, _SLOTS) == prints[:, None])
        where = hit >> 3
        found = np.zeros(len(prints), np.uint64)
        found[where % len(prints)] = self._sets.reshape(-1).take(rows.take(where) * _SLOTS + (hit & 7))
        return found

    # ---------------------------------------------------------------- change

    def add(self, print_: int, bit: int) -> None:
        while True:
            first, second = self._places(print_)
            row1, row2 = self._print[first : first + 8].tolist(), self._print[second : second + 8].tolist()
            if print_ in row1:
                self._set[first + row1.index(print_)] |= bit
                return
            if print_ in row2:
                self._set[second + row2.index(print_)] |= bit
                return
            empty1, empty2 = row1.count(0), row2.count(0)
            if empty1 or empty2:
                slot = first + row1.index(0) if empty1 >= empty2 else second + row2.index(0)
                self._print[slot], self._set[slot] = print_, bit
                self.entries += 1
                return
            if not self._split(print_):
                self.dropped += 1
                return

    def remove(self, print_: int, bit: int) -> None:
        """A block that is not there is no error: it may have been dropped, or stored before events were lost."""
        for place in self._places(print_):
            row = self._print[place : place + 8].tolist()
            if print_ in row:
                slot = place + row.index(print_)
                rest = self._set[slot] & ~bit
                self._set[slot] = rest
                if not rest:
                    self._print[slot] = 0
                    self.entries -= 1
                return

    def _places(self, print_: int) -> tuple[int, int]:
        base = self._chunks[print_ >> (64 - self._global_depth)] * _CHUNK_SLOTS
        return base + (print_ >> 32 & 255) * _SLOTS, base + (print_ >> 40 & 255) * _SLOTS

    def _split(self, print_: int) -> bool:
        old, new = self._chunks[print_ >> (64 - self._global_depth)], len(self._depths)
        depth = self._depths[old]
        if new == self._max_chunks or depth == _MAX_DEPTH:
            return False
        if depth == self._global_depth:
            self._keep(np.repeat(self._directory, 2))
            self._global_depth += 1
        kept, moved = slice(old * _ROWS, (old + 1) * _ROWS), slice(new * _ROWS, (new + 1) * _ROWS)
        moves = self._prints[kept] >> np.uint64(63 - depth) & np.uint64(1) == 1
        for words in (self._prints, self._sets):
            words[moved][moves] = words[kept][moves]
            words[kept][moves] = 0
        self._depths[old] = depth + 1
        self._depths.append(depth + 1)
        width = 1 << (self._global_depth - depth - 1)
        begin = (print_ >> (64 - depth) << 1 | 1) * width
        self._directory[begin : begin + width] = new
        return True

    # ---------------------------------------------------------------- replicas come and go

    def join(self) -> int:
        """A bit that no entry carries; the caller checked `has_room`."""
        if not self._free_bits():
            self._sweep(len(self._depths))
        free = self._free_bits()
        bit = free & -free
        self.live |= bit
        return bit

    def has_room(self) -> bool:
        return self.live != _MASK

    def leave(self, bit: int) -> None:
        """Stop answering for the bit at once; its entries go a few chunks at a time."""
        self.live &= ~bit
        self._retired |= bit
        self._sweep_next = 0

    def tidy(self) -> None:
        if self._retired:
            self._sweep(_SWEPT_PER_UPDATE)

    def _free_bits(self) -> int:
        return _MASK & ~self.live & ~self._retired

    def _sweep(self, chunks: int) -> None:
        for _ in range(chunks):
            # A chunk that is split meanwhile moves entries to the end, where the sweep still has to come.
            if self._sweep_next >= len(self._depths):
                self._retired = 0
                return
            rows = slice(self._sweep_next * _ROWS, (self._sweep_next + 1) * _ROWS)
            prints, sets = self._prints[rows], self._sets[rows]
            sets &= np.uint64(_MASK & ~self._retired)
            gone = (sets == 0) & (prints != 0)
            self.entries -= int(np.count_nonzero(gone))
            prints[gone] = 0
            self._sweep_next += 1
        if self._sweep_next >= len(self._depths):
            self._retired = 0


def _blank(words: int) -> _U64:
    """Zeros that the operating system commits when they are first written, in large pages where it has them.

    A look-up reads hundreds of rows at random; with pages of 4 KiB nearly each of them would miss the TLB too.
    """
    memory = mmap.mmap(-1, 8 * words)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint64)


def _end(counts: list[int], replicas: int, length: int) -> None:
    """The chains of these replicas, the bits of a set, are so long."""
    while replicas:
        lowest = replicas & -replicas
        counts[lowest.bit_length() - 1] = length
        replicas ^= lowest


@dataclass(slots=True)
class _Member:
    """One incarnation. `expected` is the number of its next event; None before the first."""

    incarnation: str
    table: _Table
    number: int
    bit: int
    expected: int | None = None
    wanting: bool = False
    backlog: deque[tuple[int, KVEvent]] = field(default_factory=deque)


class PrefixIndex:
    """Exact, as long as every event came; after a loss it claims only what it was told since, until a snapshot comes.

    max_entries bounds the memory of every 64 replicas: 16 bytes a slot, all of them together. `odd` mixes fingerprints:
    give a random odd number where prompts come from strangers, who could otherwise aim many blocks at one row.
    """

    def __init__(self, *, max_entries: int = 1 << 24, odd: int = 0x9E3779B97F4A7C15) -> None:
        assert odd & 1, "only an odd factor keeps different fingerprints different"
        self._max_chunks = max(1, max_entries // (_ROWS * _SLOTS))
        self._odd = odd & _MASK
        self._tables: list[_Table] = []
        self._members: dict[str, _Member] = {}
        self._slots_of: tuple[tuple[str, ...], npt.NDArray[np.int64], bool] | None = None

    # ---------------------------------------------------------------- what it answers

    def leading(self, hashes: Sequence[bytes], replica_ids: tuple[str, ...]) -> Counts:
        if not hashes or not self._tables:
            return np.zeros(len(replica_ids), np.int64)
        counts = [table.leading(hashes) for table in self._tables]
        slots, all_known = self._slots(replica_ids)
        if all_known and len(counts) == 1:
            return counts[0].take(slots)
        # What the index has never heard of gets the zero at the end.
        return np.concatenate((*counts, [0])).take(slots)

    def leading_few(self, hashes: Sequence[bytes], replica_ids: tuple[str, ...]) -> list[int]:
        """The same as a list, for a few replicas."""
        if len(hashes) > _FEW:
            return [int(count) for count in self.leading(hashes, replica_ids)]
        counts = [table.leading_one_by_one(hashes) for table in self._tables]
        members = [self._members.get(replica_id) for replica_id in replica_ids]
        return [0 if m is None else counts[m.number][m.bit.bit_length() - 1] for m in members]

    @property
    def entries(self) -> int:
        """Distinct blocks held, those of departed replicas included until they are swept."""
        return sum(table.entries for table in self._tables)

    @property
    def dropped(self) -> int:
        """Blocks that did not fit into max_entries; the index then knows less than is true, never more."""
        return sum(table.dropped for table in self._tables)

    @property
    def memory_bytes(self) -> int:
        return sum(table.memory_bytes for table in self._tables)

    @property
    def wanting(self) -> list[str]:
        """Replicas whose events were lost and whose snapshot has not come."""
        return [replica_id for replica_id, member in self._members.items() if member.wanting]

    # ---------------------------------------------------------------- what it is told

    def apply(self, replica_id: str, incarnation: str, first: int, events: Sequence[KVEvent]) -> bool:
        """Events numbered first, first + 1, … of one incarnation; True while its snapshot is wanted.

        Another incarnation replaces the one before. An event that was seen already is skipped.
        """
        member = self._member(replica_id, incarnation)
        if member.expected is None:
            member.wanting = first > 1  # an incarnation's events count from 1: the earlier ones were not for us
        elif first > member.expected:
            self._lost(member)
        seen = 0 if member.expected is None else max(0, member.expected - first)
        for number, event in enumerate(events[seen:], first + seen):
            self._take(member, event)
            if member.wanting:
                self._remember(member, number, event)
        member.expected = max(first + len(events), member.expected or 0)
        member.table.tidy()
        return member.wanting

    def expect_snapshot(self, replica_id: str, incarnation: str) -> None:
        """A replica that may have cached something before we listened. Its event 1, should it come, makes that moot."""
        self._member(replica_id, incarnation).wanting = True

    def snapshot(self, replica_id: str, incarnation: str, next_event: int, hashes: Sequence[bytes]) -> bool:
        """Everything that was cached before event `next_event`; True if another snapshot is wanted all the same.

        What came since the loss and is not in the snapshot is applied again on top of it.
        """
        for _ in self.snapshot_slices(replica_id, incarnation, next_event, hashes):
            pass
        return self._member(replica_id, incarnation).wanting

    def snapshot_slices(
        self, replica_id: str, incarnation: str, next_event: int, hashes: Sequence[bytes], slice_blocks: int = 2048
    ) -> Iterator[None]:
        """`snapshot` with a pause after every slice, so that a large one need not keep anybody waiting.

        Events and decisions may come in between; a snapshot of a replica that is gone or new meanwhile ends there.
        """
        member = self._member(replica_id, incarnation)
        if not member.wanting:
            return
        self._forget_blocks(member)
        for start in range(0, len(hashes), slice_blocks):
            table = member.table
            for digest in hashes[start : start + slice_blocks]:
                table.add(table.fingerprint(digest), member.bit)
            yield
            if self._members.get(replica_id) is not member:
                return
        later = [(number, event) for number, event in member.backlog if number >= next_event]
        expected = member.expected or next_event
        for _, event in later:
            self._take(member, event)
        member.wanting = len(later) < expected - next_event
        member.backlog.clear()
        member.expected = max(expected, next_event)

    def drop(self, replica_id: str) -> None:
        """The replica is gone; unknown names are no error."""
        member = self._members.pop(replica_id, None)
        if member is not None:
            member.table.leave(member.bit)
            self._slots_of = None

    # ---------------------------------------------------------------- inside

    def _member(self, replica_id: str, incarnation: str) -> _Member:
        member = self._members.get(replica_id)
        if member is None or member.incarnation != incarnation:
            member = self._join(replica_id, incarnation)
        return member

    def _join(self, replica_id: str, incarnation: str) -> _Member:
        self.drop(replica_id)
        number = next((n for n, table in enumerate(self._tables) if table.has_room()), len(self._tables))
        if number == len(self._tables):
            self._tables.append(_Table(self._max_chunks, self._odd))
        table = self._tables[number]
        member = self._members[replica_id] = _Member(incarnation, table, number, table.join())
        self._slots_of = None
        return member

    def _take(self, member: _Member, event: KVEvent) -> None:
        table, bit = member.table, member.bit
        if event.kind == "stored":
            for digest in event.hashes:
                table.add(table.fingerprint(digest), bit)
        elif event.kind == "removed":
            for digest in event.hashes:
                table.remove(table.fingerprint(digest), bit)
        else:
            assert event.kind == "cleared", f"unknown kind of KV event: {event.kind!r}"
            self._forget_blocks(member)

    def _forget_blocks(self, member: _Member) -> None:
        # With the old bit still taken, the new one is free of old entries.
        table = member.table
        if table.has_room():
            fresh = table.join()
            table.leave(member.bit)
        else:
            table.leave(member.bit)
            fresh = table.join()
        member.bit = fresh
        self._slots_of = None

    def _lost(self, member: _Member) -> None:
        self._forget_blocks(member)
        member.wanting = True
        member.backlog.clear()

    def _remember(self, member: _Member, number: int, event: KVEvent) -> None:
        if len(member.backlog) == _MAX_BACKLOG:
            member.backlog.popleft()
        member.backlog.append((number, event))

    def _slots(self, replica_ids: tuple[str, ...]) -> tuple[npt.NDArray[np.int64], bool]:
        """Where each replica's count is among those of all tables, -1 if nowhere; and whether there is no such one."""
        if self._slots_of is None or self._slots_of[0] is not replica_ids:
            members = [self._members.get(replica_id) for replica_id in replica_ids]
            slots = [-1 if m is None else m.number * GROUP + m.bit.bit_length() - 1 for m in members]
            self._slots_of = (replica_ids, np.array(slots, np.int64), -1 not in slots)
        return self._slots_of[1:]
