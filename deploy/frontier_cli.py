"""`signalbox frontier`: what a knob of the policy costs and brings, at several loads, on recorded traffic."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deploy.replay_cli import Database, FleetFile, JsonFile, Replica, Since, TrafficFolder

if TYPE_CHECKING:
    from policies.sweep import Knob, Slo


def frontier(
    knob: Annotated[str, typer.Option(metavar="PATH=V,V,...", help="e.g. groups.chat.right_size.cost_weight=0,0.5,2")],
    slo: Annotated[str, typer.Option(help="What a request must meet: ttft=500ms, e2e=5s, or both with a blank.")],
    load: Annotated[list[float] | None, typer.Option(help="Times the recorded rate; repeatable.")] = None,
    document: Annotated[str, typer.Option("--policy", help="GEN or FILE; by default what is active.")] = "",
    since: Since = "1d",
    traffic: TrafficFolder = None,
    fleet: FleetFile = None,
    replica: Replica = None,
    database: Database = "",
    json_file: JsonFile = None,
    png: Annotated[Path | None, typer.Option(help="Plot; needs matplotlib.")] = None,
) -> None:
    """Sweep a policy knob and the load: cost per million in-SLO tokens against goodput, the live point marked."""
    from rich.console import Console

    from deploy.generations_cli import register_of, table
    from deploy.replay_cli import document_of, setting_of
    from policies.replay import asks_of
    from policies.sweep import plot, sweep

    turned, bounds, loads = parse_knob(knob), parse_slo(slo), load or [0.5, 1.0, 1.5, 2.0]
    if any(not one > 0 for one in loads):
        raise typer.BadParameter("must be positive", param_hint="--load")
    setting = setting_of(since, traffic, fleet, replica)
    with register_of(database) as register:
        chosen = document_of(register, document or str(register.state().active), setting.world)
    asks, notes = asks_of(setting.recorded)
    with Console(stderr=True).status("") as status:
        points = sweep(
            asks, setting.world, chosen, turned, loads, bounds, epoch=setting.recorded[0].at, progress=status.update
        )
    rows = [
        (
            "live" if point.live else str(point.value),
            f"{point.load:g}",
            f"{point.goodput:.3f}",
            f"{point.attainment * 100:.1f} %",
            "-" if point.usd_per_million is None else f"{point.usd_per_million:.4f}",
            "-" if point.ttft_p95_s is None else f"{point.ttft_p95_s:.3f}",
        )
        for point in points
    ]
    table((turned.path, "load", "requests/s in SLO", "attainment", "USD per M in-SLO tokens", "p95 TTFT s"), rows)
    for note in notes:
        typer.echo(note)
    if json_file is not None:
        json_file.write_text(
            json.dumps({"knob": turned.path, "slo": slo, "points": [one.as_json() for one in points]}, indent=2) + "\n"
        )
    if png is not None:
        try:
            plot(points, turned.path, str(png))
        except ImportError:
            raise typer.BadParameter("matplotlib is not installed", param_hint="--png") from None


def parse_knob(text: str) -> Knob:
    """`affinity.policy=affinity,round_robin`; values as YAML reads them."""
    from policies.sweep import Knob

    path, equals, values = text.partition("=")
    if not equals or not path or not values:
        raise typer.BadParameter(f"{text!r}: write PATH=V,V,...", param_hint="--knob")
    return Knob(path, tuple(_value(one) for one in values.split(",")))


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_slo(text: str) -> Slo:
    from policies.sweep import Slo

    bounds: dict[str, float] = {}
    for part in text.split():
        found = re.fullmatch(r"(ttft|e2e)=(\d+(?:\.\d+)?)(ms|s)", part)
        if not found:
            raise typer.BadParameter(f"{part!r}: write ttft=500ms or e2e=5s", param_hint="--slo")
        bounds[f"{found[1]}_s"] = float(found[2]) * (0.001 if found[3] == "ms" else 1.0)
    if not bounds:
        raise typer.BadParameter("write ttft=500ms or e2e=5s", param_hint="--slo")
    return Slo(**bounds)
