"""The host store beside the pool: what is kept, what is lost, who is told; and when fetching pays."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replicas.engine.blocks import BlockPool
from replicas.engine.host_store import FetchRule, HostStore
from replicas.protocol import block_hash, prefix_root

ROOT = prefix_root("tenant", "revision")


def chain(tokens: list[int], root: bytes = ROOT) -> list[bytes]:
    hashes, parent = [], root
    for token in tokens:
        parent = block_hash(parent, [token])
        hashes.append(parent)
    return hashes


def make_pool(blocks: int, slots: int) -> tuple[BlockPool, HostStore]:
    host = HostStore(slots, FetchRule(100))
    return BlockPool(blocks, 1, host=host), host


def pass_through(pool: BlockPool, tokens: list[int], root: bytes = ROOT) -> None:
    """A sequence of these tokens comes and goes."""
    blocks = pool.allocate(len(tokens))
    pool.store(blocks, root, chain(tokens, root), tokens)
    pool.release(blocks)


def find(pool: BlockPool, tokens: list[int], root: bytes = ROOT) -> list[int | None]:
    return pool.match(root, chain(tokens, root), tokens)


def test_evicted_blocks_are_found_in_the_host_store_and_fetched_into_fresh_ones() -> None:
    pool, host = make_pool(4, 8)
    pass_through(pool, [1, 2, 3])
    pass_through(pool, [7, 8, 9])
    first = find(pool, [1, 2, 3])
    assert first[0] is not None
    assert first[1:] == [None, None], "the far end of the older prefix was evicted"
    offloads, _ = host.take_transfers()
    assert len(offloads) == 2
    blocks = pool.take(first, ROOT, chain([1, 2, 3]), [1, 2, 3])
    assert blocks[0] == first[0]
    assert find(pool, [1, 2, 3]) == blocks, "fetched blocks are cached on the device at once"
    more, fetches = host.take_transfers()
    slot_of = dict(offloads)
    assert [block for _, block in fetches] == blocks[1:]
    assert sorted(slot for slot, _ in fetches) == sorted(slot_of.values())
    assert len(more) == 2, "the other prefix made room for them"
    pool.check_integrity([blocks])


def test_a_fetched_block_stays_kept_and_its_next_eviction_costs_no_copy() -> None:
    pool, host = make_pool(2, 4)
    pass_through(pool, [1])
    pass_through(pool, [2, 3])
    blocks = pool.take(find(pool, [1]), ROOT, chain([1]), [1])
    pool.release(blocks)
    host.take_transfers()
    copied = host.offloaded
    pass_through(pool, [2, 3])
    assert find(pool, [1]) == [None]
    assert all(block not in blocks for block, _ in host.take_transfers()[0])
    assert host.offloaded == copied + 1, "2 was new to it, 1 was there already"


def test_blocks_to_be_fetched_are_not_pushed_out_by_what_makes_room_for_them() -> None:
    """Without pins, the eviction that gives block 1 its place would have been copied over block 1's slot."""
    pool, host = make_pool(2, 2)
    pass_through(pool, [1, 2])
    pass_through(pool, [3, 4])
    host.take_transfers()
    blocks = pool.take(find(pool, [1, 2]), ROOT, chain([1, 2]), [1, 2])
    offloads, fetches = host.take_transfers()
    assert offloads == []
    assert len(fetches) == 2
    assert find(pool, [3, 4]) == [], "there was no room for them anywhere"
    pool.release(blocks)
    pool.check_integrity([])


def test_the_least_recently_used_slot_goes_first_and_the_size_is_kept() -> None:
    pool, host = make_pool(1, 2)
    for token in (1, 2, 3, 4):
        pass_through(pool, [token])
    assert len(host) == 2
    assert [find(pool, [token]) for token in (1, 2, 3)] == [[], [None], [None]]
    pool.release(pool.take(find(pool, [2]), ROOT, chain([2]), [2]))
    host.take_transfers()
    pass_through(pool, [5])
    assert find(pool, [3]) == []
    assert find(pool, [2]) == [None], "it was used after 3"


