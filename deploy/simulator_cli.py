"""`signalbox simulate calibrate | run`: a fleet in virtual time that answers as the measured one does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from policies.sim_fleet import Autoscale, Fleet, Outage
    from policies.sim_replica import ReplicaModel
    from policies.simulator import SimResult
    from policies.traces import TraceRequest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Calibrate the simulator on a measured run, and let it tell what another would bring.",
)

Replicas = Annotated[int, typer.Option(min=0, help="How many; 0 is what the fleet file says, else 1.")]
FleetFile = Annotated[
    Path | None, typer.Option("--fleet", help="Fleet file: replicas, gateways and the engine's settings.")
]
ModelName = Annotated[str, typer.Option("--model", help="Which of the fleet file's models; by default its first.")]
Trace = Annotated[Path | None, typer.Option(help="Mooncake .jsonl, Azure .csv, recorded .jsonl or its folder.")]
LengthScale = Annotated[int, typer.Option(min=1, help="Divide the trace's lengths by this.")]
TimeScale = Annotated[float, typer.Option(min=1e-6, help="The trace this many times as fast.")]


@app.command()
def calibrate(
    run: Annotated[Path, typer.Argument(metavar="RUN.json", help="From `signalbox load run --out RUN.json`.")],
    out: Annotated[Path, typer.Option(help="Where to write the model.")],
    trace: Trace = None,
    length_scale: LengthScale = 1,
    fleet: FleetFile = None,
    model: ModelName = "",
    replicas: Replicas = 0,
    blocks: Annotated[int, typer.Option(min=0, help="KV blocks of a replica; 0 is what the fleet file says.")] = 0,
) -> None:
    """Find the replica model that explains a run: times of a step, prefill rate, the gateway's share.

    Give the trace that was replayed, if one was: only then are shared prefixes known.
    """
    from policies.calibrate import fit, observe

    described = described_fleet(fleet, model, replicas, blocks)
    document = read_json(run)
    runs = document.get("runs") if isinstance(document, Mapping) else None
    if not isinstance(runs, list) or len(runs) != 1 or not isinstance(runs[0], Mapping):
        raise typer.BadParameter(f"{run} does not hold one run of `signalbox load run`", param_hint="RUN.json")
    try:
        requests = read_requests(trace, length_scale) if trace is not None else None
        observed = observe(runs[0], requests, described.model.block_size)
    except ValueError as error:
        raise typer.BadParameter(f"{run}: {error}", param_hint="RUN.json") from None
    found = fit(observed, described)
    out.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    shown = found.model
    typer.echo(
        f"{found.requests} requests: prefill {shown.prefill_rate:.0f} tokens/s; a step {shown.step_s * 1e3:.2f} ms + "
        f"the larger of {shown.floor_s * 1e3:.2f} ms and {shown.decode_s * 1e3:.2f} ms a sequence; "
        f"{shown.context_s * 1e9:.1f} ns a token of context; the gateway {found.gateway_s * 1e3:.1f} ms"
    )
    typer.echo(
        f"off by (median): time to first token {found.ttft_error:.1%}, time per further token {found.tpot_error:.1%}"
    )


@app.command()
def run(
    trace: Annotated[Path, typer.Option(help="Mooncake .jsonl, Azure .csv, recorded .jsonl or its folder.")],
    replica: Annotated[Path | None, typer.Option(help="A model made by `calibrate`; without one, defaults.")] = None,
    policy: Annotated[str, typer.Option(help="How a replica is chosen.")] = "affinity",
    length_scale: LengthScale = 1,
    time_scale: TimeScale = 1.0,
    fleet: FleetFile = None,
    model: ModelName = "",
    replicas: Replicas = 0,
    blocks: Annotated[int, typer.Option(min=0, help="KV blocks of a replica; 0 is what the fleet file says.")] = 0,
    outage: Annotated[
        list[str] | None,
        typer.Option(metavar="N@AT:FOR", help="Replica N dies AT s and is back FOR s later; repeatable."),
    ] = None,
    autoscale: Annotated[
        str, typer.Option(metavar="MIN-MAX@TARGET", help="As many replicas as have TARGET requests each.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of ties.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures there.")] = None,
) -> None:
    """What a fleet would do with a trace: latencies, throughput, hit rate."""
    from dataclasses import replace

    from policies.peers import POLICIES
    from policies.simulator import prepare, simulate
    from policies.traces import scaled

    if policy not in POLICIES:
        raise typer.BadParameter(f"{policy!r} is none of {', '.join(POLICIES)}", param_hint="--policy")
    described = described_fleet(fleet, model, replicas, blocks, replica)
    try:
        described = replace(
            described,
            outages=tuple(parse_outage(one) for one in outage or ()),
            autoscale=parse_autoscale(autoscale) if autoscale else None,
        )
        requests = scaled(read_requests(trace, length_scale), rate_scale=time_scale)
        result = simulate(prepare(requests, described.model.block_size), policy, described, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    found = figures(result)
    for name, value in found.items():
        typer.echo(f"{name:26} {value:.4f}" if isinstance(value, float) else f"{name:26} {value}")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


def figures(result: SimResult) -> dict[str, Any]:
    """A result as JSON; seconds, and rates a second."""
    import numpy as np

    tpot = np.array([float("nan")])
    outcomes = result.outcomes
    outputs = outcomes.column("output_tokens")
    several = outputs > 1
    if several.any():
        tpot = (outcomes.column("e2e_s") - outcomes.column("ttft_s"))[several] / (outputs[several] - 1)
    return {
        "requests": result.requests,
        "completed": result.completed,
        "too_long": result.refused,
        "unavailable": result.unavailable,
        "cut": result.cut,
        "ttft_p50_s": result.ttft(50),
        "ttft_p95_s": result.ttft(95),
        "tpot_p50_s": float(np.nanmedian(tpot)) if several.any() else float("nan"),
        "e2e_p50_s": float(np.percentile(result.e2e_s, 50)) if result.completed else float("nan"),
        "e2e_p95_s": float(np.percentile(result.e2e_s, 95)) if result.completed else float("nan"),
        "requests_per_s": result.throughput,
        "output_tokens_per_s": result.output_tokens / result.duration_s if result.duration_s else 0.0,
        "hit_rate": result.hit_rate,
        "duration_s": result.duration_s,
        "replica_s": sum(share.up_s for share in result.replicas),
    }


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from None


def read_requests(trace: Path, length_scale: int) -> list[TraceRequest]:
    """A trace's requests; a bad one is refused by file and line."""
    from policies.traces import TraceError, read_trace, scaled

    try:
        return scaled(read_trace(trace), length_scale=length_scale)
    except (TraceError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--trace") from None


def read_replica(path: Path) -> tuple[ReplicaModel, float]:
    from policies.calibrate import read_model

    try:
        return read_model(read_json(path))
    except ValueError as error:
        raise typer.BadParameter(f"{path}: {error}") from None


def described_fleet(
    fleet: Path | None, name: str = "", replicas: int = 0, blocks: int = 0, replica: Path | None = None
) -> Fleet:
    """One model's replicas and gateways, from the fleet file, overruled by what else is given."""
    from dataclasses import replace

    from policies.sim_fleet import Fleet
    from policies.sim_replica import ReplicaModel

    model, gateway_s, gateways, count = ReplicaModel(), 0.0, 1, 1
    if fleet is not None:
        from deploy.fleet import load

        file = load(fleet)
        found = next((one for one in file.local if name in ("", one.name, *one.aliases)), None)
        if found is None:
            names = ", ".join(one.name for one in file.local)
            raise typer.BadParameter(f"{fleet} has no model {name!r} of its own; it has {names}", param_hint="--model")
        model, gateways, count = (
            model_of(getattr(found, "engine", ""), found.settings),
            file.gateway.replicas,
            found.replicas.min,
        )
    if replica is not None:
        model, gateway_s = read_replica(replica)
    if blocks:
        model = replace(model, num_blocks=blocks)
    return Fleet(replicas=replicas or count, gateways=gateways, model=model, gateway_s=gateway_s)


# Settings of an engine that mean the same to a simulated one.
_SAME = (
    "num_blocks",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_waiting",
    "max_model_len",
    "watermark",
)


def model_of(engine: str, settings: Mapping[str, Any]) -> ReplicaModel:
    """What a fleet file says of a replica. A fake engine's rates stand there; a real one's must be measured."""
    from policies.sim_replica import ReplicaModel

    stated = {name: settings[name] for name in _SAME if settings.get(name) is not None}
    if engine == "fake":
        from replicas.fake_settings import FakeSettings

        fake = FakeSettings(**settings)
        stated = {name: getattr(fake, name) for name in _SAME if hasattr(fake, name)}
        # Its prompts are computed one after another while its answers go on: as many prompt tokens a step as fit beside
        # a token of each of a few answers.
        rate, token_s = fake.prefill_tokens_per_s or 1e8, 1.0 / fake.tokens_per_s if fake.tokens_per_s else 1e-4
        return ReplicaModel(
            **stated,
            prefill_rate=rate,
            floor_s=token_s,
            step_s=0.0,
            decode_s=0.0,
            max_num_batched_tokens=int(rate * token_s) + 4,
            watermark=0.0,
        )
    return ReplicaModel(**stated)


def parse_outage(text: str) -> Outage:
    """`0@20:6`, or `0@20` for ever."""
    from policies.sim_fleet import Outage

    found = re.fullmatch(r"(\d+)@(\d+(?:\.\d+)?)(?::(\d+(?:\.\d+)?))?", text)
    if not found:
        raise ValueError(f"--outage {text!r}: write REPLICA@SECONDS:FOR, as in 0@20:6")
    down = {} if found[3] is None else {"down_s": float(found[3])}
    return Outage(replica=int(found[1]), at_s=float(found[2]), **down)


def parse_autoscale(text: str) -> Autoscale:
    """`1-8@4`: from 1 to 8 replicas, 4 requests each."""
    from policies.sim_fleet import Autoscale

    found = re.fullmatch(r"(\d+)-(\d+)@(\d+(?:\.\d+)?)", text)
    if not found:
        raise ValueError(f"--autoscale {text!r}: write MIN-MAX@TARGET, as in 1-8@4")
    return Autoscale(least=int(found[1]), most=int(found[2]), target=float(found[3]))
