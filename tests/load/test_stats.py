"""Intervals that hold what they promise, on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from load import stats
from load.stats import Estimate


@pytest.mark.parametrize(("rank", "count"), [(50, 30), (50, 400), (95, 200), (99, 1000)])
def test_percentile_intervals_hold_the_truth_95_times_in_100(rank: float, count: int) -> None:
    rng = np.random.default_rng(7)
    truth = -math.log(1 - rank / 100)  # of an exponential distribution
    held = 0
    for _ in range(600):
        found = stats.percentile(rng.exponential(1.0, count), rank)
        low = -math.inf if math.isnan(found.low) else found.low
        held += low <= truth <= (math.inf if math.isnan(found.high) else found.high)
    assert held / 600 >= 0.93


def test_intervals_widen_when_latencies_depend_on_each_other() -> None:
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        noise = rng.normal(size=2000)
        series = np.empty(2000)
        series[0] = noise[0]
        for at in range(1, 2000):
            series[at] = 0.9 * series[at - 1] + math.sqrt(1 - 0.81) * noise[at]
        found = stats.percentile(series, 50)
        held += found.low <= 0 <= found.high
    assert held / 200 >= 0.88


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.floats(0, 1e3), min_size=1, max_size=200), rank=st.sampled_from([1.0, 50.0, 90.0, 99.9]))
def test_an_interval_encloses_its_percentile(values: list[float], rank: float) -> None:
    found = stats.percentile(values, rank)
    assert found.value == pytest.approx(float(np.percentile(values, rank)))
    assert math.isnan(found.low) or found.low <= found.value + 1e-9
    assert math.isnan(found.high) or found.high >= found.value - 1e-9


def test_few_samples_bound_no_p99_from_above() -> None:
    found = stats.percentile(np.arange(50.0), 99)
    assert math.isnan(found.high)
    assert found.low < 49


def test_ranks_are_those_of_the_binomial_table() -> None:
    """Of 10, P(B <= 1) = 11/1024 is under 2.5 % and P(B <= 2) = 56/1024 is not: the 2nd and the 9th."""
    found = stats.percentile(np.arange(1.0, 11.0), 50)
    assert (found.low, found.high) == (2.0, 9.0)


def test_ratio_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        above, below = stats.percentile(rng.exponential(3.0, 300), 90), stats.percentile(rng.exponential(1.0, 300), 90)
        found = stats.ratio(above, below)
        held += found.low <= 3 <= found.high
    assert held / 300 >= 0.93


def test_a_ratio_of_what_was_not_measured_is_nothing() -> None:
    assert math.isnan(stats.ratio(Estimate(math.nan), Estimate(1.0)).value)
    assert math.isnan(stats.ratio(Estimate(1.0, 0.5, 2.0), Estimate(0.0)).value)
    assert not stats.ratio(Estimate(1.0), Estimate(2.0, 1.0, 3.0)).bounded


def test_warm_up_is_found_where_it_ends() -> None:
    rng = np.random.default_rng(1)
    series = np.concatenate((np.linspace(5, 1, 100), np.full(900, 1.0))) + rng.normal(0, 0.05, 1000)
    cut = stats.warmup_count(series)
    assert cut is not None
    assert 80 <= cut <= 160


def test_a_steady_series_loses_little() -> None:
    rng = np.random.default_rng(2)
    cuts = [stats.warmup_count(rng.exponential(1.0, 500)) for _ in range(50)]
    assert sorted(500 if cut is None else cut for cut in cuts)[25] <= 100


def test_a_series_that_only_grows_never_settles() -> None:
    assert stats.warmup_count(np.linspace(0, 10, 400)) is None


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 19, [2.0] * 400])
def test_nothing_is_cut_from_few_or_equal_samples(values: list[float]) -> None:
    assert stats.warmup_count(values) == 0


def test_rates_and_shares() -> None:
    moments = np.arange(0, 10, 0.1)
    found = stats.rate(moments, 0, 10)
    assert found.value == pytest.approx(10)
    assert found.low <= 10 <= found.high
    assert stats.rate(moments, 0, 10, np.full(100, 3.0)).value == pytest.approx(30)
    assert math.isnan(stats.rate(moments, 5, 5).value)
    half = stats.share(50, 100)
    assert (round(half.low, 3), round(half.high, 3)) == (0.404, 0.596)  # Wilson's, as in Brown, Cai & DasGupta
    assert stats.share(0, 10).low == 0


def test_json_keeps_what_is_not_bounded() -> None:
    assert Estimate.from_json(Estimate(1.0, 0.5).as_json()).low == 0.5
    assert not Estimate.from_json(Estimate(1.0, 0.5).as_json()).bounded
