"""One model's weights in the forms that different engines read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from load.units import LoadError


def cache_dir() -> Path:
    """As the engine has it: SIGNALBOX_CACHE, else XDG_CACHE_HOME/signalbox, else ~/.cache/signalbox."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "signalbox"
    return Path(os.environ.get("SIGNALBOX_CACHE") or root).expanduser()


def exported(model: Path) -> Path:
    """The same weights as a Hugging Face folder in float32, written once into the cache."""
    target = cache_dir() / "bench" / f"{model.stem}-float32"
    command = [sys.executable, "-m", "replicas.engine.export", "--model", str(model), "--output", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LoadError(f"cannot export {model}:\n{done.stderr.strip()[-2000:]}")
    return target


def gguf(model: Path) -> Path:
    """The model's GGUF file. LoadError where it has none, or several."""
    found = [model] if model.suffix == ".gguf" else sorted(model.glob("*.gguf"))
    if len(found) != 1:
        raise LoadError(f"{model} holds {len(found)} .gguf files; llama.cpp needs exactly one")
    return found[0]
