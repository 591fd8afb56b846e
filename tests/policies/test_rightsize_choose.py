from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.rightsize.choose import (
    Candidate,
    PricedModel,
    RightSizeRequest,
    RightSizeView,
    Trade,
    choose,
    right_size,
)
from policies.rightsize.defaults import UNTRAINED, difficulty, untrained_quality
from replicas.protocol import ConfigError, NoReplica

SMALL = PricedModel(name="small", input_price=0.1, output_price=0.1)
LARGE = PricedModel(name="large", input_price=0.9, output_price=0.9)
PROOF = "Prove that $\\sum_{k=1}^n k = \\frac{n(n+1)}{2}$, then write def total(n): in Python. Why is it right?\n" * 8

qualities = st.floats(0, 1)
costs = st.floats(0, 1e3, allow_subnormal=False)
weights = st.floats(0, 1e9, allow_subnormal=False)
fleets = st.lists(st.tuples(qualities, costs), min_size=1, max_size=9).map(
    lambda pairs: [Candidate(f"m{i}", quality, cost) for i, (quality, cost) in enumerate(pairs)]
)


@settings(deadline=None)
@given(fleets, weights, weights)
def test_expected_cost_never_rises_with_cost_weight(fleet: list[Candidate], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert choose(fleet, Trade(cost_weight=high)).chosen.cost <= choose(fleet, Trade(cost_weight=low)).chosen.cost


@settings(deadline=None)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=2, max_size=9), st.sampled_from([0.1, 0.2, 0.3, 1.0]), weights
)
def test_cost_stays_monotone_where_rounding_makes_ties(values: list[float], step: float, weight: float) -> None:
    """0.1 + 0.2 != 0.3: utilities that are equal on paper differ in the last bit."""
    fleet = [Candidate(f"m{i}", value * step, value / 1000) for i, value in enumerate(values)]
    dearer = choose(fleet, Trade(cost_weight=weight)).chosen.cost
    for more in (math.nextafter(weight, math.inf), weight * 1.0000001, weight + 1e-3):
        assert choose(fleet, Trade(cost_weight=more)).chosen.cost <= dearer


@settings(deadline=None)
@given(fleets, qualities)
def test_the_floor_is_honoured_at_the_lowest_cost_that_honours_it(fleet: list[Candidate], floor: float) -> None:
    chosen = choose(fleet, Trade(quality_floor=floor)).chosen
    reaching = [one for one in fleet if one.quality >= floor]
    if reaching:
        assert chosen.quality >= floor
        assert chosen.cost == min(one.cost for one in reaching)
    else:
        assert chosen.quality == max(one.quality for one in fleet)


