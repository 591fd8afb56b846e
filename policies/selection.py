"""Which models a request is given to, in which order, and why: names and groups of a generation made concrete."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from policies import prices
from policies.budget import PICO, Price
from policies.document import Group, PolicyDocument, Prices
from policies.rightsize.cascade import Cascade
from policies.rightsize.choose import (
    ModelChoice,
    Predicts,
    PricedModel,
    RightSizeRequest,
    RightSizeView,
    Trade,
    right_size,
)
from policies.rightsize.guarantee import Promise


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGroup:
    """Several models under one name. Without `trade` the first of them that has a ready replica answers.

    keep_s: a conversation that pauses no longer stays with the model that it began with.
    """

    name: str
    models: tuple[PricedModel, ...]
    trade: Trade | None = None
    predictor: Predicts | None = None
    expected_output_tokens: float = 0.0
    cascade: Cascade | None = None
    promise: Promise | None = None
    keep_s: float | None = None


class Present(Protocol):
    """What a selection must know of the fleet."""

    def ready(self, model: str) -> int:
        """How many of the model's replicas take work now."""
        ...

    def card(self, model: str) -> Card | None: ...


class Card(Protocol):
    @property
    def max_model_len(self) -> int: ...


class Fallbacks(Protocol):
    def fallbacks(self, model: str) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """`models`: the first answers, the others are tried in turn while nothing was answered. Never empty.

    cascade: the first model answers provisionally; `choice`: the reasoning, where there was a choice to make.
    session: what came of the model that the conversation began with, where the group keeps it.
    """

    models: tuple[str, ...]
    group: ModelGroup | None = None
    choice: ModelChoice | None = None
    cascade: Cascade | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a choice of model may know of a request. prompt_tokens: of all prompts together, as the first
    candidate counts them; longest_prompt: of the longest of several, which must fit into a context.
    """

    text: str
    prompt_tokens: int
    max_tokens: int | None
    longest_prompt: int = 0

    @property
    def longest(self) -> int:
        return self.longest_prompt or self.prompt_tokens


def price_of(model: str, stated: Mapping[str, float], document: PolicyDocument) -> Price:
    """What the fleet file states, key by key overruled by the document."""
    rules = document.models.get(model)
    own = (rules.price if rules else Prices()).model_dump(exclude_none=True)
    return prices.from_fleet({**stated, **own})


def group_of(
    name: str, group: Group, document: PolicyDocument, priced: Mapping[str, Price], predictor: Predicts | None
) -> ModelGroup:
    """A group of the document made concrete."""
    settings = group.right_size
    return ModelGroup(
        name=name,
        models=tuple(_priced_model(model, document, priced[model]) for model in group.models),
        trade=settings.trade if settings else None,
        predictor=predictor,
        expected_output_tokens=settings.expected_output_tokens if settings else 0.0,
        cascade=group.cascade.rule if group.cascade else None,
        promise=group.guarantee.promise if group.guarantee else None,
        keep_s=group.session.idle_s if group.session and group.session.keep_model else None,
    )


def _priced_model(name: str, document: PolicyDocument, price: Price) -> PricedModel:
    rules = document.models.get(name)
    per_million = 10**6 / PICO
    return PricedModel(
        name=name,
        input_price=price.input * per_million,
        output_price=price.output * per_million,
        strength=rules.strength if rules else None,
    )


def select_model(name: str, rules: Fallbacks) -> Selection:
    return Selection(models=(name, *rules.fallbacks(name)))


def select_from(
    group: ModelGroup,
    rules: Fallbacks,
    fleet: Present,
    size: Size,
    safety_scale: float,
    able: Collection[str] | None = None,
) -> Selection:
    """One of a group's models for a request of that size.

    Models without a ready replica and those whose context the request does not fit are left out, unless that leaves
    nothing: then the caller gets the error of the model that would have been chosen. `able`: the only models that can
    answer a request of this kind, at least one of the group's.
    """
    able_models = [model for model in group.models if able is None or model.name in able]
    usable = [model for model in able_models if fleet.ready(model.name)] or able_models
    usable = [model for model in usable if _fits(fleet, model, size)] or usable
    choice = None
    if group.trade is not None:
        view = RightSizeView(
            models=usable,
            trade=group.trade,
            predictor=group.predictor,
            expected_output_tokens=group.expected_output_tokens,
            safety_scale=safety_scale,
            strong=group.promise.strong if group.promise else None,
        )
        asked = RightSizeRequest(text=size.text, prompt_tokens=size.prompt_tokens, max_tokens=size.max_tokens)
        choice = right_size(asked, view)
        left_out = [model.name for model in group.models if model not in usable]
        choice = replace(choice, skipped=(*choice.skipped, *left_out))
        order = [choice.model, *_next_best(choice)]
    else:
        order = [model.name for model in usable]
    cascade = group.cascade
    if cascade is not None and not {cascade.small, cascade.strong} <= {model.name for model in usable}:
        cascade = None  # one of the two cannot answer this request now
    if cascade is not None and group.trade is None:
        order = [cascade.small, *(name for name in order if name != cascade.small)]
    if cascade is not None and order[0] == cascade.small:
        order = [cascade.small, cascade.strong, *(name for name in order[1:] if name != cascade.strong)]
    else:
        cascade = None
    models = tuple(dict.fromkeys((*order, *rules.fallbacks(order[0]))))
    return Selection(models=models, group=group, choice=choice, cascade=cascade)


def keep(selection: Selection, began: str | None, fleet: Present, size: Size) -> Selection:
    """The selection for a conversation that began with that model (None: that begins now): the model goes first if it
    can answer, and then there is no cascade. Where it cannot, the selection stands, for this turn.
    """
    group = selection.group
    assert group is not None, "only a group keeps models"
    if began is None:
        return replace(selection, session="begins")
    why_not = _cannot_stay(began, group, selection, fleet, size)
    if why_not:
        return replace(selection, session=f"began with {began!r}, {why_not}")
    choice = selection.choice
    if choice is not None and choice.model != began:
        reason = f"the conversation began with it; a new one would get {choice.model!r}: {choice.reason}"
        choice = replace(choice, model=began, reason=reason)
    models = (began, *(name for name in selection.models if name != began))
    return replace(selection, models=models, choice=choice, cascade=None, session=f"stays with {began!r}")


def _cannot_stay(began: str, group: ModelGroup, selection: Selection, fleet: Present, size: Size) -> str:
    model = next((one for one in group.models if one.name == began), None)
    if model is None:
        return "which is no longer in the group"
    if not fleet.ready(began):
        return "which has no ready replica"
    if not _fits(fleet, model, size):
        return "whose context this does not fit"
    return "" if began in selection.models else "which cannot do this"


def _fits(fleet: Present, model: PricedModel, size: Size) -> bool:
    card = fleet.card(model.name)
    return card is None or not card.max_model_len or size.longest + (size.max_tokens or 1) <= card.max_model_len


def _next_best(choice: ModelChoice) -> Sequence[str]:
    """The other candidates, best first: by utility, or by quality where a floor decided."""
    ranked = [
        (-one.quality if utility is None else -utility, one.cost, one.model)
        for one, utility in zip(choice.candidates, choice.utilities, strict=True)
        if one.model != choice.model
    ]
    return [name for _, _, name in sorted(ranked)]
