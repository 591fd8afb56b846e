"""`signalbox policy train` and `signalbox policy frontier`: from a score table to a predictor and its figures."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from replicas.protocol import SignalboxError

if TYPE_CHECKING:
    from policies.rightsize.predictor import Predictor
    from policies.rightsize.table import ScoreTable
    from policies.rightsize.train import Progress

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Train and evaluate the choice of model.")

Scores = Annotated[Path, typer.Option("--scores", help="JSON lines: prompt, scores {model: 0..1}.")]
Prices = Annotated[
    Path, typer.Option("--prices", help="JSON: {model: {input_price, output_price}}, USD per 1M tokens.")
]
Flat = Annotated[bool, typer.Option("--flat", help="Count a request at its price, whatever its length.")]


@app.command()
def train(
    scores: Scores,
    prices: Prices,
    out: Annotated[Path, typer.Option("--out", help="Folder for predictor.json, predictor.npz and frontier.png.")],
    seed: Annotated[int, typer.Option(help="Of the validation split and the trees.")] = 0,
    flat: Flat = False,
) -> None:
    """Train a quality predictor from a score table; prints how well it is calibrated on the validation part."""
    with _readable_errors():
        from policies.rightsize.frontier import expected_costs, summarise
        from policies.rightsize.table import prices_for, read_prices, read_scores
        from policies.rightsize.train import train as fit

        table = read_scores(scores)
        priced = prices_for(table.models, read_prices(prices))
        with _progress() as progress:
            trained = fit(table, expected_costs(table.prompts, priced, flat=flat), seed=seed, progress=progress)
        summary = summarise(trained.curve, table.models)
        _save_plot(out / "frontier.png", summary, "Validation part of the training table")
        trained.predictor.save(out, {**trained.report, "validation_area": summary["area"]})
        _print_training(trained.report, summary)
        typer.echo(f"{_latency(trained.predictor, table)}\nwrote {out / 'predictor.json'}")


@app.command()
def frontier(
    scores: Scores,
    prices: Prices,
    model: Annotated[
        Path | None, typer.Option("--model", help="Folder of a trained predictor; without one, the untrained default.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write points and lines of comparison here.")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write the plot here.")] = None,
    flat: Flat = False,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Leave prompts out that it was trained on, instead of refusing.")
    ] = False,
) -> None:
    """Evaluate a predictor on a table it has not seen: quality and cost relative to the best single model."""
    with _readable_errors():
        import numpy as np

        from policies.rightsize.frontier import expected_costs, summarise, sweep
        from policies.rightsize.predictor import Predictor, write_atomically
        from policies.rightsize.table import prices_for, read_prices, read_scores

        table = read_scores(scores)
        priced = prices_for(table.models, read_prices(prices))
        if model is None:
            typer.echo("no --model: this is the untrained default", err=True)
            predicted = np.array(_untrained(table, [price.input + price.output for price in priced]), np.float32)
        else:
            predictor = Predictor.load(model)
            table = _unseen(predictor, table, drop=allow_overlap)
            predicted = predictor.predict_all(table.prompts)[:, _columns(predictor, table)]
        curve = sweep(predicted, table.scores, expected_costs(table.prompts, priced, flat=flat))
        summary = {"prompts": len(table), "trained": model is not None, **summarise(curve, table.models)}
        summary["cost_model"] = "price per request" if flat else "price x (characters / 4 + 256 expected tokens)"
        if json_file:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(json_file, json.dumps(summary, indent=1).encode())
        if png:
            _save_plot(png, summary, f"{len(table)} prompts")
        _print_frontier(summary)


def _unseen(predictor: Predictor, table: ScoreTable, *, drop: bool) -> ScoreTable:
    from policies.rightsize.table import TableError, prompt_hash

    met = predictor.overlap(table.prompts)
    if met and not drop:
        raise TableError(
            f"{met} of {len(table)} prompts were in the training table: figures on them would flatter. Evaluate on "
            "another table, or leave them out with --allow-overlap"
        )
    if met == len(table):
        raise TableError("every prompt was in the training table: nothing is left to evaluate on")
    if met:
        typer.echo(f"WARNING: {met} of {len(table)} prompts were in the training table and are left out", err=True)
    return table.take(i for i, prompt in enumerate(table.prompts) if prompt_hash(prompt) not in predictor.seen)


def _columns(predictor: Predictor, table: ScoreTable) -> list[int]:
    from policies.rightsize.table import TableError

    unknown = [name for name in table.models if name not in predictor.models]
    if unknown:
        raise TableError(f"the predictor was not trained on {unknown[0]!r}, which the table scores")
    return [predictor.models.index(name) for name in table.models]


def _untrained(table: ScoreTable, prices: list[float]) -> list[list[float]]:
    from policies.rightsize.defaults import untrained_quality

    models = [(name, price, None) for name, price in zip(table.models, prices, strict=True)]
    return [list(untrained_quality(prompt, models).values()) for prompt in table.prompts]


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except SignalboxError as error:
        typer.echo(f"error: {error.message}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"error: cannot write {error.filename!r}: {error.strerror}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar per stage on a terminal; nothing where the output goes to a file."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    with Bars(console=Console(file=sys.stderr), transient=True, disable=not sys.stderr.isatty()) as bars:
        stages: dict[str, Any] = {}

        def show(stage: str, done: float) -> None:
            if stage not in stages:
                for earlier in stages.values():
                    bars.update(earlier, completed=1)
                stages[stage] = bars.add_task(stage, total=1)
            bars.update(stages[stage], completed=done)

        yield show


def _save_plot(path: Path, summary: dict[str, Any], title: str) -> None:
    from policies.rightsize.frontier import plot
    from policies.rightsize.predictor import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, plot(summary, title))
    typer.echo(f"wrote {path}")


def _latency(predictor: Predictor, table: ScoreTable) -> str:
    """Of single predictions. On a busy machine the wall clock also counts waiting for a core; CPU time does not."""
    wall, busy = [], []
    for prompt in table.prompts[:1000]:
        started, used = time.perf_counter(), time.thread_time()
        predictor.predict(prompt)
        busy.append(1e3 * (time.thread_time() - used))
        wall.append(1e3 * (time.perf_counter() - started))

    def figures(samples: list[float]) -> str:
        samples.sort()
        return f"p50 {samples[len(samples) // 2]:.2f} ms, p99 {samples[int(len(samples) * 0.99)]:.2f} ms"

    return f"a prediction on this machine: {figures(wall)}; CPU time {figures(busy)}"


def _print_training(report: dict[str, Any], summary: dict[str, Any]) -> None:
    for one in report["tried"]:
        typer.echo(f"tried {one['settings']}: validation area {one['validation_area']:.4f}")
    typer.echo(f"{'model':40}{'predicted':>10}{'true':>8}{'error':>8}   predicted:true by fifths")
    for name, row in report["calibration"].items():
        bins = "  ".join(f"{guess:.2f}:{truth:.2f}" for guess, truth in row["bins"])
        typer.echo(f"{name:40}{row['predicted']:>10.3f}{row['true']:>8.3f}{row['calibration_error']:>8.3f}   {bins}")
    typer.echo(f"trained on {report['prompts']} prompts, {report['validation_prompts']} of them chose the settings")
    _print_frontier(summary)


def _print_frontier(summary: dict[str, Any]) -> None:
    typer.echo(f"best single model: {summary['best_single_model']}; area {summary['area']:.4f}")
    points = summary["points"]
    typer.echo(f"{'cost_weight':>12}{'relative cost':>15}{'quality':>9}")
    for most in (0.12, 0.16, 0.25, 0.4, 0.6, 0.8, 1.0):
        within = [point for point in points if point["relative_cost"] <= most]
        if within:
            point = max(within, key=lambda one: (one["relative_cost"], -one["setting"]["cost_weight"]))
            weight = point["setting"]["cost_weight"]
            typer.echo(f"{weight:>12.4g}{point['relative_cost']:>15.3f}{point['quality']:>9.3f}")
