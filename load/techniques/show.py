"""The table on a terminal, in Markdown between two marks of a file, and as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from load.report import pairs, shell, side_by_side
from load.svg import Axis, Line, chart
from load.techniques.catalogue import BY_NAME, NOT_BUILT, TECHNIQUES
from load.techniques.figures import broken, change, cost, first_token, latency, priced, quality, ratio_words, throughput
from load.units import LoadError, show_time

Json = dict[str, Any]
BEGIN = "<!-- techniques: written by `python -m load.techniques --show --readme`, do not edit -->"
END = "<!-- end of techniques -->"
BUSY = 1.5  # load average above that of the rows themselves, which use every core
COLUMNS = ("technique", "traffic", "tokens/s", "TTFT", "ITL", "USD per million tokens", "quality", "published")


def lines(document: Json) -> Iterator[tuple[str, ...]]:
    """The cells of COLUMNS, a line for every kind of traffic; a row's quality and promise on its first line only."""
    rows = {row["row"]: row for row in document["rows"]}
    for technique in TECHNIQUES:
        row = rows.get(technique.name, {})
        if "cases" not in row and "failed" not in row:
            why = "not built" if technique.kind == NOT_BUILT else "not measured"
            yield technique.title, why, "-", "-", "-", "-", "-", technique.published
        elif "failed" in row:
            yield technique.title, "failed", "-", "-", "-", "-", row["failed"].splitlines()[0], technique.published
        else:
            for number, case in enumerate(row["cases"]):
                turns = priced(case, document["usd_per_hour"])
                words = (throughput(turns), first_token(turns), latency(turns, "itl") or "-", cost(turns))
                first = number == 0
                ends = (quality(row["quality"]), technique.published) if first else ("", "")
                yield technique.title if first else "", case["workload"], *words, *ends


def caption(document: Json) -> str:
    """What the figures were measured on, and how they are to be read."""
    machine, inputs = document["machine"], document["inputs"]
    seconds = sum(row.get("seconds", 0.0) for row in document["rows"])
    load = max((row.get("load_before", 0.0) for row in document["rows"]), default=0.0)
    busy = (
        f" OTHER PROGRAMS WERE RUNNING (load average up to {load:.0f}): absolute figures are far too low, ratios rough."
        if load > machine["cores"] + BUSY
        else ""
    )
    quick = " Quick sizes: these figures only show that everything runs." if inputs["quick"] else ""
    return (
        f"{inputs['model']} on {machine['cores']} cores of {machine['processor']}. Off → on: medians of "
        f"{inputs['turns']} turns each (off, on, off, on, …), the median ratio of the turns and its range. Latencies "
        f"as docs/load.md defines them. USD: {document['usd_per_hour']:g} an hour for this machine, over its output "
        f"tokens; of right-size by the price list, over all tokens. Took {seconds / 60:.0f} minutes.{busy}{quick}"
    )


def terminal(document: Json) -> Table:
    table = Table(title="techniques, off → on", caption=caption(document), show_lines=True)
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for cells in lines(document):
        table.add_row(*cells)
    return table


# ----------------------------------------------------------------------------------------------------------- Markdown


def markdown(document: Json) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    table = [row(COLUMNS), "|" + "---|" * len(COLUMNS), *(row(cells) for cells in lines(document))]
    return "\n".join([*table, "", caption(document)])


def into(path: Path, document: Json) -> None:
    """Put the table between the marks of a Markdown file. LoadError where it has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LoadError(f"--readme: cannot read {path}: {error.strerror or error}") from None
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not begun or not ended:
        raise LoadError(f"--readme: {path} has no place for the table: two lines {BEGIN!r} and {END!r}")
    path.write_text(f"{before}{BEGIN}\n\n{markdown(document)}\n\n{END}{after}", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- HTML


def page(document: Json) -> str:
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for cells in lines(document)
    )
    body = (
        f"<h1>Techniques, off → on</h1><p>{escape(caption(document))}</p>"
        f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>'
    )
    return shell(
        "signalbox techniques", body + "".join(_section(row, document["usd_per_hour"]) for row in document["rows"])
    )


def _section(row: Json, usd_per_hour: float) -> str:
    title = escape(BY_NAME[row["row"]].title)
    if "cases" not in row:
        return f"<h2>{title}</h2><p>{escape(row.get('failed', 'not built'))}</p>"
    warned = f'<p class="warn">{escape(broken(row))}</p>' if broken(row) else ""
    settings = {"measured on": row["where"], "took": show_time(row["seconds"]), "quality": quality(row["quality"])}
    for side in ("off", "on"):
        settings[f"{side}: {row[side]['means']}"] = row[side]["fleet"]
    parts = [f"<h2>{title}</h2>{warned}{pairs(settings)}"]
    for case in row["cases"]:
        turns = priced(case, usd_per_hour)
        parts += [
            f'<p class="soft">{escape(case["workload"])}</p>',
            pairs(_changes(turns)),
            side_by_side("", _charts(turns)),
        ]
    return "".join(parts)


def _changes(turns: Sequence[Json]) -> dict[str, str]:
    """Every figure that both sides have in every turn."""
    words = {}
    for name in turns[0]["on"]:
        found = change(turns, name)
        if found:
            times = name.endswith("_s") and not name.endswith("per_s")
            form = show_time if times or name == "seconds" else "{:.4g}".format
            words[name.removesuffix("_s") if times else name] = (
                f"{form(found.off)} → {form(found.on)}, {ratio_words(found)}"
            )
    return words


_CHARTS = {
    "tokens_per_s": "tokens/s",
    "ttft_p50_s": "TTFT p50, s",
    "itl_p95_s": "ITL p95, s",
    "e2e_p50_s": "E2E p50, s",
}


def _charts(turns: Sequence[Json]) -> list[str]:
    """Both sides turn by turn, so that a reader sees how far they scatter."""
    return [
        chart(
            title,
            Axis("turn", "{:g}".format),
            Axis("", "{:,.4g}".format),
            [Line(side, [(n, turn[side][name]) for n, turn in enumerate(turns, 1)]) for side in ("off", "on")],
            marks=True,
        )
        for name, title in _CHARTS.items()
        if all(turn[side].get(name) is not None for turn in turns for side in ("off", "on"))
    ]
