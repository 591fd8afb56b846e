"""Compile kernels for a GPU that is not there: what Triton and ptxas accept, and what they make of it.

    TRITON_INTERPRET=0 python -m replicas.engine.triton.ahead [--capability 90] [--few]

runs the launching code on small CPU tensors with every launch replaced by a compilation, and prints a line a kernel:
registers, bytes spilled to local memory, shared memory. It says nothing about results or speed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from replicas.engine.triton.device import interpreting


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel's machine code. local_bytes: stack and spills of a thread. shared_bytes: of a block."""

    kernel: str
    constants: str
    registers: int
    local_bytes: int
    shared_bytes: int


@contextmanager
def compiling_for(capability: int) -> Iterator[list[Compiled]]:
    """Launches inside only compile, for compute capability `capability` (90 is Hopper); yields what they compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    assert not interpreting(), "the interpreter compiles nothing: unset TRITON_INTERPRET"
    done: dict[str, Compiled] = {}
    found: list[Compiled] = []
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in done:
            constants = ", ".join(f"{k}={v}" for k, v in kwargs.items() if k not in ("num_warps", "num_stages"))
            done[kernel.hash] = _measure(self.__name__, constants, kernel.asm["cubin"], kernel.metadata.shared)
            found.append(done[kernel.hash])

    driver = triton.runtime.driver
    active, JITFunction.run = driver._active, compile_only
    driver.set_active(_Elsewhere(GPUTarget("cuda", capability, 32)))
    try:
        yield found
    finally:
        JITFunction.run = launch
        driver._active = active


class _Elsewhere:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _measure(name: str, constants: str, cubin: bytes, shared: int) -> Compiled:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    figures = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", told.stdout))
    return Compiled(name, constants, int(figures["REG"]), int(figures["STACK"]) + int(figures["LOCAL"]), shared)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="compute capability times ten (90: Hopper)")
    parser.add_argument("--few", action="store_true", help="each kernel once or twice, not in every form")
    args = parser.parse_args()
    if interpreting():
        print("error: unset TRITON_INTERPRET: the interpreter compiles nothing", file=sys.stderr)
        return 1
    from replicas.engine.triton.cases import launch_each, launch_everything

    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(tempfile.gettempdir()) / "signalbox-triton-ahead"))
    with compiling_for(args.capability) as found, torch.inference_mode():
        (launch_each if args.few else launch_everything)(torch.device("cpu"))
    for kernel in sorted(found, key=lambda k: (k.kernel, k.constants)):
        print(
            f"{kernel.kernel:18} {kernel.registers:4} registers {kernel.local_bytes:5} B local "
            f"{kernel.shared_bytes:7} B shared  {kernel.constants}"
        )
    print(f"{len(found)} kernels for compute capability {args.capability / 10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
