"""`signalbox policy simulate`: routing policies side by side in virtual time. Also `python -m deploy.simulate_cli`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from policies.compare import OURS, SHARES, Comparison, compare, plot
from policies.peers import POLICIES
from policies.sim_replica import ReplicaModel
from policies.simulator import Fleet, prepare
from policies.traces import TraceError, read_trace, scaled

_MODEL, _FLEET = ReplicaModel(), Fleet()

app = typer.Typer(add_completion=False)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Option(help="Mooncake .jsonl or Azure .csv.")],
    policy: Annotated[list[str] | None, typer.Option(help="Repeat for several; all of them if none is given.")] = None,
    load: Annotated[
        list[float] | None, typer.Option(help="Share of round_robin's saturation rate; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the trace's first requests.")] = None,
    length_scale: Annotated[int, typer.Option(min=1, help="Divide the trace's lengths by this.")] = 32,
    replicas: Annotated[int, typer.Option(min=1)] = _FLEET.replicas,
    gateways: Annotated[int, typer.Option(min=1)] = _FLEET.gateways,
    blocks: Annotated[int, typer.Option(min=1, help="KV blocks of each replica.")] = _MODEL.num_blocks,
    prefill_rate: Annotated[float, typer.Option(min=1e-3, help="Prompt tokens a second.")] = _MODEL.prefill_rate,
    step_ms: Annotated[float, typer.Option(min=0, help="Of every step.")] = _MODEL.step_s * 1e3,
    decode_ms: Annotated[float, typer.Option(min=0, help="Of every decoding sequence.")] = _MODEL.decode_s * 1e3,
    token_budget: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = _MODEL.max_num_batched_tokens,
    status_ms: Annotated[float, typer.Option(min=0, help="Between a replica's reports.")] = _FLEET.status_s * 1e3,
    lag_ms: Annotated[float, typer.Option(min=0, help="Of every message.")] = _FLEET.lag_s * 1e3,
    seed: Annotated[int, typer.Option()] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    png: Annotated[Path | None, typer.Option(help="Plot TTFT and hit rate over load; needs matplotlib.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a target is missed.")] = False,
) -> None:
    """Find the rate at which round_robin saturates, run policies at shares of it, compare with an all-seeing router.

    Virtual time: the figures depend on the seed, not on this machine.
    """
    names = _known(policy or list(POLICIES))
    shares = tuple(load or SHARES)
    if any(not share > 0 for share in shares):
        raise typer.BadParameter("must be positive", param_hint="--load")
    try:
        requests = prepare(scaled(read_trace(trace, limit), length_scale=length_scale), _MODEL.block_size)
    except (TraceError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from None
    if requests[-1].arrival_s <= requests[0].arrival_s:
        raise typer.BadParameter("all requests arrive at once: no rate to scale", param_hint="--trace")
    model = ReplicaModel(
        num_blocks=blocks,
        prefill_rate=prefill_rate,
        step_s=step_ms / 1e3,
        decode_s=decode_ms / 1e3,
        max_num_batched_tokens=token_budget,
    )
    fleet = Fleet(replicas=replicas, gateways=gateways, model=model, status_s=status_ms / 1e3, lag_s=lag_ms / 1e3)
    began = time.perf_counter()
    with Console(stderr=True).status("") as status:

        def show(what: str, arrived: int) -> None:
            status.update(f"{what}: {arrived} of {len(requests)} requests")

        found = compare(requests, fleet, names, shares=shares, seed=seed, progress=show)
    _print(found, time.perf_counter() - began)
    if json_file is not None:
        json_file.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    if png is not None:
        _plot(found, png)
    if check and not all(target.met for target in found.targets):
        raise typer.Exit(1)


def _known(names: list[str]) -> list[str]:
    for name in names:
        if name not in POLICIES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(POLICIES)}", param_hint="--policy")
    return list(dict.fromkeys(names))


def _print(found: Comparison, seconds: float) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(
        f"{found.requests} requests, {found.replicas} replicas; round_robin saturates at "
        f"{found.saturation_rate:.2f} requests/s; simulated in {seconds:.0f} s"
    )
    table = Table()
    for name in ("load", "policy"):
        table.add_column(name)
    for name in (
        "TTFT p50 s",
        "p95 s",
        "p99 s",
        "p95 / best peer",
        "hit rate",
        "of all-seeing",
        "req/s",
        "max/mean busy",
    ):
        table.add_column(name, justify="right")
    previous = None
    for row in found.rows:
        if previous not in (None, row.load):
            table.add_section()
        previous = row.load
        table.add_row(
            f"{row.load:.0%}",
            row.policy,
            *(f"{value:.3f}" for value in (row.ttft_p50_s, row.ttft_p95_s, row.ttft_p99_s, row.ttft_p95_ratio)),
            f"{row.hit_rate:.4f}",
            f"{row.hit_share:.3f}",
            f"{row.throughput:.2f}",
            f"{row.imbalance:.3f}",
            style="bold" if row.policy == OURS else None,
        )
    console.print(table)
    if any(row.refused for row in found.rows):
        console.print(f"{found.rows[0].refused} requests do not fit into a replica's blocks and were refused.")
    for target in found.targets:
        word = "met   " if target.met else "MISSED"
        console.print(f"{word} at {target.load:.0%}: {target.what} {target.bound:.2f}: {target.value:.3f}")


def _plot(found: Comparison, path: Path) -> None:
    try:
        plot(found, str(path))
    except ImportError:
        raise typer.BadParameter("matplotlib is not installed", param_hint="--png") from None


if __name__ == "__main__":
    app()
