"""Table -> predictor. Settings are chosen on a validation part by the area under its frontier, then all rows are used.

`task` is never read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.rightsize.features import BUCKETS, Ids, Vector, cues, hashed_counts, weigh
from policies.rightsize.frontier import Curve, area, sweep
from policies.rightsize.predictor import Predictor, Settings
from policies.rightsize.table import Floats, ScoreTable, TableError, prompt_hash
from policies.rightsize.trees import grow

Rows = NDArray[np.intp]
Progress = Callable[[str, float], None]  # what is being done, part done 0..1

CANDIDATES = (
    Settings(leaf=15),
    Settings(leaf=25),
    Settings(leaf=50),
    Settings(leaf=25, neighbours=200),
)
KNOWN_ROWS = 8000  # neighbours are looked for among this many, so that a prediction's time does not grow with the table
SVD_ROWS = 6000  # a projection needs no more rows than this, and a larger dense matrix would not fit a laptop
FEWEST_PROMPTS = 20


@dataclass(frozen=True)
class Corpus:
    """A table's prompts as features, computed once however often the table is split."""

    hashed: tuple[tuple[Ids, Vector], ...]
    cues: NDArray[np.float32]

    @classmethod
    def of(cls, prompts: Sequence[str], progress: Progress | None = None) -> Corpus:
        hashed, values = [], []
        for number, prompt in enumerate(prompts):
            hashed.append(hashed_counts(prompt))
            values.append(cues(prompt))
            if progress and number % 200 == 0:
                progress("features", number / len(prompts))
        return cls(tuple(hashed), np.array(values, np.float32))


@dataclass(frozen=True)
class Trained:
    """`report` is plain data for predictor.json and the terminal; `curve` is the validation frontier."""

    predictor: Predictor
    report: dict[str, Any]
    curve: Curve


