"""The highest rate that meets the objectives: bracketing, bisection, and repeats at the border.

A probe is a whole run; noise can make one lie. So the border is decided by votes: the rate that is reported was met in
two of up to three probes and the next one above was missed in two of up to three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
_TRIES = 3


class SearchInterrupted(Exception):
    """A probe was interrupted; what is known so far stays in the search."""


@dataclass
class Search:
    """probe(rate) runs once and returns the run; `met(run)` is its vote.

    found: highest confirmed rate, None while there is none. above: lowest rate known to be too high.
    """

    probe: Callable[[float], Json]
    precision: float = 0.05
    most_probes: int = 24
    votes: dict[float, list[bool]] = field(default_factory=dict)
    probes: list[Json] = field(default_factory=list)
    found: float | None = None
    above: float | None = None
    limited_by: str = ""

    def run(self, start: float) -> None:
        """Search from `start`. The bracket grows by doubling, at most 2^20 times either way."""
        low, high = self._bracket(start)
        while low is not None and high is not None and high / low > 1 + self.precision and self._left():
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self._vote(middle) else (low, middle)
        if low is None:
            self.above, self.limited_by = high, "no rate met the objectives"
            return
        self._confirm(low, high)

    def _left(self) -> bool:
        if len(self.probes) < self.most_probes:
            return True
        self.limited_by = f"{self.most_probes} probes were not enough for the precision wanted"
        return False

    def _vote(self, rate: float) -> bool:
        """One vote. A miss by a generator that was late says nothing of the server: it is tried again, twice."""
        for _ in range(_TRIES):
            run = self.probe(rate)
            vote, void = met(run), late(run)
            self.probes.append({"rate": rate, "met": vote, "void": void, "run": run["label"]})
            if run["interrupted"]:
                raise SearchInterrupted
            if not void or not self._left():
                break
        self.votes.setdefault(rate, []).append(vote)
        return vote

    def _bracket(self, start: float) -> tuple[float | None, float | None]:
        rate = start
        if self._vote(rate):
            for _ in range(20):
                if not self._left() or not self._vote(rate * 2):
                    return rate, rate * 2
                rate *= 2
            return rate, None
        for _ in range(20):
            if not self._left():
                return None, rate
            if self._vote(rate / 2):
                return rate / 2, rate
            rate /= 2
        return None, rate

    def _majority(self, rate: float) -> bool:
        """Two equal votes of up to three; as it stands when the probes are used up."""
        while True:
            votes = self.votes.setdefault(rate, [])
            if votes.count(True) >= 2 or votes.count(False) >= 2:
                break
            if not self._left():
                break
            self._vote(rate)
        return self.votes[rate].count(True) > self.votes[rate].count(False)

    def _confirm(self, low: float, high: float | None) -> None:
        """Move the border until both of its sides are confirmed."""
        step = 1 + self.precision
        while self._left():
            if not self._majority(low):
                high, low = (
                    low,
                    max((rate for rate in self.votes if rate < low and self._may(rate)), default=low / step),
                )
            elif high is not None and self._majority(high):
                low, high = high, min((rate for rate in self.votes if rate > high), default=high * step)
            else:
                break
        self.found = low if self.votes.get(low, [False]).count(True) else None
        self.above = high
        if not self.limited_by:
            own = [one["void"] for one in self.probes if one["rate"] == high and not one["met"]]
            self.limited_by = "the generator: the server may do better" if own and own[-1] else "the objectives"

    def _may(self, rate: float) -> bool:
        return self.votes[rate].count(True) >= self.votes[rate].count(False)


def met(run: Json) -> bool:
    """Whether a probe meets all its objectives without failures; a generator's lag only makes that harder.

    Rejects are no failures here; bound them with error_rate.
    """
    slo = run["slo"]
    return bool(slo and slo["met"] and run["counts"]["all"]["failed"] == 0)


def late(run: Json) -> bool:
    """Whether a probe missed while its generator could not keep up."""
    return not met(run) and not run["generator"]["kept_up"]
