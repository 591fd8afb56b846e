"""When requests are due."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from load.arrivals import PROCESSES, Stage, due_times, parse_stages
from load.units import BadOption

rates = st.floats(0.5, 50)
stages = st.lists(st.builds(Stage, rates, rates, st.floats(0.5, 30)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(stages=stages, process=st.sampled_from(PROCESSES), burstiness=st.floats(0.1, 10), seed=st.integers(0, 2**31))
def test_due_times_ascend_within_the_stages_and_repeat_by_seed(
    stages: list[Stage], process: str, burstiness: float, seed: int
) -> None:
    times = due_times(stages, process, burstiness=burstiness, seed=seed)
    assert np.all(np.diff(times) >= 0)
    assert np.all((times >= 0) & (times <= sum(stage.duration_s for stage in stages) + 1e-6))
    assert np.array_equal(times, due_times(stages, process, burstiness=burstiness, seed=seed))


@settings(max_examples=60, deadline=None)
@given(stages=stages)
def test_a_constant_process_has_as_many_requests_in_every_stage_as_its_rate_says(stages: list[Stage]) -> None:
    times = due_times(stages, "constant")
    begun = 0.0
    for stage in stages:
        inside = np.count_nonzero((times >= begun - 1e-9) & (times < begun + stage.duration_s - 1e-9))
        assert abs(inside - stage.requests) <= 1 + 1e-6
        begun += stage.duration_s


def test_a_constant_rate_has_even_gaps() -> None:
    assert due_times([Stage(4, 4, 2)], "constant") == pytest.approx(np.arange(8) / 4)


@pytest.mark.parametrize(
    ("process", "burstiness", "variation"), [("poisson", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)]
)
def test_gaps_have_the_mean_and_variation_of_their_process(process: str, burstiness: float, variation: float) -> None:
    gaps = np.diff(due_times([Stage(10, 10, 4000)], process, burstiness=burstiness, seed=3))
    assert gaps.mean() == pytest.approx(0.1, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.05)


def test_poisson_counts_scatter_as_poisson_counts() -> None:
    counts = np.histogram(due_times([Stage(20, 20, 2000)], "poisson", seed=1), bins=2000, range=(0, 2000))[0]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=0.1)


def test_a_ramp_has_the_rate_that_it_has_reached() -> None:
    times = due_times([Stage(0, 100, 20)], "poisson", seed=2)
    first, last = np.histogram(times, bins=2, range=(0, 20))[0]
    assert first / (first + last) == pytest.approx(0.25, abs=0.04)


def test_seeds_differ() -> None:
    assert not np.array_equal(
        due_times([Stage(5, 5, 10)], "poisson", seed=1)[:5], due_times([Stage(5, 5, 10)], "poisson", seed=2)[:5]
    )


def test_a_limit_takes_the_first_requests() -> None:
    full = due_times([Stage(5, 5, 100)], "poisson", seed=1)
    assert np.array_equal(due_times([Stage(5, 5, 100)], "poisson", seed=1, limit=7), full[:7])


def test_stages_are_read() -> None:
    assert parse_stages("5@30s, 5-20@1m") == (Stage(5, 5, 30), Stage(5, 20, 60))
    assert math.isclose(parse_stages("0-10@500ms")[0].requests, 2.5)


@pytest.mark.parametrize("text", ["", "5", "5@", "@5s", "5@-1s", "5@0s", "0@10s", "a@5s", "5@5x", "5--6@5s", "1@1s,,"])
def test_what_is_no_stage_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadOption, match="--stages"):
        parse_stages(text)
