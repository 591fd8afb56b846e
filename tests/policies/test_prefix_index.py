from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.prefix_history import HistoryIndex
from policies.prefix_index import PrefixIndex
from replicas.protocol import KVEvent, block_hash, prefix_root

ROOT = prefix_root("tenant", "weights")


def chain(*names: int) -> tuple[bytes, ...]:
    """Hashes of a prompt whose blocks hold these names."""
    hashes: list[bytes] = []
    for name in names:
        hashes.append(block_hash(hashes[-1] if hashes else ROOT, [name] * 16))
    return tuple(hashes)


def stored(*hashes: bytes) -> KVEvent:
    return KVEvent(kind="stored", hashes=hashes, parent=ROOT)


def removed(*hashes: bytes) -> KVEvent:
    return KVEvent(kind="removed", hashes=hashes)


def random_hashes(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(16) for _ in range(count)]


class Oracle:
    """The same answers from plain sets; what was lost is told by `apply`'s caller."""

    def __init__(self) -> None:
        self.held: dict[str, set[bytes]] = {}

    def apply(self, replica_id: str, event: KVEvent) -> None:
        held = self.held.setdefault(replica_id, set())
        if event.kind == "stored":
            held.update(event.hashes)
        elif event.kind == "removed":
            held.difference_update(event.hashes)
        else:
            held.clear()

    def leading(self, hashes: Sequence[bytes], replica_ids: Sequence[str]) -> list[int]:
        return [
            next((i for i, digest in enumerate(hashes) if digest not in self.held.get(name, ())), len(hashes))
            for name in replica_ids
        ]


BLOCKS = random_hashes(12, seed=1)
some_blocks = st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=5)
event_of = st.one_of(
    st.builds(lambda hashes: stored(*hashes), some_blocks),
    st.builds(lambda hashes: stored(*hashes), some_blocks),
    st.builds(lambda hashes: removed(*hashes), some_blocks),
    st.just(KVEvent(kind="cleared")),
)
change = st.tuples(st.integers(0, 3), st.one_of(event_of, event_of, event_of, st.sampled_from(["drop", "restart"])))


@settings(deadline=None)
@given(st.lists(change, max_size=60), st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=12))
def test_it_answers_as_plain_sets_do_through_changes_restarts_and_losses(
    changes: list[tuple[int, KVEvent | str]], prompt: list[bytes]
) -> None:
    index, oracle = PrefixIndex(), Oracle()
    incarnations, numbers = dict.fromkeys(range(4), 1), dict.fromkeys(range(4), 1)
    names = tuple(f"r{n}" for n in range(4))
    for replica, what in changes:
        name = names[replica]
        if isinstance(what, KVEvent):
            index.apply(name, str(incarnations[replica]), numbers[replica], [what])
            oracle.apply(name, what)
            numbers[replica] += 1
        else:
            if what == "drop":
                index.drop(name)
            incarnations[replica] += 1
            numbers[replica] = 1
            index.apply(name, str(incarnations[replica]), 1, [])
            oracle.held.pop(name, None)
        assert index.leading(prompt, names).tolist() == oracle.leading(prompt, names)


def test_many_entries_are_all_found_none_invented_and_half_of_them_removed() -> None:
    index, oracle = PrefixIndex(), Oracle()
    names = tuple(f"r{n}" for n in range(70))  # more than one table's worth of replicas
    hashes = random_hashes(5000, seed=2)
    rng = random.Random(3)
    numbers = dict.fromkeys(names, 1)
    for digest in hashes:
        for name in rng.sample(names, 2):
            index.apply(name, "a", numbers[name], [stored(digest)])
            oracle.apply(name, stored(digest))
            numbers[name] += 1
    for digest in hashes[::2]:
        for name in names:
            if digest in oracle.held[name]:
                index.apply(name, "a", numbers[name], [removed(digest)])
                oracle.apply(name, removed(digest))
                numbers[name] += 1
    for digest in (*hashes, *random_hashes(500, seed=4)):
        assert index.leading([digest], names).tolist() == oracle.leading([digest], names)
    assert index.dropped == 0


