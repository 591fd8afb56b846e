"""Quality guarantee: watch how often routed-down answers agree with the strong model's, and move towards safety.

Agreement x in 0..1 is sampled by a coin that does not look at the answer. Its mean is bounded by the predictable
plug-in empirical-Bernstein confidence sequence of Waudby-Smith & Ramdas, "Estimating means of bounded random variables
by betting" (JRSS B 2024, arXiv 2010.09686, theorem 2): with mu and s2 the running mean and variance, smoothed by one
observation of 1/2 and 1/4,

    l_t   = min(1/2, sqrt(2 log(1/a) / (s2_(t-1) t log(1+t))))          the bet, known before x_t
    bound = sum(l x)/sum(l) +- (log(1/a) + sum(4 (x - mu_(t-1))^2 psi(l)))/sum(l),   psi(l) = (-log(1-l) - l)/4

Each side holds at all times at once with probability 1 - a, so looking after every sample is allowed. When the upper
bound falls below the promise, the promise is being broken: `scale` (see `Trade.towards_quality`) is halved, and a new
sequence begins for the new setting. Sequence k is given a_k = a / (k (k+1)), and these sum to a: over a whole life the
probability that a kept promise ever moves anything is at most a.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

from replicas.protocol import ConfigError

LEAST_SCALE = 1 / 64  # below it the strong model answers everything
LARGEST_BET = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """agreement: the mean that is promised. error: of ever acting on a promise that is kept, over the whole life.

    share: of routed-down requests that also run on the strong model. budget: USD per window for those runs.
    """

    strong: str
    agreement: float = 0.9
    error: float = 0.05
    share: float = 0.05
    budget: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("agreement", self.agreement), ("share", self.share)):
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} must be between 0 and 1, got {value!r}")
        if not 0 < self.error < 1:
            raise ConfigError(f"error must lie between 0 and 1, got {self.error!r}")
        if not 0 <= self.budget < math.inf:
            raise ConfigError(f"budget must be a finite number of USD of at least 0, got {self.budget!r}")


@dataclass(frozen=True, slots=True)
class Bound:
    """One confidence sequence as six running sums. `low` and `high` each hold at all times with 1 - error."""

    error: float
    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    bets: float = 0.0
    won: float = 0.0
    variance: float = 0.0

    @property
    def mean(self) -> float:
        return (0.5 + self.total) / (self.count + 1)

    def observe(self, value: float) -> Bound:
        if not 0 <= value <= 1:
            raise ConfigError(f"agreement must be between 0 and 1, got {value!r}")
        step = self.count + 1
        spread = (0.25 + self.squares) / step
        bet = min(LARGEST_BET, math.sqrt(2 * math.log(1 / self.error) / (spread * step * math.log(1 + step))))
        psi = (-math.log1p(-bet) - bet) / 4
        mean_after = (0.5 + self.total + value) / (step + 1)
        return Bound(
            error=self.error,
            count=step,
            total=self.total + value,
            squares=self.squares + (value - mean_after) ** 2,
            bets=self.bets + bet,
            won=self.won + bet * value,
            variance=self.variance + 4 * (value - self.mean) ** 2 * psi,
        )

    @property
    def low(self) -> float:
        return max(0.0, self._centre - self._width) if self.count else 0.0

    @property
    def high(self) -> float:
        return min(1.0, self._centre + self._width) if self.count else 1.0

    @property
    def _centre(self) -> float:
        return self.won / self.bets

    @property
    def _width(self) -> float:
        return (math.log(1 / self.error) + self.variance) / self.bets


@dataclass(frozen=True, slots=True)
class Guard:
    """What the guarantee has come to. scale: 1 as configured .. 0 the strong model always. moves: how often it did."""

    bound: Bound
    scale: float = 1.0
    moves: int = 0
    spent: float = 0.0

    @classmethod
    def begin(cls, promise: Promise) -> Guard:
        return cls(Bound(promise.error / 2))

    def verdict(self, promise: Promise) -> str:
        """'kept' (proven), 'broken' (proven, only in the instant before it moves) or 'open'."""
        if self.bound.low >= promise.agreement and self.bound.count:
            return "kept"
        return "broken" if self.bound.high < promise.agreement else "open"

    def next_window(self) -> Guard:
        """A new budget window: what was spent is forgotten, what was learnt is not."""
        return replace(self, spent=0.0)


def shadows(guard: Guard, promise: Promise, *, chosen: str, strong_cost: float, rng: random.Random) -> bool:
    """Whether this routed-down request shall also run on the strong model, within what is left of the budget.

    The coin never sees the answer. Where the last of a budget no longer pays for a dear prompt, dear prompts are
    sampled less: give a budget that lasts.
    """
    heads = rng.random() < promise.share
    return heads and chosen != promise.strong and guard.spent + strong_cost <= promise.budget


def observe(guard: Guard, promise: Promise, agreement: float, cost: float) -> Guard:
    """Settle one shadow run: count its cost, tighten the bound, and move towards safety where the promise is broken."""
    seen = Guard(guard.bound.observe(agreement), guard.scale, guard.moves, guard.spent + cost)
    if seen.bound.high >= promise.agreement or guard.scale == 0:
        return seen
    moves = guard.moves + 1
    scale = guard.scale / 2 if guard.scale / 2 >= LEAST_SCALE else 0.0
    return replace(seen, bound=Bound(promise.error / ((moves + 1) * (moves + 2))), scale=scale, moves=moves)
