"""From a row's turns to ratios with their spread, and to the words of a table's cells. Nothing here measures."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from load.units import show_time

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A figure off and on: medians over the turns, and the median of the turns' own ratios on / off with the least and
    the greatest of them.
    """

    off: float
    on: float
    ratio: float
    low: float
    high: float


def change(turns: Sequence[Json], figure: str) -> Change | None:
    """None where a side does not have the figure."""
    pairs = [(turn["off"].get(figure), turn["on"].get(figure)) for turn in turns]
    known = [(off, on) for off, on in pairs if off and on]
    if not known or len(known) < len(pairs):
        return None
    ratios = [on / off for off, on in known]
    off, on = (statistics.median(side) for side in zip(*known, strict=True))
    return Change(off, on, statistics.median(ratios), min(ratios), max(ratios))


def priced(case: Json, usd_per_hour: float) -> Sequence[Json]:
    """The case's turns with `usd_per_million`: what an hour of the machine costs over the output tokens of an hour,
    where the row did not bring a price of its own.
    """
    return [{side: _priced(turn[side], usd_per_hour) for side in ("off", "on")} for turn in case["turns"]]


def _priced(figures: Json, usd_per_hour: float) -> Json:
    return {"usd_per_million": usd_per_hour / (figures["tokens_per_s"] * 3600) * 1e6, **figures}


def ratio_words(found: Change) -> str:
    if f"{found.low:.2f}" == f"{found.high:.2f}":
        return f"{found.ratio:.2f}x"
    return f"{found.ratio:.2f}x ({found.low:.2f} to {found.high:.2f})"


def throughput(turns: Sequence[Json]) -> str:
    found = change(turns, "tokens_per_s")
    return f"{found.off:.0f} → {found.on:.0f}, {ratio_words(found)}" if found else "-"


def latency(turns: Sequence[Json], metric: str) -> str:
    """`p50 1.2 s → 310 ms, p95 …, max …`; "" where the row has no such latency. A maximum only where it was kept."""
    parts = []
    for rank in ("p50", "p95", "max"):
        found = change(turns, f"{metric}_{rank}_s")
        if found:
            parts.append(f"{rank} {show_time(found.off)} → {show_time(found.on)}")
    return ", ".join(parts)


def first_token(turns: Sequence[Json]) -> str:
    """TTFT, or E2E where answers came in one piece."""
    whole = latency(turns, "e2e")
    return latency(turns, "ttft") or (f"E2E {whole}" if whole else "-")


def cost(turns: Sequence[Json]) -> str:
    found = change(turns, "usd_per_million")
    return f"{found.off:.2f} → {found.on:.2f}, {found.ratio - 1:+.0%}" if found else "-"


def quality(found: Json) -> str:
    match found["what"]:
        case "output":
            if found["same"] == found["of"]:
                return f"same tokens in all {found['of']} answers"
            return f"TOKENS DIFFER in {found['of'] - found['same']} of {found['of']} answers"
        case "weights":
            return _weights(found)
        case "scores":
            low, middle, high = found["change"]
            off, on = found["scores"]
            return f"mean score {off:.3f} → {on:.3f}, {middle:+.3f} ({low:+.3f} to {high:+.3f})"
    return str(found["why"])


def _weights(found: Json) -> str:
    parts = [f"first choice as float32's: {found['same'] / found['of']:.1%} of {found['of']} tokens"]
    if "perplexity" in found:
        off, on = found["perplexity"]
        parts.append(f"perplexity {off:.2f} → {on:.2f}, {on / off - 1:+.1%}")
    parts.append(f"layers {found['layers_smaller_than_16_bits']:.1f}x smaller than in 16 bits")
    return "; ".join(parts)


def broken(row: Json) -> str:
    """What makes the row a failure; "" if nothing does."""
    if "failed" in row:
        return str(row["failed"])
    if "quality" in row and row["quality"]["what"] == "output" and row["quality"]["same"] < row["quality"]["of"]:
        return quality(row["quality"])
    return ""
