"""The baseline every right-size predictor has to beat: TF-IDF nearest neighbours, as scikit-learn has it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_TOKEN = re.compile(r"\b\w\w+\b")


def knn(train: Sequence[str], scores: NDArray[np.floating], test: Sequence[str], k: int = 30) -> NDArray[np.float64]:
    """Mean score of the k most similar training prompts (cosine of smoothed, unit-length TF-IDF): [test, models].

    Same weights as TfidfVectorizer() with its defaults; equal similarities go to the earlier prompt.
    """
    counted = [Counter(_TOKEN.findall(text.lower())) for text in train]
    holders = Counter(token for counts in counted for token in counts)
    idf = {token: np.log((1 + len(train)) / (1 + held)) + 1 for token, held in holders.items()}
    postings: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for row, counts in enumerate(counted):
        for token, weight in _unit(counts, idf).items():
            postings[token][0].append(row)
            postings[token][1].append(weight)
    index = {token: (np.array(rows), np.array(weights)) for token, (rows, weights) in postings.items()}
    result = np.empty((len(test), scores.shape[1]))
    for at, text in enumerate(test):
        similarity = np.zeros(len(train))
        for token, weight in _unit(Counter(_TOKEN.findall(text.lower())), idf).items():
            rows, weights = index[token]
            similarity[rows] += weight * weights
        result[at] = scores[np.argsort(-similarity, kind="stable")[:k]].mean(axis=0)
    return result


def _unit(counts: Counter[str], idf: dict[str, float]) -> dict[str, float]:
    weights = {token: count * idf[token] for token, count in counts.items() if token in idf}
    length = float(np.sqrt(sum(weight * weight for weight in weights.values()))) or 1.0
    return {token: weight / length for token, weight in weights.items()}