@settings(deadline=None)
@given(fleets, qualities, qualities)
def test_a_higher_floor_never_costs_less(fleet: list[Candidate], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert choose(fleet, Trade(quality_floor=low)).chosen.cost <= choose(fleet, Trade(quality_floor=high)).chosen.cost


@settings(deadline=None)
@given(fleets, weights, st.randoms())
def test_the_order_of_candidates_does_not_matter(fleet: list[Candidate], weight: float, rng: object) -> None:
    shuffled = list(fleet)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose(fleet, Trade(cost_weight=weight)).model == choose(shuffled, Trade(cost_weight=weight)).model


@settings(deadline=None)
@given(fleets, weights)
def test_no_candidate_is_both_better_and_cheaper_than_the_chosen(fleet: list[Candidate], weight: float) -> None:
    chosen = choose(fleet, Trade(cost_weight=weight)).chosen
    assert not any(one.quality > chosen.quality and one.cost < chosen.cost for one in fleet)


def test_a_choice_keeps_every_term_of_its_reasoning() -> None:
    fleet = [Candidate("small", 0.6, 0.0001), Candidate("large", 0.7, 0.0009)]
    choice = choose(fleet, Trade(cost_weight=0.5))
    assert choice.model == "small"
    assert choice.utilities == pytest.approx((0.55, 0.25))
    assert choice.candidates == tuple(fleet)
    assert "cost_weight 0.5" in choice.reason


def test_weight_zero_buys_the_best_and_a_large_weight_the_cheapest() -> None:
    fleet = [Candidate("small", 0.6, 0.0001), Candidate("large", 0.7, 0.0009)]
    assert choose(fleet, Trade(cost_weight=0)).model == "large"
    assert choose(fleet, Trade(cost_weight=1e6)).model == "small"


@pytest.mark.parametrize(
    "terms",
    [
        {},
        {"cost_weight": 1.0, "quality_floor": 0.5},
        {"cost_weight": -1.0},
        {"cost_weight": math.inf},
        {"cost_weight": math.nan},
        {"quality_floor": 1.1},
        {"quality_floor": math.nan},
    ],
)
def test_a_trade_that_makes_no_sense_is_refused(terms: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Trade(**terms)


def test_a_candidate_without_a_usable_number_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'odd'"):
        choose([Candidate("odd", math.nan, 0.1)], Trade(cost_weight=1))


def test_without_candidates_there_is_no_replica() -> None:
    with pytest.raises(NoReplica):
        choose([], Trade(cost_weight=1))
    with pytest.raises(NoReplica):
        right_size(RightSizeRequest(text="hi", prompt_tokens=2), RightSizeView(models=(), trade=Trade(cost_weight=1)))


def test_the_untrained_default_sends_hard_prompts_up_and_says_what_it_is() -> None:
    view = RightSizeView(models=(SMALL, LARGE), trade=Trade(quality_floor=0.85))
    easy = right_size(RightSizeRequest(text="hello there", prompt_tokens=3), view)
    hard = right_size(RightSizeRequest(text=PROOF, prompt_tokens=400), view)
    assert (easy.model, hard.model) == ("small", "large")
    assert easy.source == UNTRAINED
    assert UNTRAINED in easy.reason


def test_declared_strength_wins_over_price_order() -> None:
    strong_and_cheap = PricedModel(name="tuned", input_price=0.1, output_price=0.1, strength=0.99)
    view = RightSizeView(models=(LARGE, strong_and_cheap), trade=Trade(quality_floor=0.9))
    assert right_size(RightSizeRequest(text=PROOF, prompt_tokens=400), view).model == "tuned"


@settings(deadline=None)
@given(st.text(max_size=300))
def test_difficulty_is_a_share_for_any_text(text: str) -> None:
    assert 0 <= difficulty(text) <= 1
    assert all(0 <= quality <= 1 for quality in untrained_quality(text, [("a", 1, None), ("b", 2, 0.3)]).values())


@pytest.mark.parametrize("demand", ["def f(x): return x", "Solve $x^2 = 3$.", "为什么天空是蓝色的", "word " * 400])
def test_code_mathematics_language_and_length_each_raise_difficulty(demand: str) -> None:
    assert difficulty(demand) > difficulty("hello there")


def test_max_tokens_caps_the_expected_answer() -> None:
    view = RightSizeView(models=(SMALL, LARGE), trade=Trade(cost_weight=1), expected_output_tokens=500)
    short = right_size(RightSizeRequest(text="hi", prompt_tokens=100, max_tokens=10), view)
    assert [one.cost for one in short.candidates] == pytest.approx([110 * 0.1e-6, 110 * 0.9e-6])
    open_end = right_size(RightSizeRequest(text="hi", prompt_tokens=100), view)
    assert [one.cost for one in open_end.candidates] == pytest.approx([600 * 0.1e-6, 600 * 0.9e-6])


def test_a_guarantee_at_zero_sends_everything_to_the_strong_model() -> None:
    view = RightSizeView(models=(SMALL, LARGE), trade=Trade(cost_weight=1e6), safety_scale=0, strong="large")
    choice = right_size(RightSizeRequest(text="hi", prompt_tokens=3), view)
    assert choice.model == "large"
    assert "guarantee" in choice.reason
