"""The block pool against a recount, and against a naive model of what should be cached."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.blocks import BlockPool
from replicas.protocol import block_hash, prefix_root

ROOT = prefix_root("tenant", "revision")


def chain(tokens: list[int], size: int, root: bytes = ROOT) -> list[bytes]:
    hashes = []
    parent = root
    for start in range(0, len(tokens) - size + 1, size):
        parent = block_hash(parent, tokens[start : start + size])
        hashes.append(parent)
    return hashes


def stored(pool: BlockPool, tokens: list[int], root: bytes = ROOT) -> list[int]:
    hashes = chain(tokens, pool.block_size, root)
    blocks = pool.allocate(len(hashes))
    pool.store(blocks, root, hashes, tokens)
    return blocks


def test_released_prefix_is_found_again_and_shared() -> None:
    pool = BlockPool(8, 2)
    blocks = stored(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert pool.num_free == 8
    hits = pool.match(ROOT, chain([1, 2, 3, 4, 5, 6], 2), [1, 2, 3, 4, 5, 6])
    assert hits == blocks
    pool.acquire(hits)
    assert pool.num_free == 6
    pool.acquire(hits)
    assert pool.is_shared(hits[0])
    pool.check_integrity([hits, hits])


def test_other_tenant_finds_nothing() -> None:
    pool = BlockPool(8, 2)
    stored(pool, [1, 2, 3, 4])
    other = prefix_root("other tenant", "revision")
    assert pool.match(other, chain([1, 2, 3, 4], 2, other), [1, 2, 3, 4]) == []


def test_hash_collision_is_a_miss_because_tokens_are_compared() -> None:
    pool = BlockPool(8, 2)
    stored(pool, [1, 2, 3, 4])
    assert pool.match(ROOT, chain([1, 2, 3, 4], 2), [1, 2, 9, 9]) == stored_first(pool)
    assert pool.match(b"another parent..", chain([1, 2, 3, 4], 2), [1, 2, 3, 4]) == []


def stored_first(pool: BlockPool) -> list[int]:
    return pool.match(ROOT, chain([1, 2], 2), [1, 2])


def test_eviction_takes_least_recently_released_and_tails_first() -> None:
    pool = BlockPool(4, 1)
    old, new = stored(pool, [1, 2]), stored(pool, [7, 8])
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]], "the tail of the older prefix goes first"
    assert pool.match(ROOT, chain([1, 2], 1), [1, 2]) == [old[0]]
    assert pool.allocate(1) == [old[0]]
    assert pool.match(ROOT, chain([7, 8], 1), [7, 8]) == new


def test_blank_blocks_are_taken_before_cached_ones_and_used_ones_before_untouched_ones() -> None:
    pool = BlockPool(6, 2)
    cached, private = stored(pool, [1, 2, 3, 4]), pool.allocate(2)
    pool.release(cached)
    pool.release(private)
    pool.check_integrity([])
    assert pool.allocate(1) == private[:1]
    assert len(pool.match(ROOT, chain([1, 2, 3, 4], 2), [1, 2, 3, 4])) == 2
    assert set(pool.allocate(3)) == set(range(6)) - set(cached) - {private[0]}
    assert len(pool.match(ROOT, chain([1, 2, 3, 4], 2), [1, 2, 3, 4])) == 2
    assert pool.allocate(1) == cached[-1:]


def test_events_tell_the_cache_in_order() -> None:
    pool = BlockPool(2, 1)
    blocks = stored(pool, [1, 2])
    pool.release(blocks)
    pool.allocate(1)
    pool.clear_cache()
    first, second = chain([1, 2], 1)
    events = [(e.kind, e.hashes, e.parent) for e in pool.take_events()]
    assert events == [("stored", (first, second), ROOT), ("removed", (second,), b""), ("cleared", (), b"")]
    assert pool.take_events() == []


def test_prefix_that_is_cached_already_stays_where_it_is() -> None:
    pool = BlockPool(8, 1)
    first = stored(pool, [1, 2])
    second = stored(pool, [1, 2, 3])
    assert pool.match(ROOT, chain([1, 2, 3], 1), [1, 2, 3]) == [*first, second[2]]
    kinds = [(e.kind, e.parent, len(e.hashes)) for e in pool.take_events()]
    assert kinds == [("stored", ROOT, 2), ("stored", chain([1, 2], 1)[1], 1)]


def test_releasing_twice_is_our_bug() -> None:
    pool = BlockPool(2, 1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


def test_integrity_check_sees_a_leak() -> None:
    pool = BlockPool(2, 1)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="held by 0"):
        pool.check_integrity([])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 1), min_size=1, max_size=6)), max_size=40))
def test_any_history_keeps_the_pool_whole_and_events_mirror_the_cache(ops: list[tuple[int, list[int]]]) -> None:
    """Allocate-and-store, share, release, clear in any order; a listener of events knows exactly what is cached."""
    pool, held, mirror = BlockPool(12, 1), [], set()
    for op, tokens in ops:
        if op == 0 and len(tokens) <= pool.num_free:
            held.append(stored(pool, tokens))
        elif op == 1:
            hits = pool.match(ROOT, chain(tokens, 1), tokens)
            pool.acquire(hits)
            held.append(hits)
        elif op == 2 and held:
            pool.release(held.pop(len(tokens) % len(held)))
        elif op == 3 and len(tokens) == 6:
            pool.clear_cache()
        for event in pool.take_events():
            if event.kind == "stored":
                mirror |= set(event.hashes)
            elif event.kind == "removed":
                mirror -= set(event.hashes)
            else:
                mirror.clear()
        pool.check_integrity(held)
        assert mirror == set(pool._cached)
