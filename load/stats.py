"""Statistics of latencies: percentiles with intervals that hold for any distribution, warm-up, rates, ratios.

Percentiles are numpy's (linear between order statistics). Their intervals are the distribution-free ones from two order
statistics (Hahn & Meeker, Statistical Intervals, 1991, 5.2): the number of observations below the p-quantile is
binomial. Latencies of one run depend on each other (a queue remembers), which would make such an interval too narrow.
So the binomial is that of an effective sample size: the count divided by how much the variance of batch means of "is
below the percentile" exceeds that of independent draws (Law & Kelton, Simulation Modeling and Analysis, 9.5.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
_Z = 1.959963984540054  # of a normal distribution, two-sided 95 %


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % interval; low and high are NaN where the data do not bound it."""

    value: float
    low: float = math.nan
    high: float = math.nan

    @property
    def bounded(self) -> bool:
        return not (math.isnan(self.low) or math.isnan(self.high))

    def as_json(self) -> dict[str, float | None]:
        parts = {"value": self.value, "low": self.low, "high": self.high}
        return {name: None if math.isnan(part) else part for name, part in parts.items()}

    @staticmethod
    def from_json(parts: dict[str, float | None]) -> Estimate:
        numbers = (math.nan if parts[name] is None else parts[name] for name in ("value", "low", "high"))
        return Estimate(*(float(number) for number in numbers))  # type: ignore[arg-type]


def percentile(samples: Sequence[float] | Floats, rank: float) -> Estimate:
    """The rank-th percentile (0-100) of samples *in the order they were taken*, with its 95 % interval.

    With too few samples beyond the percentile to bound it, that side is NaN: a p99 of 50 requests has no upper bound.
    """
    taken = np.asarray(samples, dtype=np.float64)
    if taken.size == 0:
        return Estimate(math.nan)
    share = rank / 100
    value = float(np.percentile(taken, rank))
    if not 0 < share < 1:
        return Estimate(value)
    effective = taken.size / _dependence(taken <= value, share)
    low, high = _binomial_ranks(max(int(effective), 1), share)
    in_order = np.sort(taken)
    # between the last two of few samples, interpolation can leave the interval: max and min keep a NaN in first place
    return Estimate(value, min(_at(in_order, low), value), max(_at(in_order, high), value))


def _at(in_order: Floats, share: float) -> float:
    """The order statistic at a share of the sample, 1-based and rounded outward by the caller; NaN outside."""
    position = math.ceil(share * in_order.size - 1e-9) - 1
    return float(in_order[position]) if 0 <= position < in_order.size and share <= 1 else math.nan


def _binomial_ranks(count: int, share: float) -> tuple[float, float]:
    """Shares of the sample (order statistic / count) between which the quantile lies with at least 95 %."""
    log_choose = _log_binomial(count, share)
    cumulative = np.cumsum(np.exp(log_choose))
    tail = (1 - CONFIDENCE) / 2
    low = int(np.searchsorted(cumulative, tail, side="right"))  # largest l with P(B < l) <= tail
    high = int(np.searchsorted(cumulative, 1 - tail - 1e-12, side="left")) + 1  # smallest u with P(B >= u) <= tail
    return (low / count if low >= 1 else -1.0), (high / count if high <= count else 2.0)


def _log_binomial(count: int, share: float) -> Floats:
    """log P(B = k), k = 0…count, by the ratio of neighbours."""
    k = np.arange(1, count + 1, dtype=np.float64)
    steps = np.log((count - k + 1) / k) + math.log(share / (1 - share))
    return np.concatenate(([0.0], np.cumsum(steps))) + count * math.log1p(-share)


