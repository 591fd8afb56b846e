"""One self-contained HTML page from result files: tables and SVG charts, no script, nothing fetched from anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from load.compare import flatten
from load.show import NAMES, spread, warnings
from load.svg import Axis, Line, chart
from load.units import LoadError, show_time

Json = dict[str, Any]
Run = tuple[str, Json, Json]  # name, settings, run

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #e3e7ee; --back: #fff; --warn: #9a3412; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c3442; --back: #12161d; --warn: #fdba74; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 2rem auto;
  max-width: 1180px; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } small, .soft { color: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1.2rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .6rem; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .title { font-size: 13px; font-weight: 600; fill: var(--ink); } svg .grid { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: 12px; color: var(--soft); }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: .35rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; font-size: 14px; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .8rem .25rem 0; text-align: left; }
td + td, th + th { text-align: right; } .warn { color: var(--warn); } .scroll { overflow-x: auto; }
"""


def _plain(value: float) -> str:
    return f"{value:,.6g}"


def page(documents: list[tuple[str, Json]], title: str = "signalbox load", lead: str = "") -> str:
    """The whole page. Everything that came from a server or a user is escaped.

    lead: HTML of a comparison that stands first, instead of rates against latencies.
    """
    runs = flatten(documents)
    body = [f"<h1>{escape(title)}</h1>", _machines(documents)]
    searches = [document["search"] for _, document in documents if document.get("search")]
    body += [_search(search) for search in searches]
    body += [_failure(document) for _, document in documents if document.get("failure")]
    charts = [_rate_chart(runs, rank) for rank in ("p50", "p95", "p99")] if len(runs) > 1 and not lead else []
    body.append(lead or side_by_side("Rate against latency", charts))
    for run in runs:
        body.append(_section(run))
    return shell(title, "".join(body))


def shell(title: str, body: str) -> str:
    """A self-contained page around `body`, which is HTML already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{body}</body></html>\n"
    )


def write(text: str, path: Path) -> None:
    """Raises LoadError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LoadError(f"cannot write {path}: {error.strerror or error}") from None


def _machines(documents: list[tuple[str, Json]]) -> str:
    rows = []
    for name, document in documents:
        machine = document["machine"]
        what = (
            f"{machine['cores']} cores, {machine['processor']}, {machine['system']}, Python {machine['python']}, "
            f"signalbox {machine['signalbox']}"
        )
        rows.append(f"<tr><td>{escape(name)}</td><td>{escape(document['created'])}</td><td>{escape(what)}</td></tr>")
    return f"<table><tr><th>file</th><th>made</th><th>generator</th></tr>{''.join(rows)}</table>"


def _failure(document: Json) -> str:
    return f'<p class="warn">{escape(document["failure"])}</p>'


def _verdict(probe: Json) -> str:
    return "met" if probe["met"] else "void: the generator was late" if probe["void"] else "missed"


def _search(search: Json) -> str:
    found = f"{search['rate']:.4g} requests/s" if search["rate"] else "none"
    rows = "".join(f"<tr><td>{probe['rate']:.4g}</td><td>{_verdict(probe)}</td></tr>" for probe in search["probes"])
    return (
        f"<h2>Highest rate that meets the objectives: {escape(found)}</h2>"
        f'<p class="soft">limited by {escape(search["limited_by"])}; objectives {escape(", ".join(search["slo"]))}</p>'
        f"<table><tr><th>requests/s</th><th>verdict</th></tr>{rows}</table>"
    )


def _section(run: Run) -> str:
    name, settings, figures = run
    warned = "".join(f'<p class="warn">{escape(text)}</p>' for text in warnings(figures))
    asked = escape(", ".join(f"{key} {value}" for key, value in settings.items()))
    return (
        f"<h2>{escape(name)}: {escape(figures['label'])}</h2>{warned}"
        f'<div class="scroll">{_latency_table(figures)}</div>{_other_table(figures)}{_slo_table(figures)}'
        + side_by_side("", [*_time_charts(figures), _cdf(figures), *_server_charts(figures)])
        + f'<p class="soft">{asked}</p>'
    )


def side_by_side(title: str, charts: Sequence[str]) -> str:
    """Charts side by side under a heading; "" where there are none."""
    drawn = "".join(f"<figure>{one}</figure>" for one in charts if one)
    heading = f"<h2>{escape(title)}</h2>" if title and drawn else ""
    return f'{heading}<div class="charts">{drawn}</div>' if drawn else ""


def _latency_table(run: Json) -> str:
    ranks = ("mean", "p50", "p90", "p95", "p99", "p99.9")
    head = "".join(f"<th>{rank}</th>" for rank in ranks)
    rows = []
    for metric, title in NAMES.items():
        found = run["latency"][metric]
        if found:
            cells = "".join(f"<td>{escape(spread(found[rank]))}</td>" for rank in ranks)
            rows.append(f"<tr><td>{title}</td>{cells}<td>{show_time(found['max'])}</td><td>{found['count']}</td></tr>")
    return f"<table><tr><th></th>{head}<th>max</th><th>count</th></tr>{''.join(rows)}</table>"


