"""The search for the highest rate, against servers that are one line of arithmetic."""

from __future__ import annotations

import random
from typing import Any

import pytest

from load.search import Search, SearchInterrupted, late, met


def run(good: bool, *, kept_up: bool = True, failed: int = 0, interrupted: bool = False) -> dict[str, Any]:
    return {
        "label": "x",
        "slo": {"met": good},
        "generator": {"kept_up": kept_up},
        "counts": {"all": {"failed": failed}},
        "interrupted": interrupted,
    }


@pytest.mark.parametrize("start", [0.5, 7.0, 9.9, 10.1, 64.0, 5000.0])
def test_the_border_is_found_from_either_side(start: float) -> None:
    search = Search(lambda rate: run(rate <= 10), precision=0.05, most_probes=60)
    search.run(start)
    assert search.found is not None
    assert search.above is not None
    assert search.found <= 10 < search.above
    assert search.above / search.found <= 1.05 + 1e-9
    assert search.limited_by == "the objectives"
    assert all(
        sorted(votes) in ([True, True], [False, False])
        for rate, votes in search.votes.items()
        if rate in (search.found, search.above)
    )


def test_one_lucky_and_one_unlucky_probe_do_not_move_the_border() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        search = Search(lambda rate, rng=rng: run((rate <= 10) != (rng.random() < 0.1)), precision=0.1, most_probes=60)
        search.run(4.0)
        votes = search.votes[search.found] if search.found else [False]
        assert search.found is None or votes.count(True) >= 2
    search = Search(lambda rate: run(rate <= 10 or len(search.probes) == 4), precision=0.05, most_probes=60)
    search.run(4.0)
    assert search.found is not None
    assert search.found <= 10 < search.found * 1.11


def test_no_rate_is_said_so() -> None:
    search = Search(lambda rate: run(False), most_probes=60)
    search.run(8.0)
    assert (search.found, search.limited_by) == (None, "no rate met the objectives")


def test_a_generator_that_is_the_limit_is_named() -> None:
    search = Search(lambda rate: run(rate <= 10, kept_up=rate <= 10), most_probes=90)
    search.run(4.0)
    assert search.limited_by.startswith("the generator")


def test_a_generator_that_was_late_once_is_tried_again() -> None:
    """A miss of which the generator is to blame was once counted against the server."""
    rates: list[float] = []

    def probe(rate: float) -> dict[str, Any]:
        rates.append(rate)
        stumbled = rates.count(rate) == 1
        return run(rate <= 10 and not stumbled, kept_up=not stumbled)

    search = Search(probe, precision=0.05, most_probes=90)
    search.run(4.0)
    assert search.found is not None
    assert search.found <= 10 < search.found * 1.06
    assert search.limited_by == "the objectives"


def test_probes_are_bounded_and_the_limit_named() -> None:
    search = Search(lambda rate: run(rate <= 10), precision=0.005, most_probes=5)
    search.run(1.0)
    assert len(search.probes) == 5
    assert search.limited_by.startswith("5 probes")


def test_an_interrupted_probe_ends_the_search() -> None:
    search = Search(lambda rate: run(True, interrupted=rate > 4))
    with pytest.raises(SearchInterrupted):
        search.run(1.0)
    assert len(search.probes) == 4


def test_failures_are_no_success_and_lateness_is_void() -> None:
    assert met(run(True))
    assert not met(run(True, failed=1))
    assert met(run(True, kept_up=False))
    assert late(run(False, kept_up=False))
    assert not late(run(False))
    assert not met({**run(True), "slo": None})
