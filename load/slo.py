"""Service level objectives: `ttft_p95=500ms`, `itl_p99=80ms`, `e2e_mean=2s`, `error_rate=1%`.

A run meets an objective if the figure over all its measured requests does. A single request meets it if its own figure
does: its TTFT, TPOT, E2E or queue time is at most the bound; for gaps (itl, chunk_gap) the same percentile (or mean) of
its own gaps is. Goodput counts the requests that meet every one; attainment is their share of all requests sent, the
failed and the refused included.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

from load.units import BadOption, seconds, share

LATENCIES = ("ttft", "tpot", "itl", "chunk_gap", "e2e", "queue")
_FORMS = "METRIC_pNN=TIME, METRIC_mean=TIME or error_rate=SHARE, with METRIC one of " + ", ".join(LATENCIES)


@dataclass(frozen=True, slots=True)
class Objective:
    """metric: one of LATENCIES, or "error_rate". rank: percentile, or None for the mean. bound: seconds, or a share."""

    metric: str
    rank: float | None
    bound: float

    @property
    def name(self) -> str:
        if self.metric == "error_rate":
            return self.metric
        return f"{self.metric}_mean" if self.rank is None else f"{self.metric}_p{self.rank:g}"


def parse_objective(text: str) -> Objective:
    """Raises BadOption that quotes what was typed and says what would do."""
    found = re.fullmatch(r"\s*([a-z_0-9.]+?)\s*(?:=|<=)\s*(\S.*?)\s*", text)
    if found is None:
        raise BadOption(f"--slo {text!r} is not {_FORMS}; for example ttft_p95=500ms")
    name, bound = found[1], found[2]
    if name == "error_rate":
        return Objective(name, None, _bound(text, bound, share))
    parts = re.fullmatch(r"([a-z0-9_]+)_(?:p(\d+(?:\.\d+)?)|(mean))", name)
    if parts is None or parts[1] not in LATENCIES:
        known = [f"{metric}_p95" for metric in LATENCIES] + ["error_rate"]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise BadOption(f"--slo {text!r}: {name!r} is not a figure; write {_FORMS}{hint}")
    rank = float(parts[2]) if parts[2] else None
    if rank is not None and not 0 < rank < 100:
        raise BadOption(f"--slo {text!r}: a percentile lies between 0 and 100")
    return Objective(parts[1], rank, _bound(text, bound, seconds))


def parse_objectives(texts: list[str]) -> tuple[Objective, ...]:
    objectives = tuple(parse_objective(part) for text in texts for part in text.split(",") if part.strip())
    names = [objective.name for objective in objectives]
    for name in names:
        if names.count(name) > 1:
            raise BadOption(f"--slo: {name} is bounded twice")
    if texts and not objectives:
        raise BadOption(f"--slo is empty; write {_FORMS}")
    return objectives


def _bound(text: str, bound: str, read: Callable[[str], float]) -> float:
    try:
        value = read(bound)
    except BadOption as error:
        raise BadOption(f"--slo {text!r}: {error}") from None
    if value <= 0 and read is seconds:
        raise BadOption(f"--slo {text!r}: no answer is that fast; the bound must be above 0")
    return value
