"""Right-size against TF-IDF nearest neighbours on prompts that neither has seen.

    python -m policies.rightsize.evaluate --scores FILE.jsonl --prices FILE.json

Five seeds of a 20 % split, then five draws of three tasks left out whole. Settings are chosen on a validation part of
the training rows only. The interval is a paired bootstrap: one resampling of the table's prompts applies to both
contenders and to every split that a prompt is in.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.rightsize.frontier import area, areas, at_cost, expected_costs, sweep
from policies.rightsize.knn import knn
from policies.rightsize.predictor import write_atomically
from policies.rightsize.table import Floats, ScoreTable, TableError, prices_for, read_prices, read_scores
from policies.rightsize.train import Corpus, Rows, predict_rows, train

SAMPLES = 2000
NEIGHBOURS = 30
LEFT_OUT = 3
OPERATING_POINTS = (0.16, 0.60)  # relative cost


@dataclass(frozen=True)
class Split:
    """`test` rows of the table, and both contenders' predictions for them [test, models]."""

    name: str
    test: Rows
    ours: NDArray[np.float32]
    floor: Floats


def random_splits(table: ScoreTable, seeds: Sequence[int]) -> Iterator[tuple[str, Rows, Rows]]:
    """(name, training rows, test rows): a fifth is held out."""
    for seed in seeds:
        test, fit = np.split(np.random.default_rng(seed).permutation(len(table)), [len(table) // 5])
        yield f"seed {seed}", fit, test


def task_splits(table: ScoreTable, seeds: Sequence[int]) -> Iterator[tuple[str, Rows, Rows]]:
    """(name, training rows, test rows): three tasks drawn by each seed are held out whole."""
    tasks = sorted(set(table.tasks))
    for seed in seeds:
        gone = np.random.default_rng(seed).choice(tasks, LEFT_OUT, replace=False)
        out = np.isin(table.tasks, gone)
        yield "without " + ", ".join(sorted(gone)), np.flatnonzero(~out), np.flatnonzero(out)


def predict(
    table: ScoreTable, costs: Floats, corpus: Corpus, splits: Iterator[tuple[str, Rows, Rows]]
) -> Iterator[Split]:
    """Train both contenders on each split's training rows."""
    for number, (name, fit, test) in enumerate(splits):
        predictor = train(table, costs, seed=number, rows=fit, corpus=corpus).predictor
        known = table.take(fit)
        near = knn(known.prompts, known.scores, table.take(test).prompts, NEIGHBOURS)
        yield Split(name, test, predict_rows(predictor, corpus, test), near)


def compare(table: ScoreTable, costs: Floats, splits: Sequence[Split], seed: int = 0) -> dict[str, Any]:
    """Per split: both areas and the two operating points; over all: the mean gap in area and its 95 % interval."""
    repeats = np.random.default_rng(seed).multinomial(len(table), np.full(len(table), 1 / len(table)), size=SAMPLES)
    rows: list[dict[str, Any]] = []
    gaps = []
    for split in splits:
        curves = [sweep(guess, table.scores[split.test], costs[split.test]) for guess in (split.ours, split.floor)]
        rows.append(
            {
                "split": split.name,
                "area": [area(curve) for curve in curves],
                **{f"quality_at_{most}": [at_cost(curve, most)[1] for curve in curves] for most in OPERATING_POINTS},
                "best_single": table.models[curves[0].reference],
            }
        )
        gaps.append(np.subtract(*(areas(curve, repeats[:, split.test].astype(float)) for curve in curves)))
    low, high = np.quantile(np.mean(gaps, axis=0), [0.025, 0.975])
    return {
        "splits": rows,
        "gap": float(np.mean([one["area"][0] - one["area"][1] for one in rows])),
        "interval": [float(low), float(high)],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m policies.rightsize.evaluate", description=__doc__)
    parser.add_argument("--scores", type=Path, required=True, help="JSON lines: prompt, task, scores")
    parser.add_argument("--prices", type=Path, required=True, help="JSON: USD per million tokens of each model")
    parser.add_argument("--seeds", type=int, default=5, help="splits of each kind")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(arguments)
    try:
        table = read_scores(options.scores)
        prices = prices_for(table.models, read_prices(options.prices))
        if len(set(table.tasks)) <= LEFT_OUT:
            raise TableError(f"the table has {len(set(table.tasks))} tasks; leaving {LEFT_OUT} out needs more")
        started = time.perf_counter()
        corpus = Corpus.of(table.prompts)
        results: dict[str, Any] = {}
        for kind, splits in (("unseen prompts", random_splits), ("unseen tasks", task_splits)):
            costs = expected_costs(table.prompts, prices)
            drawn = list(predict(table, costs, corpus, splits(table, range(options.seeds))))
            for priced, flat in (("price x tokens", False), ("price per request", True)):
                name = f"{kind}, {priced}"
                results[name] = compare(table, expected_costs(table.prompts, prices, flat=flat), drawn)
                show(name, results[name])
    except TableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - started:.0f} s")
    if options.json:
        write_atomically(options.json, json.dumps(results, indent=1).encode())
    return 0


def show(name: str, result: dict[str, Any]) -> None:
    keys = ["area", *(f"quality_at_{most}" for most in OPERATING_POINTS)]
    print(f"\n{name} (right-size | TF-IDF kNN, k={NEIGHBOURS}; relative to the best single model)")
    print(f"{'':44}{'area':>17}" + "".join(f"{f'at <= {most:.0%} cost':>19}" for most in OPERATING_POINTS))
    for row in result["splits"]:
        print(f"{row['split'][:44]:44}" + "".join(f"{row[k][0]:>10.4f} |{row[k][1]:7.4f}" for k in keys))
    means = [np.mean([row[key] for row in result["splits"]], axis=0) for key in keys]
    print(f"{'mean':44}" + "".join(f"{ours:>10.4f} |{floor:7.4f}" for ours, floor in means))
    low, high = result["interval"]
    print(f"area gained over kNN: {result['gap']:+.4f}, 95 % paired bootstrap {low:+.4f} … {high:+.4f}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
