"""Which models a request is given to, in which order, and why: names and groups of a generation made concrete."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from gateway.config import ServedModel
from gateway.fleet import Fleet
from gateway.rules import ModelGroup, Rules
from policies.rightsize.cascade import Cascade
from policies.rightsize.choose import ModelChoice, PricedModel, RightSizeRequest, RightSizeView, right_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """`models`: the first answers, the others are tried in turn while nothing was answered. Never empty.

    cascade: the first model answers provisionally; `choice`: the reasoning, where there was a choice to make.
    """

    models: tuple[str, ...]
    group: ModelGroup | None = None
    choice: ModelChoice | None = None
    cascade: Cascade | None = None


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


def select_model(served: ServedModel, rules: Rules) -> Selection:
    return Selection(models=(served.name, *rules.fallbacks(served.name)))


def select_from(
    group: ModelGroup, rules: Rules, fleet: Fleet, size: Size, safety_scale: float, able: Collection[str] | None = None
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


def _fits(fleet: Fleet, model: PricedModel, size: Size) -> bool:
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
