"""Try the small model, look at its own confidence, escalate: the pure part.

Confidence is the mean log-probability of the answer's tokens. Both models are paid for where it escalates. The gateway
runs the small model without showing its text, asks `escalates`, and sends either that text or the strong model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from replicas.protocol import ConfigError

FEWEST_ANSWERS = 30


@dataclass(frozen=True, slots=True)
class Cascade:
    """`threshold` is the least mean log-probability at which the small model's answer is kept."""

    small: str
    strong: str
    threshold: float


@dataclass(frozen=True, slots=True)
class Answered:
    """One calibration prompt: the small model's confidence, both scores (0..1), both costs (USD)."""

    confidence: float
    small_quality: float
    strong_quality: float
    small_cost: float
    strong_cost: float


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A threshold and what it brought on the calibration answers: means per request, share that escalated."""

    threshold: float
    quality: float
    cost: float
    escalated: float


def confidence(logprobs: Sequence[float]) -> float:
    """Mean log-probability of the answer's tokens; -inf for an empty answer or one with a value that is no number."""
    if not logprobs or any(math.isnan(value) for value in logprobs):
        return -math.inf
    return math.fsum(logprobs) / len(logprobs)


def escalates(cascade: Cascade, logprobs: Sequence[float]) -> bool:
    return confidence(logprobs) < cascade.threshold


def cost(small_cost: float, strong_cost: float, *, escalated: bool) -> float:
    """USD of one request: an escalated one has paid for both."""
    return small_cost + (strong_cost if escalated else 0.0)


def sweep(answers: Sequence[Answered]) -> list[Calibrated]:
    """Every threshold that makes a difference, from never escalating (-inf) to always (+inf)."""
    if len(answers) < FEWEST_ANSWERS:
        raise ConfigError(f"a cascade needs {FEWEST_ANSWERS} calibration answers at least, got {len(answers)}")
    table = np.array([(a.confidence, a.small_quality, a.strong_quality, a.small_cost, a.strong_cost) for a in answers])
    table = table[np.argsort(table[:, 0], kind="stable")]
    confident, small, strong, small_cost, strong_cost = table.T
    count = len(table)
    # Position k: the k least confident escalate.
    quality = (np.append(0, np.cumsum(strong)) + small.sum() - np.append(0, np.cumsum(small))) / count
    spent = (small_cost.sum() + np.append(0, np.cumsum(strong_cost))) / count
    # Answers of equal confidence escalate together, so only the first of each group is a threshold.
    starts = np.flatnonzero(np.append(True, confident[1:] > confident[:-1]))
    thresholds = [(-math.inf, 0), *((float(confident[k]), int(k)) for k in starts if k), (math.inf, count)]
    return [Calibrated(t, float(quality[k]), float(spent[k]), k / count) for t, k in thresholds]


def calibrate(answers: Sequence[Answered], share: float) -> Calibrated:
    """The cheapest threshold that keeps `share` of the strong model's mean quality on these answers.

    Always escalating reaches any share up to 1, so there is an answer.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of quality to keep must be between 0 and 1, got {share!r}")
    wanted = share * float(np.mean([answer.strong_quality for answer in answers])) if answers else 0.0
    enough = [point for point in sweep(answers) if point.quality >= wanted - 1e-12]
    return min(enough, key=lambda point: (point.cost, -point.quality))
