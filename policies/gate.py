"""Bounds on what a candidate generation may change: `cost<=+0% ttft_p95<=+10% rejects<=1%`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from policies.replay import FIGURES, Change, Replay


class GateError(ValueError):
    """A gate that cannot be read."""


@dataclass(frozen=True, slots=True)
class Bound:
    """`cost<=+5%`: a change of at most so much; `ttft_p95<=800ms`: the candidate's figure itself."""

    text: str
    name: str
    at_most: bool
    limit: float
    absolute: bool

    def holds(self, change: Change) -> bool:
        """A figure that nobody knows holds nothing."""
        value = change.after if self.absolute else change.value
        return value <= self.limit + 1e-12 if self.at_most else value >= self.limit - 1e-12


_BOUND = re.compile(r"([a-z0-9_]+)(<=|>=)(?:([+-]\d+(?:\.\d+)?)%|(\d+(?:\.\d+)?)(%|ms|s))")


def parse_gate(text: str) -> tuple[Bound, ...]:
    """Bounds with blanks between them, such as `cost<=+0% ttft_p95<=+10% rejects<=1%`. GateError says what is wrong."""
    bounds = []
    for part in text.split():
        found = _BOUND.fullmatch(part)
        if not found:
            raise GateError(
                f"{part!r} is no bound: write FIGURE<=+N% for a change, FIGURE<=N% or FIGURE<=Nms for the figure itself"
            )
        name, sign, change, value, unit = found.groups()
        figure = FIGURES.get(name)
        if figure is None:
            raise GateError(f"{part!r}: {name!r} is none of {', '.join(FIGURES)}")
        if value is not None and (unit == "%") != (figure.unit == ""):
            wanted = {"": "a share, as in 1%", "s": "a time, as in 800ms"}.get(figure.unit, "a change, as in +5%")
            raise GateError(f"{part!r}: {name} is bounded by {wanted}")
        scale = {"%": 0.01, "ms": 0.001, "s": 1.0}[unit or "%"]
        bounds.append(Bound(part, name, sign == "<=", float(change or value) * scale, change is None))
    if not bounds:
        raise GateError("the gate is empty")
    return tuple(bounds)


def violations(bounds: Sequence[Bound], found: Replay) -> list[tuple[Bound, Change]]:
    """The bounds that do not hold. Judged by the figures themselves; the intervals are for the reader."""
    pairs = [(bound, found.change(bound.name)) for bound in bounds]
    return [(bound, change) for bound, change in pairs if not bound.holds(change)]
