"""`signalbox policy replay | score | traffic`: candidate generations on recorded traffic, and how well that foretold.

Also the gate of `signalbox policy publish --gate`.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy import instance, paths

if TYPE_CHECKING:
    from gateway.policy_register import PolicyRegister
    from policies.document import PolicyDocument
    from policies.replay import Change, Replay
    from policies.sim_rules import SimModel, World
    from policies.traffic import Recorded

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

Since = Annotated[str, typer.Option(help="How far back: 90s, 30m, 6h, 1d.")]
TrafficFolder = Annotated[
    Path | None, typer.Option("--traffic", help="Recorded traffic, a file or a folder; by default this home's.")
]
FleetFile = Annotated[Path | None, typer.Option("--fleet", help="Fleet file; by default the running instance's.")]
Replica = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=MODEL.json", help="A model made by `signalbox simulate calibrate`; repeatable."),
]
Database = Annotated[
    str, typer.Option(envvar="SIGNALBOX_DATABASE", help="SQLAlchemy URL; by default the running instance's.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all figures there.")]

CALIBRATION = "calibration"  # below the home: NAME.json of every model


@dataclass(frozen=True)
class Setting:
    """What a replay is made in."""

    world: World
    recorded: list[Recorded]


@app.command()
def replay(
    candidate: Annotated[str, typer.Argument(metavar="GEN|FILE", help="A generation's number or a document.")],
    since: Since = "1d",
    traffic: TrafficFolder = None,
    fleet: FleetFile = None,
    replica: Replica = None,
    database: Database = "",
    json_file: JsonFile = None,
) -> None:
    """What a generation would change on recorded traffic: cost, latency, hit rate, rejects, blocked budgets."""
    from deploy.generations_cli import register_of

    setting = setting_of(since, traffic, fleet, replica)
    with register_of(database) as register:
        found = foretell(register, document_of(register, candidate, setting.world), setting)
    show(found)
    if json_file is not None:
        json_file.write_text(json.dumps(found.as_json(), indent=2) + "\n")


@app.command()
def score(
    generation: Annotated[int, typer.Argument(help="A generation that was published as a canary, with a gate.")],
    traffic: TrafficFolder = None,
    database: Database = "",
    json_file: JsonFile = None,
) -> None:
    """Hold what the gate foretold of a canary against what its keys met while it served them."""
    from deploy.generations_cli import register_of, table
    from policies.replay import spell
    from policies.score import score as scored

    with register_of(database) as register:
        prediction = prediction_of(register, generation)
        switches = register.switches(generation)
    recorded = _read(traffic, 0.0)
    own = [one for one in recorded if one.generation == generation]
    others = [
        one
        for one in recorded
        if one.generation != generation and any(begin <= one.at < end for begin, end in switches)
    ]
    try:
        found = scored(prediction.get("split") or prediction["changes"], own, others)
    except ValueError as error:
        raise _refused(f"generation {generation}: {error}") from None
    rows = []
    for one in found:
        points = "%" if one.measured.relative else " points"
        rows.append((one.name, f"{one.predicted * 100:+.1f}{points}", spell(one.measured), "yes" if one.held else "no"))
    table(("change of", "foretold", f"measured ({len(own)} requests, {len(others)} of others)", "held"), rows)
    held = sum(one.held for one in found)
    typer.echo(f"{held} of {len(found)} predictions held")
    if json_file is not None:
        document = [
            {"name": one.name, "predicted": one.predicted, "held": one.held, "measured": one.measured.as_json()}
            for one in found
        ]
        json_file.write_text(json.dumps(document, indent=2) + "\n")


@app.command("traffic")
def show_traffic(
    since: Since = "1d",
    traffic: TrafficFolder = None,
    out: Annotated[Path | None, typer.Option(help="Write it as one file, for `signalbox load run --trace`.")] = None,
) -> None:
    """What the gateways have recorded: how much, by name and generation."""
    from deploy.generations_cli import table, when

    recorded = _read(traffic, time.time() - seconds_of(since))
    counts = Counter((one.asked, one.model or "-", str(one.generation)) for one in recorded)
    rows = [(*names, f"{count}") for names, count in sorted(counts.items())]
    table(("asked for", "answered by", "generation", "requests"), rows)
    typer.echo(f"{len(recorded)} requests from {when(recorded[0].at)} to {when(recorded[-1].at)}")
    if out is not None:
        with out.open("w", encoding="utf-8") as file:
            for one in recorded:
                plain = one.request
                line: dict[str, Any] = {
                    "time": plain.arrival_s,
                    "prompt_tokens": plain.prompt_tokens,
                    "output_tokens": plain.output_tokens,
                    "block_tokens": plain.block_tokens,
                    "hashes": [f"{name:016x}" for name in plain.prefix_ids],
                }
                file.write(json.dumps(line, separators=(",", ":")) + "\n")


# ------------------------------------------------------------------------------------------------------------- the gate


def pass_gate(
    register: PolicyRegister, text: str, gate: str, setting: Setting, author: str, share: float | None
) -> str:
    """What the audit log is to hold of a gate that was passed; typer.Exit(1) with the figures where it was not.

    Raises GateError before anything is simulated.
    """
    from policies.gate import parse_gate, violations
    from policies.replay import spell

    bounds = parse_gate(gate)
    candidate = parsed(text, setting.world)
    stated = candidate.canary.share if candidate.canary else 1.0
    found = foretell(register, candidate, setting, stated if share is None else share)
    show(found)
    broken = violations(bounds, found)
    detail = json.dumps(
        {"gate": gate, "passed": not broken, "changes": changes_of(found.changes), "requests": found.requests}
        | {"split": changes_of(found.split)}
    )
    if broken:
        reasons = "; ".join(
            f"{bound.text}: {bound.name} would be {change.after:.4g}, {spell(change)}" for bound, change in broken
        )
        register.note_refusal("publish", author, f"gate {gate}", f"the gate refuses it: {reasons}")
        raise _refused(f"the gate refuses it: {reasons}")
    typer.echo(f"the gate {gate!r} is passed")
    return detail


def changes_of(found: Sequence[Change]) -> dict[str, float]:
    return {one.name: one.value for one in found if not math.isnan(one.value)}


def prediction_of(register: PolicyRegister, generation: int) -> dict[str, Any]:
    """What was foretold when the generation was published; a refusal where nothing was."""
    for entry in register.audit(1000):
        if entry.action == "publish" and entry.outcome == "done" and entry.detail.startswith("{"):
            if entry.target.split(" for ")[0] == f"generation {generation}":
                found: dict[str, Any] = json.loads(entry.detail)
                return found
    raise _refused(f"generation {generation} was not published with a gate: nothing was foretold of it")


def foretell(register: PolicyRegister, candidate: PolicyDocument, setting: Setting, share: float = 1.0) -> Replay:
    """The candidate against what is active."""
    from policies.document import parse
    from policies.replay import replay as replayed
    from policies.sim_rules import compiled

    active = register.active()
    serving = compiled(active.number, parse(active.document), setting.world)
    rules = compiled(active.number + 1, candidate, setting.world)
    return replayed(setting.recorded, setting.world, serving, rules, share=share)


def parsed(text: str, world: World) -> PolicyDocument:
    from policies.document import FleetNames, parse

    names = FleetNames(
        tuple(model.name for model in world.models), tuple(alias for model in world.models for alias in model.aliases)
    )
    return parse(text, "policy", names=names)


def document_of(register: PolicyRegister, candidate: str, world: World) -> PolicyDocument:
    from policies.document import read_text

    if candidate.isdigit():
        return parsed(register.show(int(candidate)).document, world)
    return parsed(read_text(Path(candidate)), world)


def show(found: Replay) -> None:
    from deploy.generations_cli import table
    from policies.replay import FIGURES, spell

    rows = [
        (one.name, _plain(one.before, FIGURES[one.name].unit), _plain(one.after, FIGURES[one.name].unit), spell(one))
        for one in found.changes
    ]
    table(("figure", "serving", "candidate", "change (95 % interval)"), rows)
    typer.echo(f"{found.requests} recorded requests over {found.span_s:.0f} s")
    for note in found.notes:
        typer.echo(note)


def _plain(value: float, unit: str) -> str:
    if math.isnan(value):
        return "-"
    return f"{value * 100:.2f} %" if not unit else f"{value:.4g} {unit}"


# ---------------------------------------------------------------------------------------------------------- the setting


def setting_of(since: str, traffic: Path | None, fleet: Path | None, replica: Sequence[str] | None) -> Setting:
    """Raises typer.Exit(1) with one line where a model is not calibrated or nothing was recorded."""
    return Setting(world_of(fleet, replica or ()), _read(traffic, time.time() - seconds_of(since)))


def seconds_of(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|d)", text)
    if not found:
        raise typer.BadParameter(f"{text!r} is no time: write 90s, 30m, 6h or 1d", param_hint="--since")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86_400}[found[2]]


def _read(traffic: Path | None, since: float) -> list[Recorded]:
    from policies.traces import TraceError
    from policies.traffic import read_traffic

    path = traffic or paths.state_dir() / "traffic"
    try:
        found = read_traffic(path, since)
    except (TraceError, OSError) as error:
        raise _refused(str(error)) from None
    if not found:
        raise _refused(f"no traffic was recorded in {path} in that time; is gateway.traffic.record switched off?")
    return found


def world_of(fleet: Path | None, replica: Sequence[str] = ()) -> World:
    """The fleet file's models, each with what is known of its replicas' speed."""
    from deploy.fleet import DEFAULT_FLEET, load
    from policies.sim_rules import World

    if fleet is None:
        record = instance.running()
        if record is None:
            raise _refused("no instance is running: name its fleet file with --fleet")
        fleet = DEFAULT_FLEET if record.fleet == "default" else Path(record.fleet)
    files = {}
    for one in replica:
        name, equals, path = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"{one!r}: write NAME=MODEL.json", param_hint="--replica")
        files[name] = Path(path)
    file = load(fleet)
    return World(tuple(_model(model, file.gateway.replicas, files) for model in file.models))


def _model(model: Any, gateways: int, files: dict[str, Path]) -> SimModel:
    from deploy.simulator_cli import model_of, read_replica
    from policies.sim_fleet import Fleet
    from policies.sim_replica import ReplicaModel
    from policies.sim_rules import SimModel

    known = files.get(model.name, paths.state_dir() / CALIBRATION / f"{model.name}.json")
    gateway_s, count = 0.0, model.replicas.min
    if known.exists() or model.name in files:
        speed, gateway_s = read_replica(known)
    elif model.engine == "fake":
        speed = model_of("fake", model.settings)
    elif model.engine == "openai":
        # someone else's: as fast whoever asks, and never full
        speed, count = ReplicaModel(num_blocks=10**7, max_num_seqs=10**5, prefill_rate=1e4, step_s=0.02, decode_s=0), 1
    else:
        raise _refused(
            f"{model.name!r} is not calibrated: `signalbox simulate calibrate RUN.json --out {known}`, "
            f"or --replica {model.name}=MODEL.json"
        )
    return SimModel(
        name=model.name,
        aliases=model.aliases,
        price=model.price.model_dump(exclude_none=True),
        fleet=Fleet(replicas=max(1, count), gateways=gateways, model=speed, gateway_s=gateway_s),
    )


def _refused(reason: str) -> typer.Exit:
    typer.echo(f"signalbox: {reason}", err=True)
    return typer.Exit(1)