def test_a_prefix_whose_middle_was_evicted_counts_only_up_to_the_gap() -> None:
    index, prompt = PrefixIndex(), chain(1, 2, 3, 4)
    index.apply("r", "a", 1, [stored(*prompt), removed(prompt[1])])
    assert index.leading(prompt, ("r",)).tolist() == [1]
    index.apply("r", "a", 3, [stored(prompt[1])])
    assert index.leading(prompt, ("r",)).tolist() == [4]


def test_replicas_that_never_published_hold_nothing() -> None:
    index, prompt = PrefixIndex(), chain(1, 2)
    assert index.leading(prompt, ("r",)).tolist() == [0]
    index.apply("r", "a", 1, [stored(*prompt)])
    assert index.leading(prompt, ("other", "r")).tolist() == [0, 2]
    assert index.leading((), ("r",)).tolist() == [0]


def test_a_new_incarnation_starts_with_an_empty_cache() -> None:
    index, prompt = PrefixIndex(), chain(1, 2)
    index.apply("r", "a", 1, [stored(*prompt)])
    index.apply("r", "b", 1, [stored(prompt[0])])
    assert index.leading(prompt, ("r",)).tolist() == [1]


def test_after_lost_events_nothing_old_is_claimed_until_the_snapshot() -> None:
    index, prompt = PrefixIndex(), chain(1, 2, 3)
    assert not index.apply("r", "a", 1, [stored(*prompt)])
    assert index.apply("r", "a", 5, [stored(prompt[1])])
    assert index.wanting == ["r"]
    assert index.leading(prompt, ("r",)).tolist() == [0]
    assert index.apply("r", "a", 6, [removed(prompt[2])])
    # Taken before event 5: what came since must be applied on top of it.
    assert not index.snapshot("r", "a", 5, [prompt[0], prompt[2]])
    assert index.wanting == []
    assert index.leading(prompt, ("r",)).tolist() == [2]


def test_a_gateway_that_joins_late_wants_a_snapshot() -> None:
    index, prompt = PrefixIndex(), chain(1, 2)
    assert index.apply("r", "a", 100, [stored(prompt[1])])
    assert not index.snapshot("r", "a", 100, [prompt[0]])
    assert index.leading(prompt, ("r",)).tolist() == [2]


def test_a_snapshot_older_than_what_is_remembered_is_asked_for_again() -> None:
    index, prompt = PrefixIndex(), chain(1, 2)
    index.apply("r", "a", 1, [stored(*prompt)])
    index.apply("r", "a", 9, [stored(*prompt)])
    assert index.snapshot("r", "a", 4, [])  # events 4 to 8 are in nobody's hands
    assert index.wanting == ["r"]


def test_events_seen_twice_are_applied_once() -> None:
    index, prompt = PrefixIndex(), chain(1, 2)
    index.apply("r", "a", 1, [stored(*prompt), removed(prompt[1])])
    assert not index.apply("r", "a", 1, [stored(*prompt), removed(prompt[1]), stored(prompt[1])])
    assert index.leading(prompt, ("r",)).tolist() == [2]
    assert not index.apply("r", "a", 2, [removed(prompt[1])])
    assert index.leading(prompt, ("r",)).tolist() == [2]


def test_departed_replicas_leave_no_entries_behind_even_while_others_store() -> None:
    index, hashes = PrefixIndex(), random_hashes(8000, seed=5)
    index.apply("gone", "a", 1, [stored(*hashes[:5000])])
    index.apply("stays", "a", 1, [stored(*hashes[4000:4500])])
    index.drop("gone")
    for number, digest in enumerate(hashes[5000:], 2):  # splits chunks while the sweep is under way
        index.apply("stays", "a", number, [stored(digest)])
    assert index.entries == 3500
    expected = [0] * 4000 + [1] * 500 + [0] * 500 + [1] * 3000
    assert [int(index.leading([digest], ("stays",))[0]) for digest in hashes] == expected


def test_a_replica_that_restarts_a_thousand_times_needs_no_more_room() -> None:
    index, hashes = PrefixIndex(), random_hashes(300, seed=6)
    for incarnation in range(1000):
        index.apply("r", str(incarnation), 1, [stored(*hashes[:100])])
    size = index.memory_bytes
    index.apply("r", "last", 1, [stored(*hashes)])
    assert index.leading(hashes, ("r",)).tolist() == [300]
    assert (index.memory_bytes, index.entries) == (size, 300)


