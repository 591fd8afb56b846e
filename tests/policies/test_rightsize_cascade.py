from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.rightsize.cascade import Answered, Cascade, calibrate, confidence, cost, escalates, sweep
from replicas.protocol import ConfigError


def answers(count: int = 400, seed: int = 0) -> list[Answered]:
    """The surer the small model is, the likelier it is right; the strong model is right nine times in ten."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(-3, 0, count)
    right = rng.random(count) < np.exp(sure)
    strong = rng.random(count) < 0.9
    return [Answered(float(c), float(s), float(t), 1.0, 9.0) for c, s, t in zip(sure, right, strong, strict=True)]


def test_a_calibrated_threshold_brings_what_it_said_when_it_is_replayed() -> None:
    table = answers()
    point = calibrate(table, share=0.95)
    cascade = Cascade("small", "strong", point.threshold)
    up = [escalates(cascade, [one.confidence]) for one in table]
    got = [one.strong_quality if e else one.small_quality for one, e in zip(table, up, strict=True)]
    paid = [cost(one.small_cost, one.strong_cost, escalated=e) for one, e in zip(table, up, strict=True)]
    assert np.mean(got) == pytest.approx(point.quality)
    assert np.mean(paid) == pytest.approx(point.cost)
    assert np.mean(up) == pytest.approx(point.escalated)
    assert point.quality >= 0.95 * np.mean([one.strong_quality for one in table])
    assert 0 < point.escalated < 1


def test_an_escalated_request_has_paid_for_both() -> None:
    assert cost(1, 9, escalated=True) == 10
    assert cost(1, 9, escalated=False) == 1


def test_a_higher_share_never_costs_less() -> None:
    table = answers()
    spent = [calibrate(table, share).cost for share in (0.5, 0.8, 0.9, 0.95, 0.99, 1.0)]
    assert spent == sorted(spent)


def test_equal_confidences_escalate_together() -> None:
    table = [Answered(-1.0 if i % 2 else -2.0, 0.0, 1.0, 1.0, 9.0) for i in range(40)]
    assert [point.escalated for point in sweep(table)] == [0, 0.5, 1]


def test_confidence_is_the_mean_and_an_empty_or_broken_answer_has_none() -> None:
    assert confidence([-1.0, -3.0]) == -2.0
    assert confidence([]) == -math.inf
    assert confidence([-1.0, math.nan]) == -math.inf
    assert escalates(Cascade("a", "b", -100.0), [])


@settings(deadline=None)
@given(st.floats(-10, 0), st.lists(st.floats(-20, 0), min_size=1, max_size=30))
def test_exactly_what_is_less_sure_than_the_threshold_escalates(threshold: float, logprobs: list[float]) -> None:
    assert escalates(Cascade("a", "b", threshold), logprobs) == (confidence(logprobs) < threshold)


def test_too_few_answers_are_refused() -> None:
    with pytest.raises(ConfigError, match="30"):
        calibrate(answers(29), 0.9)
