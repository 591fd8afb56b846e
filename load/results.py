"""Result files: one JSON document, versioned. docs/load.md describes the schema."""

from __future__ import annotations

import json
import math
import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from load.units import LoadError

SCHEMA = "signalbox.load/1"
Json = dict[str, Any]


def document(kind: str, settings: Json, runs: list[Json], **more: Any) -> Json:
    """kind: "run", "sweep" (several rates) or "search" (--find-max-rate). `settings` is what the user asked for."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "settings": settings,
        "runs": runs,
        **more,
    }


def machine() -> Json:
    """Of the generator. Names no host and no user."""
    try:
        version = metadata.version("signalbox")
    except metadata.PackageNotFoundError:
        version = "unknown"
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "signalbox": version,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(path: Path, content: Json) -> None:
    """Whole or not at all: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(_finite(content), separators=(",", ":"), allow_nan=False) + "\n")
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise LoadError(f"cannot write {path}: {error.strerror or error}") from None


def _finite(value: Any) -> Any:
    """JSON knows no NaN; None stands for what was not measured."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value


def read(path: Path) -> Json:
    """Raises LoadError for a file that is none of ours."""
    found = read_json(path)
    if found.get("schema") != SCHEMA:
        raise LoadError(
            f"{path} is not a result of `signalbox load run` (schema {found.get('schema')!r}, wanted {SCHEMA!r})"
        )
    if not isinstance(found.get("runs"), list):
        raise LoadError(f"{path} holds no runs")
    return found


def read_json(path: Path) -> Json:
    """A file's object, {} where it holds something else. Raises LoadError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LoadError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} is not JSON: {error}") from None
    return dict(found) if isinstance(found, dict) else {}
