"""Who goes first: classes, what a caller may ask for, and how a bound on a model is shared out among its replicas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admission import Bounds, bounds, time_limit_s
from policies.budget import Subject
from policies.document import parse
from policies.document_limits import Admission, Priorities
from policies.priority import check_tier, rank
from replicas.protocol import InvalidRequest, NotSupported

DOCUMENT = """
priorities:
  classes: {interactive: 0, chat: 10, batch: 50}
  default: chat
  keys: {nightly: batch}
  teams: {research: batch}
  models: {fast: interactive}
  tiers:
    flex: {to: batch}
    priority: {to: interactive, keys: [alice], teams: [support]}
"""


@pytest.fixture
def priorities() -> Priorities:
    found = parse(DOCUMENT).priorities
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("key", "team", "model", "expected"),
    [
        ("bob", "", "big", 10),
        ("nightly", "", "big", 50),
        ("nightly", "support", "fast", 50),
        ("bob", "research", "fast", 50),
        ("bob", "", "fast", 0),
    ],
)
def test_a_class_is_that_of_the_key_then_the_team_then_the_model(
    priorities: Priorities, key: str, team: str, model: str, expected: int
) -> None:
    assert rank(Subject(key, team, model), priorities, None, 0) == expected
    assert rank(Subject(key, team, model), priorities, "auto", 7) == expected + 7


def test_everybody_may_come_later_and_only_the_named_may_come_earlier(priorities: Priorities) -> None:
    assert rank(Subject("bob", "", "big"), priorities, "flex", 0) == 50
    assert rank(Subject("alice", "", "big"), priorities, "priority", 0) == 0
    assert rank(Subject("bob", "support", "big"), priorities, "priority", 0) == 0
    with pytest.raises(InvalidRequest) as refused:
        rank(Subject("bob", "", "big"), priorities, "priority", 0)
    assert refused.value.param == "service_tier"
    # the same class as one's own is no step ahead
    assert rank(Subject("bob", "", "fast"), priorities, "priority", 0) == 0


def test_without_classes_a_caller_may_still_come_later_but_a_tier_means_nothing() -> None:
    assert rank(Subject("bob", "", "big"), None, None, 3) == 3
    for tier in (None, "auto", "default"):
        check_tier(tier, None)
    with pytest.raises(NotSupported):
        check_tier("flex", None)


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_shares_add_up_to_the_bound_and_nobody_has_none(total: int, replicas: int) -> None:
    shares = [Bounds(queued=total).share(number, replicas).queued or 0 for number in range(replicas)]
    assert sum(shares) == max(total, replicas)
    assert min(shares) >= 1
    assert max(shares) - min(shares) <= 1


def test_a_models_own_bounds_take_the_place_of_those_for_all_key_by_key() -> None:
    admission = Admission.model_validate({"max_queued": 9, "max_queued_per_key": 3, "models": {"a": {"max_queued": 4}}})
    assert bounds(admission, "a") == Bounds(queued=4, queued_per_key=3)
    assert bounds(admission, "b") == Bounds(queued=9, queued_per_key=3)
    assert bounds(Admission(deadline_s=1.0), "a") is None


@pytest.mark.parametrize(
    ("deadline_s", "max_s", "asked_s", "expected"),
    [
        (None, None, None, None),
        (None, None, 5.0, 5.0),
        (3.0, None, None, 3.0),
        (3.0, None, 5.0, 5.0),
        (3.0, 4.0, 5.0, 4.0),
        (None, 4.0, None, 4.0),
    ],
)
def test_a_time_limit_is_the_callers_within_the_documents(
    deadline_s: float | None, max_s: float | None, asked_s: float | None, expected: float | None
) -> None:
    assert time_limit_s(Admission(deadline_s=deadline_s, max_deadline_s=max_s), asked_s) == expected
    assert time_limit_s(None, asked_s) == asked_s
