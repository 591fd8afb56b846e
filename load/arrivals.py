"""When requests are due: open loop by a rate that may change with time, or a trace's own times.

Every open-loop process is a renewal process of unit rate, stretched by the inverse of the rate's integral (the time
rescaling theorem: Daley & Vere-Jones, An Introduction to the Theory of Point Processes, 7.4). Constant, Poisson and
gamma differ only in their unit gaps; ramps and stages only in the integral. Closed loops have no due times: see
load.driver.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from load.units import BadOption, seconds

PROCESSES = ("constant", "poisson", "gamma")


@dataclass(frozen=True, slots=True)
class Stage:
    """`duration_s` in which the rate goes in a straight line from `begin` to `end` requests a second."""

    begin: float
    end: float
    duration_s: float

    @property
    def requests(self) -> float:
        return (self.begin + self.end) / 2 * self.duration_s


def parse_stages(text: str) -> tuple[Stage, ...]:
    """`5@30s,5-20@1m,20@1m`: a rate, or a ramp between two, each for its time. Raises BadOption."""
    stages = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*([\d.]+)(?:\s*-\s*([\d.]+))?\s*@\s*(\S+)\s*", part)
        try:
            if found is None:
                raise ValueError
            begin = float(found[1])
            stage = Stage(begin, float(found[2]) if found[2] else begin, seconds(found[3]))
        except ValueError:
            raise BadOption(
                f"--stages: {part.strip()!r} is not RATE@TIME or RATE-RATE@TIME, as in 5@30s,5-20@1m"
            ) from None
        if stage.duration_s <= 0 or not math.isfinite(stage.requests):
            raise BadOption(f"--stages: {part.strip()!r} must last longer than 0")
        stages.append(stage)
    if not sum(stage.requests for stage in stages) > 0:
        raise BadOption("--stages: the rate is 0 all the time")
    return tuple(stages)


def due_times(
    stages: Sequence[Stage], process: str, *, burstiness: float = 1.0, seed: int = 0, limit: int | None = None
) -> NDArray[np.float64]:
    """Seconds from the start at which requests are due, ascending, all within the stages' time.

    process: "constant" (even gaps), "poisson", or "gamma" whose shape is `burstiness` as vLLM has it: 1 is Poisson,
    less is burstier, more is more even; the gaps' coefficient of variation is burstiness ** -0.5.
    """
    total = sum(stage.requests for stage in stages)
    rng = np.random.default_rng([seed, 0x61727276])
    if process == "constant":
        marks = np.arange(math.ceil(total - 1e-9), dtype=np.float64)
    else:
        shape = burstiness if process == "gamma" else 1.0
        marks = _renewals(total, shape, rng)
    return _stretch(stages, marks[:limit])


def _renewals(total: float, shape: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Points below `total` of a renewal process with gamma gaps of mean 1."""
    found = np.empty(0)
    while found.size == 0 or found[-1] < total:
        more = int(total + 6 * math.sqrt(total / shape) + 16)
        last = found[-1] if found.size else 0.0
        found = np.concatenate((found, last + np.cumsum(rng.gamma(shape, 1 / shape, more))))
    return found[found < total]


def _stretch(stages: Sequence[Stage], marks: NDArray[np.float64]) -> NDArray[np.float64]:
    """The moments at which the integral of the rate reaches each mark."""
    times = np.empty_like(marks)
    begun, area = 0.0, 0.0
    for stage in stages:
        last = stage is stages[-1]
        chosen = (marks >= area) & ((marks < area + stage.requests) | last)
        wanted = marks[chosen] - area
        slope = (stage.end - stage.begin) / stage.duration_s
        # begin * t + slope / 2 * t^2 = wanted, in the form that stays exact when slope is 0
        root = np.sqrt(np.maximum(stage.begin**2 + 2 * slope * wanted, 0.0))
        with np.errstate(invalid="ignore", divide="ignore"):
            inner = np.where(wanted > 0, 2 * wanted / (stage.begin + root), 0.0)
        times[chosen] = begun + np.minimum(inner, stage.duration_s)
        begun, area = begun + stage.duration_s, area + stage.requests
    return times
