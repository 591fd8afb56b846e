"""Which models a request is given to, in which order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.config import GatewayConfig, ServedModel
from gateway.rules import Rules, compiler
from policies import document
from policies.selection import ModelGroup, Selection, Size, keep, select_from, select_model
from replicas.fake import FakeSettings, fake_card
from replicas.protocol import ModelCard, ModelNotFound

EASY = Size(text="Hello there", prompt_tokens=5, max_tokens=20)
HARD = Size(
    text="Prove that $\\sum_n 1/n^2$ converges, then write a C++ function and explain every step:\n```int f(){}```",
    prompt_tokens=40,
    max_tokens=800,
)
PRICES = {"small": 1.0, "middle": 4.0, "large": 20.0}


@dataclass
class Fleet:
    """The part of gateway.fleet.Fleet that a selection reads."""

    absent: set[str] = field(default_factory=set)
    context: dict[str, int] = field(default_factory=dict)

    def ready(self, model: str) -> int:
        return int(model not in self.absent)

    def card(self, model: str) -> ModelCard:
        return fake_card(FakeSettings(max_model_len=self.context.get(model, 4096)), model)


def rules(text: str) -> Rules:
    models = tuple(
        ServedModel(name=name, aliases=(f"{name}-alias",), price={"input": price, "output": price})
        for name, price in PRICES.items()
    )
    config = GatewayConfig(models=models, database_url="sqlite://")
    return compiler(config)(7, document.parse(text))


def select(text: str, size: Size = EASY, fleet: Fleet | None = None, scale: float = 1.0) -> Selection:
    compiled = rules(text)
    group = compiled.resolve("auto")
    assert isinstance(group, ModelGroup)
    return select_from(group, compiled, fleet or Fleet(), size, scale)


RIGHT_SIZE = "groups: {auto: {models: [small, middle, large], right_size: {%s}}}"
PLAIN = "groups: {auto: {models: [middle, small]}}"


def test_a_model_is_followed_by_its_fallbacks() -> None:
    compiled = rules("fallbacks: {small: [large, middle]}")
    served = compiled.resolve("small-alias")
    assert isinstance(served, ServedModel)
    assert select_model(served.name, compiled).models == ("small", "large", "middle")


def test_names_are_resolved_through_the_documents_aliases() -> None:
    compiled = rules(PLAIN + "\naliases: {fast: auto, best: large}")
    assert compiled.resolve("fast") is compiled.groups["auto"]
    assert compiled.resolve("best") is compiled.served["large"]
    assert set(compiled.names()) == {*PRICES, *(f"{name}-alias" for name in PRICES), "auto", "fast", "best"}
    with pytest.raises(ModelNotFound, match="nobody"):
        compiled.resolve("nobody")


def test_a_plain_group_answers_with_its_first_ready_model() -> None:
    assert select(PLAIN).models == ("middle", "small")
    assert select(PLAIN, fleet=Fleet(absent={"middle"})).models == ("small",)
    assert select(PLAIN, fleet=Fleet(absent={"middle", "small"})).models == ("middle", "small")


def test_right_size_sends_what_is_easy_to_small_models_and_what_is_hard_to_large_ones() -> None:
    text = RIGHT_SIZE % "quality_floor: 0.9"
    easy, hard = select(text), select(text, HARD)
    assert easy.models[0] == "small"
    assert hard.models[0] == "large"
    assert easy.choice is not None
    assert "untrained" in easy.choice.reason
    assert sorted(easy.models) == sorted(PRICES)


@pytest.mark.parametrize(("weight", "first"), [(0.0, "large"), (1e6, "small")])
def test_cost_weight_sets_the_trade(weight: float, first: str) -> None:
    assert select(RIGHT_SIZE % f"cost_weight: {weight}", HARD).models[0] == first


def test_a_model_that_is_not_ready_or_too_short_is_skipped_and_named() -> None:
    fleet = Fleet(absent={"small"}, context={"middle": 16})
    chosen = select(RIGHT_SIZE % "cost_weight: 1000000", fleet=fleet)
    assert chosen.models == ("large",)
    assert chosen.choice is not None
    assert chosen.choice.skipped == ("small", "middle")


def test_prices_of_the_document_replace_those_of_the_fleet() -> None:
    text = RIGHT_SIZE % "cost_weight: 1000000" + "\nmodels: {large: {price: {input: 0, output: 0}}}"
    assert select(text).models[0] == "large"


def test_a_cascade_begins_small_and_ends_strong() -> None:
    cascade = "cascade: {small: small, strong: large, min_mean_logprob: -0.5}"
    plain = select(f"groups: {{auto: {{models: [middle, large, small], {cascade}}}}}")
    assert plain.models == ("small", "large", "middle")
    assert plain.cascade is not None
    sized = RIGHT_SIZE.replace("%s}", f"quality_floor: 0.9}}, {cascade}")
    assert select(sized).cascade is not None
    assert select(sized, HARD).cascade is None


def test_a_broken_promise_leaves_the_strong_model() -> None:
    text = (
        "groups: {auto: {models: [small, middle, large], right_size: {cost_weight: 1000000}, "
        "guarantee: {strong: large}}}"
    )
    kept: Any = select(text).choice
    broken: Any = select(text, scale=0.0).choice
    assert (kept.model, broken.model) == ("small", "large")
    assert "guarantee" in broken.reason


SESSION = "groups: {auto: {models: [small, middle], session: {keep_model: true}}}"


@pytest.mark.parametrize(
    ("began", "fleet", "models", "session"),
    [
        (None, Fleet(), ("small", "middle"), "begins"),
        ("middle", Fleet(), ("middle", "small"), "stays with 'middle'"),
        ("middle", Fleet(absent={"middle"}), ("small",), "began with 'middle', which has no ready replica"),
        ("middle", Fleet(context={"middle": 8}), ("small",), "began with 'middle', whose context this does not fit"),
        ("large", Fleet(), ("small", "middle"), "began with 'large', which is no longer in the group"),
    ],
)
def test_a_conversation_keeps_its_model_while_that_can_answer(
    began: str | None, fleet: Fleet, models: tuple[str, ...], session: str
) -> None:
    kept = keep(select(SESSION, fleet=fleet), began, fleet, EASY)
    assert (kept.models, kept.session) == (models, session)


def test_a_kept_model_is_the_choice_with_its_reason_and_has_no_cascade() -> None:
    text = RIGHT_SIZE % "cost_weight: 1"
    chosen = select(text)
    assert chosen.choice is not None
    other = next(name for name in PRICES if name != chosen.choice.model)
    kept = keep(chosen, other, Fleet(), EASY)
    assert kept.choice is not None
    assert (kept.choice.model, kept.choice.chosen.model) == (other, other)
    assert f"a new one would get {chosen.choice.model!r}" in kept.choice.reason
    assert set(kept.models) == set(PRICES)
    assert kept.models[0] == other
    cascade = "groups: {auto: {models: [small, large], cascade: {small: small, strong: large, min_mean_logprob: -1}}}"
    assert select(cascade).cascade is not None
    assert keep(select(cascade), "small", Fleet(), EASY).cascade is None
    assert keep(select(cascade), None, Fleet(), EASY).cascade is not None


def test_only_a_group_that_asks_for_it_keeps_models() -> None:
    for text, keep_s in ((PLAIN, None), (SESSION, 900.0), (SESSION.replace("true", "false"), None)):
        group = rules(text).resolve("auto")
        assert isinstance(group, ModelGroup)
        assert group.keep_s == keep_s