def test_memory_is_bounded_and_what_does_not_fit_is_counted_never_invented() -> None:
    index, hashes = PrefixIndex(max_entries=4096), random_hashes(6000, seed=7)
    index.apply("r", "a", 1, [stored(*hashes)])
    assert index.memory_bytes <= 4096 * 17
    assert index.entries + index.dropped == 6000
    assert index.dropped > 0
    found = sum(int(index.leading([digest], ("r",))[0]) for digest in hashes)
    assert found == index.entries


@pytest.mark.parametrize("blocks", [10_000, 15_000, 20_000, 30_000])
def test_an_entry_takes_at_most_40_bytes_wherever_growth_stands(blocks: int) -> None:
    index = PrefixIndex()
    for name in ("r1", "r2"):
        index.apply(name, "a", 1, [stored(*random_hashes(blocks, seed=hash(name) & 0xFFFF))])
    assert index.memory_bytes / (2 * blocks) <= 40


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=20), st.integers(1, 12))
def test_a_history_remembers_the_last_prompts_and_stays_within_its_bound(prompts: list[list[int]], bound: int) -> None:
    history = HistoryIndex(bound)
    for names in prompts:
        history.record("r", chain(*names))
        assert history.sizes(("r", "x")).tolist()[0] <= bound
        assert history.leading(chain(*names), ("r", "x")).tolist() == [min(len(names), bound), 0]


def test_a_history_forgets_tails_before_heads() -> None:
    history = HistoryIndex(3)
    history.record("r", chain(1, 2, 3))
    history.record("r", chain(7))
    assert history.leading(chain(1, 2, 3), ("r",)).tolist() == [2]
    history.drop("r")
    assert history.leading(chain(7), ("r",)).tolist() == [0]


def test_a_late_listener_is_exact_after_a_snapshot_in_slices_with_events_between_them() -> None:
    index, prompt = PrefixIndex(), chain(*range(1, 9))
    index.expect_snapshot("r", "a")
    slices = index.snapshot_slices("r", "a", 40, prompt[:6], slice_blocks=2)
    next(slices)
    assert index.apply("r", "a", 40, [removed(prompt[5]), stored(*prompt[6:])])
    for _ in slices:
        pass
    assert index.wanting == []
    assert index.leading(prompt, ("r",)).tolist() == [5]
    assert not index.apply("r", "a", 42, [stored(prompt[5])])
    assert index.leading(prompt, ("r",)).tolist() == [8]


def test_the_first_event_of_an_incarnation_makes_its_snapshot_moot() -> None:
    index, prompt = PrefixIndex(), chain(1, 2)
    index.expect_snapshot("r", "a")
    assert not index.apply("r", "a", 1, [stored(*prompt)])
    assert not index.snapshot("r", "a", 1, [])
    assert index.leading(prompt, ("r",)).tolist() == [2]


def test_a_snapshot_of_a_replica_that_left_meanwhile_ends() -> None:
    index, prompt = PrefixIndex(), chain(1, 2, 3, 4)
    index.expect_snapshot("r", "a")
    slices = index.snapshot_slices("r", "a", 1, prompt, slice_blocks=1)
    next(slices)
    index.drop("r")
    assert list(slices) == []
    assert index.leading(prompt, ("r",)).tolist() == [0]


def test_short_and_long_chains_are_answered_alike() -> None:
    """Short ones are followed block by block, long ones at once."""
    index, prompt = PrefixIndex(), chain(*range(1, 60))
    held = {"a": 3, "b": 16, "c": 17, "d": 59, "e": 0}
    for name, count in held.items():
        index.apply(name, "x", 1, [stored(*prompt[:count]), *([stored(prompt[30])] if name == "a" else [])])
    names = tuple(held)
    for length in (1, 2, 15, 16, 17, 18, 40, 59):
        assert index.leading(prompt[:length], names).tolist() == [min(count, length) for count in held.values()]
    assert index.leading(chain(*range(100, 160)), names).tolist() == [0] * 5
