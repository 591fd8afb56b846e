"""Quality against cost over the sweep of `cost_weight`, its area, and the lines it is compared with.

Cost of a prompt on a model (USD) = input price x prompt tokens + output price x expected output tokens. The table has
no token counts, so prompt tokens are characters / 4 and an answer is expected to take 256 tokens, for every contender.
With `flat` every prompt counts the same and a model costs its price.

Area: mean relative quality over relative cost, evenly from the cheapest to the dearest model's always-cost, along the
curve in sweep order (neighbouring settings can be mixed by lot, hence straight lines between them; no convex hull and
no picking of the best points afterwards, which would use the answers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.rightsize.table import Floats, Price

EXPECTED_OUTPUT_TOKENS = 256
CHARS_PER_TOKEN = 4
STEPS = 120
GRID = 400


def expected_costs(prompts: Sequence[str], prices: Sequence[Price], *, flat: bool = False) -> Floats:
    """USD [prompts, models]."""
    read = np.array([math.ceil(len(prompt) / CHARS_PER_TOKEN) for prompt in prompts], dtype=np.float64)
    if flat:
        read = np.full(len(prompts), float(EXPECTED_OUTPUT_TOKENS))
    per_input = np.array([price.input for price in prices]) / 1e6
    per_output = np.array([price.output for price in prices]) / 1e6
    costs: Floats = read[:, None] * per_input + EXPECTED_OUTPUT_TOKENS * per_output
    return costs


@dataclass(frozen=True)
class Curve:
    """One contender's sweep on one table.

    weights: [settings], rising, in quality per USD per thousand requests. got, spent: [settings, prompts], the true
    score and the cost of what each setting chose. scores, costs: [prompts, models] of the table.
    """

    weights: Floats
    got: Floats
    spent: Floats
    scores: Floats
    costs: Floats

    @property
    def reference(self) -> int:
        """The best single model on this very table, ties to the cheaper one."""
        means, spent = self.scores.mean(axis=0), self.costs.mean(axis=0)
        return int(np.lexsort((spent, -means))[0])

    def points(self) -> tuple[Floats, Floats]:
        """(relative cost, relative quality) [settings]; 1 is the best single model on this table."""
        best = self.reference
        cost, quality = self.costs[:, best].mean(), self.scores[:, best].mean()
        return self.spent.mean(axis=1) / (cost or 1.0), self.got.mean(axis=1) / (quality or 1.0)


def pick(predicted: NDArray[np.floating[Any]], costs: Floats, weight: float) -> NDArray[np.intp]:
    """Chosen model per prompt at one `cost_weight`, the rule of `choose.choose` for a whole table at once."""
    utility = predicted.astype(np.float64) - weight * 1000 * costs
    order = np.argsort(costs, axis=1, kind="stable")  # the first maximum is then the cheapest of equals
    best: NDArray[np.intp] = np.take_along_axis(utility, order, axis=1).argmax(axis=1)
    return np.take_along_axis(order, best[:, None], axis=1)[:, 0]


def sweep(predicted: NDArray[np.floating[Any]], scores: Floats, costs: Floats) -> Curve:
    """Choose for every prompt at every weight: 0, a geometric range around quality/cost, and one that buys cheapest."""
    unit = 1 / (1000 * max(float(costs.mean()), 1e-12))
    weights = np.concatenate(([0.0], np.geomspace(1e-4, 1e2, STEPS) * unit, [1e9 * unit]))
    rows = np.arange(len(scores))
    chosen = [pick(predicted, costs, float(weight)) for weight in weights]
    got = np.array([scores[rows, models] for models in chosen])
    spent = np.array([costs[rows, models] for models in chosen])
    return Curve(weights, got, spent, scores, costs)


def area(curve: Curve) -> float:
    """Mean relative quality over the range of relative cost that single models span."""
    return float(areas(curve, np.ones((1, len(curve.scores))))[0])


def areas(curve: Curve, repeats: NDArray[np.floating[Any]]) -> Floats:
    """Area for each row of `repeats` [samples, prompts]: how often each prompt is in that bootstrap sample."""
    spent, got = repeats @ curve.spent.T, repeats @ curve.got.T
    single = repeats @ curve.costs
    best = curve.reference
    quality = np.maximum(repeats @ curve.scores[:, best], 1e-12)
    result = np.empty(len(repeats))
    for number in range(len(repeats)):
        grid = np.linspace(single[number].min(), single[number].max(), GRID)
        rising = slice(None, None, -1)  # cost falls as the weight rises
        result[number] = np.interp(grid, spent[number, rising], got[number, rising]).mean() / quality[number]
    return result


def at_cost(curve: Curve, most: float) -> tuple[float, float]:
    """(relative cost, relative quality) of the dearest setting that costs at most this; (nan, nan) if there is none."""
    cost, quality = curve.points()
    within = np.flatnonzero(cost <= most)
    return (float(cost[within[0]]), float(quality[within[0]])) if len(within) else (math.nan, math.nan)


def summarise(curve: Curve, models: Sequence[str]) -> dict[str, Any]:
    """Plain data for --json: the sweep's points and every line of comparison, quality and cost relative."""
    best = curve.reference
    cost, quality = curve.points()
    top, price = float(curve.scores[:, best].mean()) or 1.0, float(curve.costs[:, best].mean()) or 1.0

    def point(score: float, spent: float) -> dict[str, float]:
        return {"quality": score / top, "relative_cost": spent / price, "mean_score": score}

    single = {
        model: point(float(curve.scores[:, j].mean()), float(curve.costs[:, j].mean()))
        for j, model in enumerate(models)
    }
    ideal = sweep(curve.scores, curve.scores, curve.costs)
    return {
        "best_single_model": models[best],
        "quality_means": "mean score divided by the best single model's",
        "area": area(curve),
        "points": [
            {
                "quality": float(quality[i]),
                "relative_cost": float(cost[i]),
                "setting": {"cost_weight": float(curve.weights[i])},
                "mean_score": float(curve.got[i].mean()),
            }
            for i in range(len(curve.weights))
        ],
        "always_one_model": single,
        "random": point(float(curve.scores.mean()), float(curve.costs.mean())),
        "oracle": [{"quality": float(q), "relative_cost": float(c)} for c, q in zip(*ideal.points(), strict=True)],
    }


def plot(summary: dict[str, Any], title: str) -> bytes:
    """PNG of a `summary`. Needs matplotlib."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()

    def line(name: str, points: Sequence[dict[str, Any]], style: str) -> None:
        axes.plot([p["relative_cost"] for p in points], [p["quality"] for p in points], style, label=name)

    line("oracle", summary["oracle"], "k:")
    line("right-size", summary["points"], "C0-")
    line("random", [summary["random"]], "C3x")
    singles = summary["always_one_model"]
    cheapest = min(singles.values(), key=lambda one: (one["relative_cost"], -one["quality"]))
    line("cheapest / best single, by lot", [cheapest, singles[summary["best_single_model"]]], "C7--")
    line("always one model", list(singles.values()), "C1o")
    for name, one in singles.items():
        axes.annotate(
            name, (one["relative_cost"], one["quality"]), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
    axes.set(xlabel="cost / best single model's", ylabel="quality / best single model's", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
