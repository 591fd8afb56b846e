"""Quantised checkpoints that other people's packages write: does our engine read what they read?

    python -m load.check_foreign --model FOLDER --gguf FILE [--dir DIR] [--only PACKAGE ...]

FOLDER holds a model in float32 (`python -m replicas.engine.export` makes one of a GGUF), FILE is a GGUF. Each package
is installed by pip into an environment of its own on the first run (--peers); load/foreign_writers.py runs there,
writes a checkpoint for each of its cases into DIR/PACKAGE and says what weights the package itself makes of it. Our
engine then reads the same folder (`python -m replicas.engine.check_weights`): its weights must be the same bits. What
is in DIR already is not written again. Exit status 1 if weights differ or a checkpoint is refused; what the package
itself could not write is only shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from load.environments import AUTO_ROUND, LLM_COMPRESSOR, ROOT, Environment, interpreter
from load.foreign_writers import CASES
from load.units import LoadError

ENVIRONMENTS: dict[str, Environment] = {"auto-round": AUTO_ROUND, "llm-compressor": LLM_COMPRESSOR, "gguf": AUTO_ROUND}
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "CUDA_VISIBLE_DEVICES": ""}


def written(python: Path, package: str, model: Path, out: Path) -> Iterator[dict[str, Any]]:
    """What the package says of each case as it comes; its own words are in OUT.log."""
    out.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("foreign_writers.py")
    command = [str(python), "-P", str(script), package, str(model.absolute()), str(out.absolute())]
    with (
        out.with_suffix(".log").open("w") as log,
        subprocess.Popen(
            command, env={**os.environ, **_OFFLINE}, stdout=subprocess.PIPE, stderr=log, text=True
        ) as child,
    ):
        assert child.stdout is not None, "its output is a pipe"
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode:
        raise LoadError(f"{package} ended with exit status {child.returncode}; what it said: {log.name}")


def read(folder: Path) -> dict[str, Any]:
    """What our engine makes of a checkpoint; `error` where it refuses it."""
    dense = folder.with_name(f"{folder.name}.safetensors")
    command = [sys.executable, "-m", "replicas.engine.check_weights", str(folder), str(dense)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode in (0, 1) and done.stdout:
        return {**json.loads(done.stdout), "equal": done.returncode == 0}
    return {"error": (done.stderr.strip().splitlines() or ["no word"])[-1]}


def told(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"REFUSED {found['error']}"
    layers = "; ".join(f"{count} x {kind}" for kind, count in found["held"].items())
    equal = found["matrices"] - len(found["differing"])
    word = "equal  " if found["equal"] else "DIFFERS"
    every = found["matrices"] + len(found["missing"])
    return f"{word} {equal} of {every} (off by {found['worst']:.2g} at most); {layers}; {found['text']!r}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m load.check_foreign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--dir", type=Path, default=ROOT / "foreign", help=f"for checkpoints ({ROOT / 'foreign'})")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--peers", type=Path, default=ROOT, help=f"where environments are, or are made ({ROOT})")
    options = parser.parse_args()
    wrong = 0
    try:
        for package in options.only:
            python = interpreter(ENVIRONMENTS[package], options.peers)
            model = options.gguf if package == "gguf" else options.model
            for case in written(python, package, model, options.dir / package):
                label = f"{package:15} {case['case']:28}"
                if "error" in case:
                    print(f"{label}not written: {case['error'].splitlines()[0][:150]}", flush=True)
                    continue
                found = read(options.dir / package / case["case"])
                wrong += not found.get("equal", False)
                print(f"{label}{told(found)}", flush=True)
    except (LoadError, OSError) as error:
        print(f"check_foreign: {error}", file=sys.stderr)
        return 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
