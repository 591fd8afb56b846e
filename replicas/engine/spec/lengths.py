"""How many guesses each sequence brings into a step: as many as make tokens come fastest."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

HIGHEST = 0.98  # no guess is surer than that


def margin(sequences: int) -> float:
    """Gains smaller than this are not worth it.

    Measured figures are a little wrong. And where several sequences share a step, those that no guess is right for wait
    for the others' longer one: a few that end sooner leave the rest to steps that are hardly cheaper.
    """
    return 1.05 if sequences == 1 else 1.15


def can_pay(sequences: int, cost: NDArray[np.float64]) -> bool:
    """Whether guesses of `sequences` would, were they all as sure as any: else nobody needs to be asked for them."""
    speed = (sequences + HIGHEST * np.arange(len(cost))) / cost
    return bool(speed.max() >= margin(sequences) * speed[0])


def choose_lengths(probabilities: Seq[Seq[float]], cost: NDArray[np.float64], trust: float = 1.0) -> list[int]:
    """probabilities[i][j]: that guess j of sequence i is right if those before it are. cost[r]: of r guesses' step.

    A sequence brings one token by itself, and guess j another with the product of the probabilities up to j. Products
    fall with j, so taking guesses in falling order takes them from the front of each sequence; the best number of them
    is the one with the most expected tokens per cost. Cost need not be convex. trust: what such tokens are worth, as a
    share of what they claim.
    """
    owners: list[int] = []
    gains: list[float] = []
    for i, row in enumerate(probabilities):
        chance = 1.0
        for probability in row:
            chance *= probability
            owners.append(i)
            gains.append(trust * chance)
    lengths = [0] * len(probabilities)
    if not gains:
        return lengths
    order = np.argsort(-np.array(gains), kind="stable")[: len(cost) - 1]
    tokens = len(probabilities) + np.concatenate(([0.0], np.array(gains)[order].cumsum()))
    speed = tokens / cost[: len(tokens)]
    best = int(speed.argmax())
    if speed[best] >= margin(len(probabilities)) * speed[0]:
        for at in order[:best]:
            lengths[owners[at]] += 1
    return lengths


def choose_depth(usual: Seq[Seq[float]], others: int, cost: NDArray[np.float64], asking: NDArray[np.float64]) -> int:
    """How deep to ask a proposer, 0: not at all.

    usual[i][j]: what guess j of sequence i is usually worth; `others` sequences take part in the step without guesses.
    asking[d]: cost of asking for d guesses of all sequences.
    """
    asked = len(usual)
    if not asked:
        return 0
    chances = np.cumprod(np.array(usual), axis=1).sum(axis=0)
    tokens = asked + others + np.concatenate(([0.0], chances.cumsum()))
    rows = np.minimum(np.arange(len(tokens)) * asked, len(cost) - 1)
    speed = tokens / (cost[rows] + asking[: len(tokens)])
    best = int(speed.argmax())
    return best if speed[best] >= margin(asked + others) * speed[0] else 0
