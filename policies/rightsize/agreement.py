"""How much two answers agree, 0..1: the F1 of their words, as SQuAD scores answers (Rajpurkar et al., EMNLP 2016, 4.2).

Case, punctuation and the English articles do not count, the order of words neither; numbers are words. Two answers
without a word agree.
"""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"\w+")
_ARTICLES = frozenset(("a", "an", "the"))
# Answers longer than this are compared by their beginnings: the comparison runs between a gateway's other duties.
MAX_CHARS = 20_000


def agreement(one: str, other: str) -> float:
    """1 for the same words, 0 for no word in common."""
    first, second = _words(one), _words(other)
    if not first or not second:
        return float(first == second)
    common = (first & second).total()
    return 2 * common / (first.total() + second.total())


def _words(text: str) -> Counter[str]:
    words = (word for word in _WORD.findall(text[:MAX_CHARS].lower()) if word not in _ARTICLES)
    return Counter(words)
