"""The run: row after row; what was measured is kept and not measured again by the same command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from load import results
from load.techniques import affinity, right_size
from load.techniques.catalogue import ENGINE, NOT_BUILT, TECHNIQUES, Technique
from load.units import LoadError

Json = dict[str, Any]
SCHEMA = "signalbox.techniques/1"


@dataclass(frozen=True, slots=True)
class Options:
    """What a user asked for. Paths that are None stand for what is built in. rows: names; all of them by default."""

    model: Path
    folder: Path
    azure: Path | None = None
    mooncake: Path | None = None
    scores: Path | None = None
    prices: Path | None = None
    text: Path | None = None
    turns: int = 3
    draft: Path | None = None
    usd_per_hour: float = 0.1
    rows: tuple[str, ...] = tuple(one.name for one in TECHNIQUES)
    quick: bool = False
    again: bool = False

    def key(self) -> Json:
        """What a row's figures depend on; rows of another key are measured again. Paths by their names only."""
        files = {
            name: getattr(self, name) for name in ("model", "draft", "azure", "mooncake", "scores", "prices", "text")
        }
        named = {name: path.name if path else "built in" for name, path in files.items()}
        return {**named, "turns": self.turns, "quick": self.quick}


def run(options: Options, console: Console) -> Iterator[Json]:
    """The document so far, after every row. A row that cannot be measured says why, and the others go on."""
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Json] = {} if options.again else _kept(options)
    rows |= {one.name: {"row": one.name, "not_built": True} for one in TECHNIQUES if one.kind == NOT_BUILT}
    for technique in TECHNIQUES:
        if technique.name in options.rows and (options.again or not _whole(rows.get(technique.name))):
            rows[technique.name] = _row(technique, options, console)
            yield document(options, rows)
    yield document(options, rows)


def _whole(row: Json | None) -> bool:
    return row is not None and "failed" not in row


def _kept(options: Options) -> dict[str, Json]:
    """Rows of an earlier run with the same inputs on the same machine."""
    path = options.folder / "techniques.json"
    if not path.exists():
        return {}
    found = read(path)
    if found["inputs"] != options.key() or found["machine"] != results.machine():
        return {}
    return {row["row"]: row for row in found["rows"]}


def _row(technique: Technique, options: Options, console: Console) -> Json:
    console.print(f"{technique.title} …", highlight=False)
    started, busy = time.perf_counter(), os.getloadavg()[0]

    def say(text: str) -> None:
        console.print(f"  {text}", highlight=False, markup=False)

    try:
        match technique.name:
            case "affinity":
                found = affinity.measure(options.mooncake, options.turns, options.quick, say)
            case "right-size":
                found = right_size.measure(options.scores, options.prices, options.turns, options.quick, say)
            case name:
                assert technique.kind == ENGINE, f"nobody measures {name!r}"
                found = _engine_row(name, options)
    except LoadError as error:
        say(f"failed: {error}")
        return {"row": technique.name, "failed": str(error)}
    return {
        **found,
        "row": technique.name,
        "seconds": round(time.perf_counter() - started, 1),
        "load_before": round(busy, 2),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _engine_row(name: str, options: Options) -> Json:
    """In a process of its own: this one knows no torch."""
    out = options.folder / f"{name}.json"
    command = [sys.executable, "-m", "replicas.engine.bench_techniques", name, "--model", str(options.model)]
    command += ["--turns", str(options.turns), "--work", str(options.folder / "weights"), "--json", str(out)]
    for option, path in (("--trace", options.azure), ("--text", options.text), ("--draft", options.draft)):
        command += [option, str(path)] if path else []
    command += ["--quick"] if options.quick else []
    last = ""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as worker:
        assert worker.stderr is not None, "opened with a pipe"
        try:
            for line in worker.stderr:
                sys.stderr.write(line)
                last = line.strip() or last
        except BaseException:
            worker.kill()
            raise
    if worker.returncode:
        raise LoadError(f"the engine's worker ended with {worker.returncode}: {last}")
    found = results.read_json(out)
    out.unlink()
    return found


def document(options: Options, rows: dict[str, Json]) -> Json:
    order = [one.name for one in TECHNIQUES]
    return {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": results.machine(),
        "inputs": options.key(),
        "usd_per_hour": options.usd_per_hour,
        "rows": sorted(rows.values(), key=lambda row: order.index(row["row"])),
    }


def read(path: Path) -> Json:
    """Raises LoadError for a file that is none of ours."""
    found = results.read_json(path)
    if found.get("schema") != SCHEMA:
        raise LoadError(f"{path} is no result of `python -m load.techniques` (schema {found.get('schema')!r})")
    return found
