"""Predicted quality and expected cost of each candidate -> one model, with the reasoning kept.

Pure. Ties are decided by cost, then by name, so neither a clock nor an rng is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from policies.rightsize.defaults import UNTRAINED, untrained_quality
from replicas.protocol import ConfigError, NoReplica


class Predicts(Protocol):
    """What a choice must have of a predictor: `policies.rightsize.predictor.Predictor` is one."""

    @property
    def models(self) -> tuple[str, ...]: ...
    @property
    def name(self) -> str: ...
    def predict(self, text: str) -> NDArray[np.float32]:
        """Quality of each of `models`, 0..1."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Trade:
    """How quality is traded against money; exactly one of the two is set.

    cost_weight: predicted quality (0..1) that one is ready to lose to save one USD per thousand such requests; 0 buys
    the best. quality_floor: the cheapest model whose predicted quality reaches it, or the best where none does.
    """

    cost_weight: float | None = None
    quality_floor: float | None = None

    def __post_init__(self) -> None:
        if (self.cost_weight is None) == (self.quality_floor is None):
            raise ConfigError("right-size needs exactly one of cost_weight and quality_floor")
        if self.cost_weight is not None and not 0 <= self.cost_weight < math.inf:
            raise ConfigError(f"cost_weight must be a finite number of at least 0, got {self.cost_weight!r}")
        if self.quality_floor is not None and not 0 <= self.quality_floor <= 1:
            raise ConfigError(f"quality_floor must be between 0 and 1, got {self.quality_floor!r}")

    def towards_quality(self, scale: float) -> Trade:
        """The same trade made safer: scale 1 changes nothing, 0 leaves no weight to cost."""
        if self.cost_weight is not None:
            return Trade(cost_weight=self.cost_weight * scale)
        assert self.quality_floor is not None, "one of the two is set"
        return Trade(quality_floor=1 - (1 - self.quality_floor) * scale)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model as one request sees it. cost: expected USD of the request."""

    model: str
    quality: float
    cost: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelChoice:
    """The chosen model and why: every candidate with its utility (None under a quality floor), in the order given.

    source: the predictor's name, or UNTRAINED. reason: one sentence. skipped: models that the predictor does not know.
    """

    model: str
    candidates: tuple[Candidate, ...]
    utilities: tuple[float | None, ...]
    trade: Trade
    reason: str
    source: str = ""
    skipped: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate:
        return next(candidate for candidate in self.candidates if candidate.model == self.model)


def choose(candidates: Sequence[Candidate], trade: Trade) -> ModelChoice:
    """Highest utility (quality - cost_weight x 1000 x cost), or the cheapest at or above the floor.

    Ties go to the cheaper, then the first by name. The expected cost of the choice never rises with cost_weight: near
    ties, where rounding could turn the order around, are compared exactly. Raises NoReplica without candidates.
    """
    if not candidates:
        raise NoReplica("no model to choose from")
    for candidate in candidates:
        if not (0 <= candidate.cost < math.inf and math.isfinite(candidate.quality)):
            raise ConfigError(f"model {candidate.model!r} has no usable cost or predicted quality")
    if trade.cost_weight is not None:
        utilities = tuple(one.quality - trade.cost_weight * 1000 * one.cost for one in candidates)
        best = _best_utility(candidates, utilities, trade.cost_weight)
        reason = f"highest utility at cost_weight {trade.cost_weight:g}"
        return ModelChoice(
            model=best.model, candidates=tuple(candidates), utilities=utilities, trade=trade, reason=reason
        )
    assert trade.quality_floor is not None, "one of the two is set"
    reaching = [one for one in candidates if one.quality >= trade.quality_floor]
    if reaching:
        best = min(reaching, key=lambda one: (one.cost, -one.quality, one.model))
        reason = f"cheapest with predicted quality of at least {trade.quality_floor:g}"
    else:
        best = min(candidates, key=lambda one: (-one.quality, one.cost, one.model))
        reason = f"no model is predicted to reach {trade.quality_floor:g}; the best there is"
    return ModelChoice(
        model=best.model, candidates=tuple(candidates), utilities=(None,) * len(candidates), trade=trade, reason=reason
    )


def _best_utility(candidates: Sequence[Candidate], utilities: Sequence[float], weight: float) -> Candidate:
    largest = max(abs(one.quality) + weight * 1000 * one.cost for one in candidates)
    near = max(utilities) - 1e-12 * largest
    tied = [one for one, utility in zip(candidates, utilities, strict=True) if not utility < near]
    if len(tied) == 1:
        return tied[0]
    price = 1000 * Fraction(weight)
    return min(tied, key=lambda one: (price * Fraction(one.cost) - Fraction(one.quality), one.cost, one.model))


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedModel:
    """One candidate of a model group. Prices in USD per million tokens.

    strength: what the operator declares of it (0..1), used only while nothing is trained; by default the order of
    prices stands in for it.
    """

    name: str
    input_price: float
    output_price: float
    strength: float | None = None

    def cost(self, prompt_tokens: int, output_tokens: float) -> float:
        """USD of a request of that size."""
        return (self.input_price * prompt_tokens + self.output_price * output_tokens) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class RightSizeRequest:
    """text: what the user asks (the last user message); the counts are of the whole prompt as the models see it."""

    text: str
    prompt_tokens: int
    max_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class RightSizeView:
    """All that a choice depends on beside the request.

    expected_output_tokens: mean length of answers, used where max_tokens does not cap it lower. safety_scale: what the
    quality guarantee has come to (1 where there is none); at 0 the strong model always answers.
    """

    models: Sequence[PricedModel]
    trade: Trade
    predictor: Predicts | None = None
    expected_output_tokens: float = 256.0
    safety_scale: float = 1.0
    strong: str | None = None


def right_size(request: RightSizeRequest, view: RightSizeView) -> ModelChoice:
    """Choose a model for one request. Raises NoReplica when the view has no model.

    A model that the predictor was not trained on is skipped (and named in the choice); where it knows none of them, the
    untrained default decides, and the choice says so.
    """
    output = view.expected_output_tokens
    if request.max_tokens is not None:
        output = min(output, float(request.max_tokens))
    known = set(view.predictor.models) if view.predictor else set()
    models = [model for model in view.models if model.name in known] or list(view.models)
    if view.predictor is not None and models and models[0].name in known:
        predicted = dict(zip(view.predictor.models, view.predictor.predict(request.text).tolist(), strict=True))
        quality, source = predicted, view.predictor.name
    else:
        ranked = [(model.name, model.input_price + model.output_price, model.strength) for model in models]
        quality, source = untrained_quality(request.text, ranked), UNTRAINED
    trade = view.trade.towards_quality(view.safety_scale)
    candidates = [Candidate(m.name, quality[m.name], m.cost(request.prompt_tokens, output)) for m in models]
    choice = choose(candidates, trade)
    model, reason = choice.model, choice.reason
    if view.safety_scale == 0 and view.strong is not None and view.strong in quality:
        model, reason = view.strong, "the quality guarantee has fallen back to the strong model"
    if source == UNTRAINED:
        reason = f"{reason} ({UNTRAINED})"
    return ModelChoice(
        model=model,
        candidates=choice.candidates,
        utilities=choice.utilities,
        trade=trade,
        reason=reason,
        source=source,
        skipped=tuple(one.name for one in view.models if one not in models),
    )