def _dependence(below: NDArray[np.bool_], share: float) -> float:
    """By what factor dependence inflates the variance of the mean of `below`; at least 1."""
    batches = min(30, below.size // 5)
    if batches < 8:
        return 1.0
    size = below.size // batches
    means = below[: batches * size].reshape(batches, size).mean(axis=1)
    inflation = float(means.var(ddof=1)) * size / (share * (1 - share))
    # the variance of independent batches scatters by sqrt(2 / (b - 1)): only what exceeds that is dependence
    return inflation if inflation > 1 + 1.64 * math.sqrt(2 / (batches - 1)) else 1.0


def mean(samples: Sequence[float] | Floats) -> Estimate:
    """The mean with a batch-means interval: samples in the order they were taken."""
    taken = np.asarray(samples, dtype=np.float64)
    if taken.size < 2:
        return Estimate(float(taken[0]) if taken.size else math.nan)
    batches = min(20, taken.size)
    size = taken.size // batches
    means = taken[: batches * size].reshape(batches, size).mean(axis=1)
    half = _t95(batches - 1) * float(means.std(ddof=1)) / math.sqrt(batches)
    value = float(taken.mean())
    return Estimate(value, value - half, value + half)


def rate(moments: Floats, begin: float, end: float, weights: Floats | None = None) -> Estimate:
    """Events (or their weights) a second in [begin, end), with an interval from up to 20 equal slices of the time."""
    span = end - begin
    if span <= 0:
        return Estimate(math.nan)
    slices = int(min(20, max(1, moments.size // 5)))
    counts, _ = np.histogram(moments, bins=slices, range=(begin, end), weights=weights)
    value = float(counts.sum()) / span
    if slices < 4:
        return Estimate(value)
    half = _t95(slices - 1) * float(counts.std(ddof=1)) / math.sqrt(slices) / (span / slices)
    return Estimate(value, max(0.0, value - half), value + half)


def share(hits: int, count: int) -> Estimate:
    """A proportion with Wilson's interval (JASA 22, 1927)."""
    if count == 0:
        return Estimate(math.nan)
    found = hits / count
    centre = (found + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(found * (1 - found) / count + _Z**2 / (4 * count**2))
    return Estimate(found, min(found, max(0.0, centre - half)), max(found, min(1.0, centre + half)))


def ratio(above: Estimate, below: Estimate) -> Estimate:
    """above / below of two independent positive figures, with an interval from theirs.

    MOVER on the logarithms (Zou & Donner, Statistics in Medicine 27, 2008): needs only the two intervals, so files of
    different runs can be compared without their raw data.
    """
    if not (above.value > 0 and below.value > 0):
        return Estimate(math.nan)
    value = above.value / below.value
    if not (above.bounded and below.bounded and above.low > 0 and below.low > 0):
        return Estimate(value)
    down = math.hypot(math.log(above.value / above.low), math.log(below.high / below.value))
    up = math.hypot(math.log(above.high / above.value), math.log(below.value / below.low))
    return Estimate(value, value * math.exp(-down), value * math.exp(up))


def warmup_count(samples: Sequence[float] | Floats) -> int | None:
    """How many first samples to leave out by MSER-5; None where the first half never settles.

    MSER-5 (White, Cobb & Spratt, Winter Simulation Conference 2000): of means of 5, leave out as many first ones as
    minimise the squared standard error of the mean of the rest. Only the first half is tried; a best cut at its very
    end means that the run is too short to tell.
    """
    taken = np.asarray(samples, dtype=np.float64)
    groups = taken.size // 5
    if groups < 10:
        return 0  # too few to tell
    means = taken[: groups * 5].reshape(groups, 5).mean(axis=1)
    tail_sum = np.cumsum(means[::-1])[::-1]
    tail_square = np.cumsum(means[::-1] ** 2)[::-1]
    left = np.arange(groups, 0, -1, dtype=np.float64)
    error = np.maximum(tail_square - tail_sum**2 / left, 0.0) / left**2
    error = error[: groups // 2 + 1]
    if error[0] <= 1e-18 + error.min():
        return 0
    best = int(np.argmin(error))
    return best * 5 if best < groups // 2 else None


_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
        2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def _t95(freedom: int) -> float:
    """Student's t, two-sided 95 %, for 1-20 degrees of freedom; the normal's beyond."""
    return _T95[freedom - 1] if freedom <= len(_T95) else _Z
