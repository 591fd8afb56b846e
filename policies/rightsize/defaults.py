"""What decides before a score table has been trained on: rules of thumb, and they say so.

A prompt's difficulty grows with its length, code, mathematics, several demands at once and a script that small models
have seen little of. A model's strength is what the operator declares, else its rank by price, from 0.4 for the cheapest
to 0.95 for the dearest. Price is a poor guide to quality (on the table of docs/right-size.md a 70B model loses to 7B
ones), hence the name that every such choice carries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from policies.rightsize.features import CUES, cues

UNTRAINED = "untrained default: length, code, mathematics and language cues against strength by price"
WEAKEST, STRONGEST = 0.40, 0.95


def difficulty(text: str) -> float:
    """0 (small talk) .. 1 (long, technical, many demands); never falls when a demand is added."""
    cue: dict[str, float] = dict(zip(CUES, cues(text).tolist(), strict=True))
    words = float(np.expm1(cue["words"]))
    length = min(words / 600, 1.0)
    code = min(cue["code"], 1.5) / 1.5
    mathematics = min(cue["math"] + 0.5 * cue["backslashes"], 2.0) / 2
    demands = min(cue["questions"] + cue["order_word"] + cue["steps"] + 0.5 * cue["lines"], 4.0) / 4
    foreign = min(4 * cue["foreign_share"], 1.0)
    return min(0.1 + 0.35 * length + 0.3 * code + 0.3 * mathematics + 0.15 * demands + 0.2 * foreign, 1.0)


def untrained_quality(text: str, models: Sequence[tuple[str, float, float | None]]) -> dict[str, float]:
    """Guessed quality of each (name, price, declared strength or None): 1 - difficulty x (1 - strength)."""
    hard = difficulty(text)
    prices = sorted({price for _, price, _ in models})
    span = max(len(prices) - 1, 1)
    quality = {}
    for name, price, declared in models:
        by_price = WEAKEST + (STRONGEST - WEAKEST) * prices.index(price) / span if len(prices) > 1 else STRONGEST
        quality[name] = 1 - hard * (1 - (by_price if declared is None else declared))
    return quality
