from __future__ import annotations

import random

import numpy as np
import pytest

from policies.rightsize.choose import Trade
from policies.rightsize.guarantee import Bound, Guard, Promise, observe, shadows
from replicas.protocol import ConfigError

PROMISE = Promise(strong="large", agreement=0.9, error=0.05)


@pytest.mark.parametrize("mean", [0.1, 0.5, 0.9])
def test_both_bounds_cover_the_mean_at_all_times(mean: float) -> None:
    """100 runs looked at after every one of 200 samples: a bound with error 0.1 may fail in 10 % of runs."""
    rng = np.random.default_rng(7)
    too_high = too_low = 0
    for _ in range(100):
        bound, above, below = Bound(error=0.1), False, False
        for value in rng.random(200) < mean:
            bound = bound.observe(float(value))
            above, below = above or bound.low > mean, below or bound.high < mean
        too_high, too_low = too_high + above, too_low + below
    assert too_high <= 10
    assert too_low <= 10


def test_the_bound_covers_a_mean_of_graded_agreements_and_closes_in() -> None:
    rng = np.random.default_rng(3)
    bound = Bound(error=0.05)
    for value in rng.beta(8, 2, 4000):
        bound = bound.observe(float(value))
    assert bound.low < 0.8 < bound.high
    assert bound.high - bound.low < 0.04


def test_a_kept_promise_moves_nothing_in_almost_every_life() -> None:
    """The truth stands exactly at the promise; `error` bounds the whole life, however often one looks."""
    rng = np.random.default_rng(11)
    moved = 0
    for _ in range(100):
        guard = Guard.begin(PROMISE)
        for value in rng.random(200) < 0.9:
            guard = observe(guard, PROMISE, float(value), 0.0)
        moved += guard.moves > 0
    assert moved <= 5


def test_a_broken_promise_moves_towards_safety_until_it_is_kept() -> None:
    """Agreement depends on the scale: 0.5 as configured, 0.96 once the scale has come down to an eighth."""
    rng = np.random.default_rng(5)
    guard = Guard.begin(PROMISE)
    scales = []
    for _ in range(3000):
        agreement = 0.96 if guard.scale <= 1 / 8 else 0.5
        guard = observe(guard, PROMISE, float(rng.random() < agreement), 0.0)
        scales.append(guard.scale)
    assert scales == sorted(scales, reverse=True)
    assert guard.scale == 1 / 8
    assert guard.verdict(PROMISE) == "kept"
    assert scales.index(0.5) < 200


def test_hopeless_agreement_ends_at_the_strong_model_and_stays_there() -> None:
    guard = Guard.begin(PROMISE)
    for _ in range(2000):
        guard = observe(guard, PROMISE, 0.0, 0.0)
    assert guard.scale == 0
    assert Trade(cost_weight=3.0).towards_quality(guard.scale) == Trade(cost_weight=0.0)
    assert Trade(quality_floor=0.5).towards_quality(guard.scale) == Trade(quality_floor=1.0)


def test_the_stated_share_is_shadowed_and_the_strong_model_is_not_compared_with_itself() -> None:
    promise = Promise(strong="large", share=0.2, budget=1e9)
    guard, rng = Guard.begin(promise), random.Random(1)
    drawn = [shadows(guard, promise, chosen="small", strong_cost=1.0, rng=rng) for _ in range(5000)]
    assert 0.18 < np.mean(drawn) < 0.22
    assert not any(shadows(guard, promise, chosen="large", strong_cost=1.0, rng=rng) for _ in range(100))


def test_shadow_runs_never_exceed_the_budget_of_a_window() -> None:
    promise = Promise(strong="large", share=1.0, budget=1.0)
    guard, rng = Guard.begin(promise), random.Random(1)
    for _ in range(50):
        if shadows(guard, promise, chosen="small", strong_cost=0.3, rng=rng):
            guard = observe(guard, promise, 1.0, 0.3)
    assert guard.spent == pytest.approx(0.9)
    assert guard.bound.count == 3
    assert shadows(guard.next_window(), promise, chosen="small", strong_cost=0.3, rng=rng)
    assert guard.next_window().bound == guard.bound


@pytest.mark.parametrize("terms", [{"agreement": 1.2}, {"share": -0.1}, {"error": 0.0}, {"budget": float("nan")}])
def test_a_promise_that_makes_no_sense_is_refused_by_field(terms: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(terms))):
        Promise(strong="large", **terms)


def test_agreement_outside_its_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1\.5"):
        observe(Guard.begin(PROMISE), PROMISE, 1.5, 0.0)