def test_the_far_end_of_a_prefix_is_lost_before_its_near_end() -> None:
    pool, host = make_pool(3, 3)
    pass_through(pool, [1, 2, 3])
    pass_through(pool, [4, 5, 6])
    pool.release(pool.take(find(pool, [1, 2, 3]), ROOT, chain([1, 2, 3]), [1, 2, 3]))
    host.take_transfers()
    pass_through(pool, [7])
    assert find(pool, [1, 2, 3])[:2] != []
    pass_through(pool, [8, 9, 10])
    assert len(find(pool, [1, 2, 3])) in (1, 2), "what is left is a beginning"


def test_a_block_on_the_device_behind_one_in_the_host_store_is_used_where_it_is() -> None:
    pool, host = make_pool(4, 4)
    pass_through(pool, [1])
    longer = pool.allocate(2)
    pool.store(longer, ROOT, chain([1, 2]), [1, 2])  # 1 is cached elsewhere: this copy of it stays private
    pool.release(pool.allocate(2))  # the last blank one, and the one that 1 is cached in
    found = find(pool, [1, 2])
    assert found == [None, longer[1]]
    pool.release(longer[:1])
    blocks = pool.take(found, ROOT, chain([1, 2]), [1, 2])
    assert blocks[1] == longer[1]
    assert len(host.take_transfers()[1]) == 1
    pool.check_integrity([blocks, longer[1:]])


def test_other_tenants_and_collisions_find_nothing_in_the_host_store() -> None:
    pool, host = make_pool(2, 4)
    pass_through(pool, [1, 2])
    pass_through(pool, [3, 4])
    other = prefix_root("other tenant", "revision")
    assert find(pool, [1, 2], other) == []
    assert pool.match(ROOT, chain([1, 2]), [1, 9]) == [None]
    assert pool.match(b"another parent..", chain([1, 2]), [1, 2]) == []
    assert not host.holds(chain([1, 2])[0], ROOT, (9,))


def test_listeners_are_told_that_a_block_is_gone_when_neither_place_has_it() -> None:
    pool, _ = make_pool(1, 2)
    told = []
    for token in (1, 2, 3, 4, 3):  # the second 3 is computed again: to listeners it was there all the time
        pass_through(pool, [token])
        told.append([(event.kind, event.hashes) for event in pool.take_events()])
    one, two, three, four = (chain([token])[0] for token in (1, 2, 3, 4))
    assert told == [
        [("stored", (one,))],
        [("stored", (two,))],
        [("stored", (three,))],
        [("removed", (one,)), ("stored", (four,))],
        [("removed", (two,))],
    ]
    assert sorted(pool.cached_hashes()) == sorted([three, four])
    pool.clear_cache()
    assert pool.cached_hashes() == []
    assert [event.kind for event in pool.take_events()] == ["cleared"]


def test_a_fetch_of_what_is_not_pinned_is_our_bug() -> None:
    _, host = make_pool(1, 1)
    host.keep(0, b"digest", b"", (1,))
    with pytest.raises(AssertionError, match="may lose its slot"):
        host.fetch(b"digest", 0)


def test_a_decided_copy_that_nobody_makes_is_seen_by_the_recount() -> None:
    pool, _ = make_pool(1, 1)
    pass_through(pool, [1])
    pass_through(pool, [2])
    with pytest.raises(AssertionError, match="never made"):
        pool.check_integrity([])


# ---------------------------------------------------------------- when it pays


def rates(copy: float, prefill: float, overhead: float = 0.0, block_bytes: int = 1000) -> FetchRule:
    """Bytes/s, tokens/s and seconds."""
    made = FetchRule(block_bytes)
    made.overhead_s, made.prefill_rate = overhead, prefill
    if copy:
        made.overhead_s = 0.0
        made.record(1000, 1000 * block_bytes / copy)
        made.overhead_s = overhead
    return made


