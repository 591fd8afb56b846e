"""The simulator's index answers as the product's does."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.prefix_index import PrefixIndex
from policies.sim_index import HolderIndex
from replicas.protocol import KVEvent, block_hash, prefix_root


def chains(count: int, length: int) -> list[tuple[bytes, ...]]:
    """Chains that share their first halves in pairs."""
    found = []
    for name in range(count):
        hashes: list[bytes] = []
        for place in range(length):
            own = name if place >= length // 2 else name // 2
            hashes.append(block_hash(hashes[-1] if hashes else prefix_root("", "w"), (own, place)))
        found.append(tuple(hashes))
    return found


@settings(deadline=None, max_examples=40)
@given(st.integers(), st.integers(1, 90))
def test_it_answers_as_the_prefix_index_does(seed: int, replicas: int) -> None:
    rng = random.Random(seed)
    names = tuple(f"r{number}" for number in range(replicas))
    prompts = chains(6, 10)
    ours, theirs = HolderIndex(), PrefixIndex()
    held: dict[str, set[bytes]] = {name: set() for name in names}
    numbers = dict.fromkeys(names, 1)
    lives = dict.fromkeys(names, 1)
    for name in names:
        ours.join(name)
    for _ in range(60):
        name, prompt = rng.choice(names), rng.choice(prompts)
        if rng.random() < 0.05:
            ours.join(name)
            lives[name] += 1
            held[name], numbers[name] = set(), 1
        first, end = sorted((rng.randrange(11), rng.randrange(11)))
        blocks = prompt[first:end]
        kind = rng.choice(("stored", "removed"))
        changed = tuple(one for one in blocks if (one in held[name]) == (kind == "removed"))
        event = KVEvent(kind=kind, hashes=changed, parent=b"")
        (held[name].update if kind == "stored" else held[name].difference_update)(changed)
        ours.apply(name, [event])
        theirs.apply(name, str(lives[name]), numbers[name], [event])
        numbers[name] += 1
        for asked in prompts:
            assert np.array_equal(ours.leading(asked, names), theirs.leading(asked, names))
    ours.drop(names[0])
    assert ours.leading(prompts[0], names)[0] == 0