def _other_table(run: Json) -> str:
    rates, lag = run["rates"], run["generator"]["lag"]
    counts, tokens = run["counts"]["all"], run["tokens"]
    rows = {
        "requests/s": spread(rates["requests_per_s"], "number"),
        "offered requests/s": f"{rates['offered_requests_per_s']:.4g}" if rates["offered_requests_per_s"] else "-",
        "output tokens/s": spread(rates["output_tokens_per_s"], "number"),
        "completed": f"{counts['completed']} of {counts['sent']}",
        "rejected": str(counts["rejected"]),
        "failed": str(counts["failed"]),
        "status": ", ".join(f"{status}: {number}" for status, number in counts["statuses"].items()),
        "tokens per event": f"{tokens['tokens_per_event']:.3g}" if tokens["tokens_per_event"] else "-",
        "cached prompt tokens": f"{tokens['cached_share']:.1%}" if tokens["cached_share"] is not None else "-",
        "cost": f"${run['cost']['usd']:.4g}" if run["cost"] else "-",
        "send lag p50 / p99": f"{show_time(lag['p50'])} / {show_time(lag['p99'])}",
        "warm-up": f"{run['window']['warmup']['cut']} requests ({run['window']['warmup']['rule']})",
    }
    return pairs(rows)


def pairs(rows: dict[str, str]) -> str:
    return (
        "<table>" + "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in rows.items()) + "</table>"
    )


def _slo_table(run: Json) -> str:
    if not run["slo"]:
        return ""
    rows = {}
    for one in run["slo"]["objectives"]:
        scale = "percent" if one["name"] == "error_rate" else "time"
        bound = f"{one['bound']:.2%}" if scale == "percent" else show_time(one["bound"])
        rows[f"{one['name']} <= {bound}"] = ("met: " if one["met"] else "MISSED: ") + spread(one["value"], scale)
    rows["goodput, requests/s"] = spread(run["slo"]["goodput_requests_per_s"], "number")
    rows["attainment"] = spread(run["slo"]["attainment"], "percent")
    rows["reject rate"] = spread(run["slo"]["reject_rate"], "percent")
    return pairs(rows)


# ------------------------------------------------------------------------------------------------------------ charts

_SECONDS = Axis("seconds since the start", _plain)


def _time_charts(run: Json) -> list[str]:
    line = run["timeline"]
    when = line["t"]
    charts = []
    for metric in ("ttft", "e2e"):
        lines = [
            Line(f"p{rank}", list(zip(when, line.get(f"{metric}_p{rank}", []), strict=False))) for rank in (50, 95, 99)
        ]
        charts.append(chart(f"{NAMES[metric]} over time", _SECONDS, Axis("", show_time), lines))
    rates = [Line(name, list(zip(when, line.get(key, []), strict=False))) for name, key in _RATES]
    charts.append(chart("Requests a second", _SECONDS, Axis("", _plain), rates))
    flight = [Line("in flight", list(zip(when, line.get("in_flight", []), strict=False)))]
    charts.append(chart("Requests in flight", _SECONDS, Axis("", _plain), flight))
    return charts


_RATES = (("due", "sent_per_s"), ("completed", "completed_per_s"))


def distribution(run: Json, metric: str) -> list[tuple[float, float | None]]:
    """(value, share of requests up to it) of a metric that was measured."""
    values = run["latency"][metric]["cdf"]
    return [(value, position / (len(values) - 1)) for position, value in enumerate(values)]


def _cdf(run: Json) -> str:
    lines = []
    for metric in ("ttft", "tpot", "itl", "e2e"):
        if run["latency"][metric]:
            lines.append(Line(NAMES[metric], distribution(run, metric)))
    axis = Axis("latency", show_time, log=True)
    return chart("Cumulative distributions", axis, Axis("", lambda share: f"{share:.0%}"), lines)


def _rate_chart(runs: Sequence[Run], rank: str) -> str:
    def of(read: Callable[[Json], float | None]) -> list[tuple[float, float | None]]:
        points = []
        for _, _, run in runs:
            rate = run["rates"]["offered_requests_per_s"] or run["rates"]["requests_per_s"]["value"]
            if rate:
                points.append((rate, read(run)))
        return sorted((point for point in points if point[1] is not None), key=lambda point: point[0])

    def figure(metric: str) -> Callable[[Json], float | None]:
        return lambda run: run["latency"][metric][rank]["value"] if run["latency"][metric] else None

    lines = [Line(NAMES[metric], of(figure(metric))) for metric in ("ttft", "tpot", "e2e")]
    axis = Axis("offered requests/s (completed ones in a closed loop)", _plain)
    return chart(f"Rate against latency, {rank}", axis, Axis("", show_time, log=True), lines, marks=True)


def _server_charts(run: Json) -> list[str]:
    """One chart per metric, one line per replica (or whatever labels tell apart)."""
    names: dict[str, list[Line]] = {}
    for series in run["server"]:
        points = list(zip(series["times"], series["values"], strict=True))
        label = ", ".join(re.findall(r'="([^"]*)"', series["labels"])) or "server"
        names.setdefault(series["name"], []).append(Line(label, points))
    titles = {
        "num_requests_running": "Replicas: requests running",
        "num_requests_waiting": "Replicas: requests waiting",
        "kv_cache_usage_perc": "Replicas: KV cache in use",
        "num_running_reqs": "Replicas: requests running",
        "num_queue_reqs": "Replicas: requests waiting",
    }
    return [
        chart(title, _SECONDS, Axis("", _plain), names[name][:16]) for name, title in titles.items() if name in names
    ]