@pytest.mark.parametrize(
    ("rule", "blocks", "tokens", "pays"),
    [
        (rates(copy=1e6, prefill=1000), 1, 16, True),  # 1 ms against 16 ms
        (rates(copy=5e4, prefill=1000), 1, 16, False),  # 20 ms against 16 ms
        (rates(copy=5e4, prefill=1000), 100, 1600, False),  # a slow road is slow for all sizes
        (rates(copy=1e6, prefill=1000, overhead=0.02), 1, 16, False),  # 21 ms against 16: too small a run
        (rates(copy=1e6, prefill=1000, overhead=0.02), 2, 32, True),  # 22 ms against 32
        (rates(copy=5e4, prefill=1000), 1, 32, True),  # 20 ms spare two blocks: the second is on the device
        (rates(copy=0, prefill=1000), 1, 16, False),  # nothing is known of copies
        (rates(copy=1e6, prefill=0), 1, 16, False),  # or of computing
    ],
)
def test_what_is_there_sooner_by_copying_is_fetched(rule: FetchRule, blocks: int, tokens: int, pays: bool) -> None:
    assert rule.pays(blocks, tokens) is pays


def test_the_copy_rate_follows_the_copies_and_leaves_out_what_each_costs_anyway() -> None:
    made = FetchRule(1000)
    made.calibrate(one_s=0.003, blocks=11, blocks_s=0.013)
    assert made.overhead_s == pytest.approx(0.002)
    assert made.copy_rate == pytest.approx(1e6)
    for _ in range(60):
        made.record(10, 0.002 + 10 * 1000 / 2e5)
    assert made.copy_rate == pytest.approx(2e5, rel=0.02)


def test_a_calibration_that_was_disturbed_still_gives_rates_to_work_with() -> None:
    made = FetchRule(1000)
    made.calibrate(one_s=0.013, blocks=11, blocks_s=0.011)  # the machine was busy during the small ones
    assert made.copy_rate == pytest.approx(1e6)
    assert made.overhead_s == 0
    made.calibrate(one_s=0.001, blocks=1, blocks_s=0.001)
    assert made.copy_rate == pytest.approx(1e6)


# ---------------------------------------------------------------- any history

TENANTS = (ROOT, prefix_root("other tenant", "revision"))


class TwoPlaces(RuleBasedStateMachine):
    """Sequences come, hit, fetch and go over a small pool and a small store. A model has the *contents* of both
    memories, which only the copies change that were decided on: whatever is found must hold what it is said to."""

    @initialize(blocks=st.integers(2, 6), slots=st.integers(1, 6))
    def begin(self, blocks: int, slots: int) -> None:
        self.pool, self.host = make_pool(blocks, slots)
        self.device: list[object] = [None] * blocks
        self.memory: list[object] = [None] * slots
        self.held: list[list[int]] = []
        self.mirror: set[bytes] = set()

    @rule(
        tenant=st.sampled_from(TENANTS), tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5), pays=st.booleans()
    )
    def come(self, tenant: bytes, tokens: list[int], pays: bool) -> None:
        hashes = chain(tokens, tenant)
        found = self.pool.match(tenant, hashes, tokens)
        if not pays and None in found:
            found = found[: found.index(None)]
        here = [block for block in found if block is not None]
        free = self.pool.num_free - sum(self.pool.refs(block) == 0 for block in here)
        if len(tokens) - len(here) > free:
            return
        blocks = self.pool.take(found, tenant, hashes[: len(found)], tokens)
        blocks += self.pool.allocate(len(tokens) - len(found))
        offloads, fetches = self.host.take_transfers()
        for block, slot in offloads:
            self.memory[slot] = self.device[block]
        for slot, block in fetches:
            self.device[block] = self.memory[slot]
        for block, digest in zip(blocks[: len(found)], hashes, strict=False):
            assert self.device[block] == digest, "a block does not hold what it is cached for"
        for block, digest in list(zip(blocks, hashes, strict=True))[len(found) :]:
            self.device[block] = digest
        self.pool.store(blocks, tenant, hashes, tokens)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def fail(self) -> None:
        self.pool.clear_cache()

    @invariant()
    def all_is_whole(self) -> None:
        self.pool.check_integrity(self.held)
        assert len(self.host) <= self.host.num_slots
        for event in self.pool.take_events():
            if event.kind == "stored":
                self.mirror |= set(event.hashes)
            elif event.kind == "removed":
                self.mirror -= set(event.hashes)
            else:
                self.mirror.clear()
        assert self.mirror == set(self.pool.cached_hashes())


TestTwoPlaces = TwoPlaces.TestCase
TestTwoPlaces.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