def train(
    table: ScoreTable,
    costs: Floats,
    *,
    seed: int = 0,
    rows: Rows | None = None,
    corpus: Corpus | None = None,
    candidates: Sequence[Settings] = CANDIDATES,
    progress: Progress | None = None,
) -> Trained:
    """Choose settings on a fifth of the rows, report calibration there, then fit to all of them.

    costs: USD [prompts, models] of the table. rows: which rows may be used (all by default). Same seed, same predictor.
    """
    rows = np.arange(len(table)) if rows is None else rows
    if len(rows) < FEWEST_PROMPTS:
        raise TableError(f"{len(rows)} prompts are too few to train and validate: {FEWEST_PROMPTS} at least")
    corpus = corpus or Corpus.of(table.prompts, progress)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(rows)
    held_out, fitted = np.split(shuffled, [len(rows) // 5])
    basis = Basis.fit(corpus, fitted, max(candidate.dimensions for candidate in candidates), rng)
    tried: list[tuple[float, Settings, Curve, NDArray[np.float32]]] = []
    for number, settings in enumerate(candidates):
        if progress:
            progress("settings", number / len(candidates))
        predictor = _fit(table, corpus, fitted, basis, settings, rng)
        predicted = predictor.predict_features(_embed(predictor, corpus, held_out))
        curve = sweep(predicted, table.scores[held_out], costs[held_out])
        tried.append((area(curve), settings, curve, predicted))
    _, chosen, curve, predicted = max(tried, key=lambda one: one[0])
    if progress:
        progress("fit", 0.0)
    predictor = _fit(table, corpus, rows, Basis.fit(corpus, rows, chosen.dimensions, rng), chosen, rng)
    report = {
        "prompts": len(rows),
        "validation_prompts": len(held_out),
        "seed": seed,
        "tried": [{"settings": asdict(settings), "validation_area": round(a, 5)} for a, settings, _, _ in tried],
        "calibration": calibration(table.models, predicted, table.scores[held_out]),
    }
    return Trained(predictor, report, curve)


@dataclass(frozen=True)
class Basis:
    """IDF of every bucket and the latent semantic projection (truncated SVD of the TF-IDF matrix)."""

    idf: Vector
    projection: NDArray[np.float32]

    @classmethod
    def fit(cls, corpus: Corpus, rows: Rows, dimensions: int, rng: np.random.Generator) -> Basis:
        """Randomised SVD (Halko, Martinsson & Tropp 2011): 12 extra directions, 2 power iterations."""
        present = np.zeros(2 * BUCKETS)
        for row in rows:
            present[corpus.hashed[row][0]] += 1
        idf = (np.log((1 + len(rows)) / (1 + present)) + 1).astype(np.float32)
        some = rows if len(rows) <= SVD_ROWS else rng.choice(rows, SVD_ROWS, replace=False)
        matrix = np.zeros((len(some), 2 * BUCKETS), np.float32)
        for at, row in enumerate(some):
            ids, counts = corpus.hashed[row]
            matrix[at, ids] = weigh(ids, counts, idf)
        width = min(dimensions + 12, len(some))
        sketch = matrix @ rng.standard_normal((2 * BUCKETS, width), np.float32)
        for _ in range(2):
            sketch = matrix @ (matrix.T @ np.linalg.qr(sketch)[0])
        _, _, directions = np.linalg.svd(np.linalg.qr(sketch)[0].T @ matrix, full_matrices=False)
        projection = np.zeros((2 * BUCKETS, dimensions), np.float32)
        kept = min(dimensions, width)
        projection[:, :kept] = directions[:kept].T
        return cls(idf, projection)


def _fit(
    table: ScoreTable, corpus: Corpus, rows: Rows, basis: Basis, settings: Settings, rng: np.random.Generator
) -> Predictor:
    width = settings.dimensions + corpus.cues.shape[1]
    plain = Predictor(
        table.models,
        settings,
        basis.idf,
        np.ascontiguousarray(basis.projection[:, : settings.dimensions]),
        np.zeros(width, np.float32),
        np.ones(width, np.float32),
        _NO_TREES,
        np.zeros((1, width), np.float32),
        np.zeros((1, len(table.models)), np.float32),
        frozenset(prompt_hash(table.prompts[row]) for row in rows),
    )
    raw = np.array([_raw(plain, corpus, row) for row in rows], np.float32)
    spread = raw.std(axis=0)
    scaled = replace(plain, centre=raw.mean(axis=0), spread=np.where(spread > 1e-6, spread, 1).astype(np.float32))
    inputs, scores = _embed(scaled, corpus, rows), table.scores[rows].astype(np.float32)
    # A tenth of a small table is the most that one estimate may lump together.
    most = max(1, len(rows) // 10)
    fitting = replace(settings, leaf=min(settings.leaf, most), neighbours=min(settings.neighbours, most))
    forest = grow(inputs, scores, trees=settings.trees, leaf=fitting.leaf, rng=rng)
    some = np.arange(len(rows)) if len(rows) <= KNOWN_ROWS else rng.choice(len(rows), KNOWN_ROWS, replace=False)
    lengths = np.maximum(np.linalg.norm(inputs[some], axis=1, keepdims=True), 1e-6)
    return replace(scaled, settings=fitting, forest=forest, known=inputs[some] / lengths, known_scores=scores[some])


_NO_TREES = grow(
    np.zeros((1, 1), np.float32), np.zeros((1, 1), np.float32), trees=1, leaf=1, rng=np.random.default_rng(0)
)


def _raw(predictor: Predictor, corpus: Corpus, row: int) -> Vector:
    ids, counts = corpus.hashed[row]
    return np.concatenate((weigh(ids, counts, predictor.idf) @ predictor.projection[ids], corpus.cues[row]))


def _embed(predictor: Predictor, corpus: Corpus, rows: Iterable[int]) -> NDArray[np.float32]:
    return np.array([predictor.embed(*corpus.hashed[row], corpus.cues[row]) for row in rows], np.float32)


def predict_rows(predictor: Predictor, corpus: Corpus, rows: Iterable[int]) -> NDArray[np.float32]:
    """Predictions for rows of a corpus, without hashing their text again."""
    return predictor.predict_features(_embed(predictor, corpus, rows))


def calibration(models: Sequence[str], predicted: NDArray[np.float32], scores: Floats, bins: int = 5) -> dict[str, Any]:
    """Per model: predicted and true mean, mean absolute gap over equally filled bins (ECE), and the bins themselves."""
    report: dict[str, Any] = {}
    for number, model in enumerate(models):
        order = np.argsort(predicted[:, number], kind="stable")
        filled = [part for part in np.array_split(order, bins) if len(part)]
        pairs = [(float(predicted[part, number].mean()), float(scores[part, number].mean())) for part in filled]
        gaps = [abs(guess - truth) * len(part) for (guess, truth), part in zip(pairs, filled, strict=True)]
        report[model] = {
            "predicted": round(float(predicted[:, number].mean()), 4),
            "true": round(float(scores[:, number].mean()), 4),
            "calibration_error": round(sum(gaps) / len(order), 4),
            "bins": [[round(guess, 3), round(truth, 3)] for guess, truth in pairs],
        }
    return report
