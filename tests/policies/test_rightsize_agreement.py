from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.rightsize.agreement import agreement


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("Paris", "paris.", 1.0),
        ("The capital is Paris.", "Paris is the capital", 1.0),
        ("", "...", 1.0),
        ("", "Paris", 0.0),
        ("42", "43", 0.0),
        ("one two three", "one two four", 2 / 3),
        ("yes yes", "yes", 2 / 3),
    ],
)
def test_agreement_is_the_f1_of_words(one: str, other: str, expected: float) -> None:
    assert agreement(one, other) == pytest.approx(expected)


@given(st.text(max_size=60), st.text(max_size=60))
def test_agreement_is_symmetric_and_a_share(one: str, other: str) -> None:
    assert agreement(one, other) == agreement(other, one)
    assert 0 <= agreement(one, other) <= 1
    assert agreement(one, one) == 1
