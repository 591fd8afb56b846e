"""Compile kernels for a GPU that is not there: what Triton and ptxas accept, and what they make of it.

    TRITON_INTERPRET=0 python -m replicas.engine.triton.ahead [--capability 90] [--few]

runs the launching code on small CPU tensors with every launch replaced by a compilation, and prints a line a kernel:
registers, bytes spilled to local memory, shared memory; of its longest loop with products the instructions, how many of
them are tensor cores' (GMMA: of Hopper's kind) and how many barriers. A multiprocessor begins four instructions of 32
threads a cycle: what a loop spends on a byte shows whether memory can be the limit. It says nothing about results.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from replicas.engine.triton.device import interpreting


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel's machine code. local_bytes: stack and spills of a thread. shared_bytes: of a block. loop: opcodes of
    the longest loop with products, none where there is no such loop. early: of what a kernel that may be launched early
    asks of memory before it waits. weights: quantised ones that a thread takes in a turn of the loop."""

    kernel: str
    constants: str
    registers: int
    local_bytes: int
    shared_bytes: int
    loop: tuple[str, ...]
    early: tuple[str, ...] = ()
    weights: float = 0.0

    @property
    def _each(self) -> str:
        return f"({len(self.loop) / self.weights:.1f} a weight) " if self.weights and self.loop else ""

    @property
    def _early(self) -> str:
        return f"before waiting: {' '.join(sorted(set(self.early)))}" if self.early else ""

    def __str__(self) -> str:
        tensor = [opcode for opcode in self.loop if "MMA" in opcode and not opcode.startswith("HFMA2")]
        barriers = sum(opcode.startswith("BAR.SYNC") for opcode in self.loop)
        kind = "GMMA" if any("GMMA" in opcode for opcode in tensor) else "MMA"
        return (
            f"{self.kernel:18} {self.registers:4} registers {self.local_bytes:5} B local "
            f"{self.shared_bytes:7} B shared {len(self.loop):5} in loop {self._each}{len(tensor):3} {kind:4} "
            f"{barriers:2} barriers  {', '.join(filter(None, (self.constants, self._early)))}"
        )


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
            measured = _measure(self.__name__, constants, kernel.asm["cubin"], kernel.metadata.shared)
            done[kernel.hash] = replace(measured, weights=_weights(kwargs))
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


_PRODUCTS = ("HGMMA", "HMMA", "QGMMA", "IMMA", "FFMA")


def _measure(name: str, constants: str, cubin: bytes, shared: int) -> Compiled:
    usage, code = _told_by("cuobjdump", cubin, "--dump-resource-usage"), _told_by("nvdisasm", cubin, "-c")
    figures = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    loops = [loop for loop in loops_of(code) if any(o.startswith(_PRODUCTS) for o in loop)]
    return Compiled(
        name,
        constants,
        int(figures["REG"]),
        int(figures["STACK"]) + int(figures["LOCAL"]),
        shared,
        max(loops, key=len, default=()),
        early_accesses(code),
    )


def _told_by(tool: str, cubin: bytes, *options: str) -> str:
    """What one of the tools in Triton's package says of a cubin."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*);")
_WAIT, _MEMORY = "ACQBULK", ("LD", "ST", "ATOM", "RED", "CCTL", "UBLK")


def _weights(constants: Mapping[str, Any]) -> float:
    """Of those of a product with codes (`kernels/quant.py`); 0 for any other kernel."""
    if "UNITS" not in constants:
        return 0.0
    codes = constants.get("TILES", 1) * 64 * constants["UNITS"] * 256 // constants["BITS"]
    return float(codes / (32 * constants["num_warps"]))


def early_accesses(disassembly: str) -> tuple[str, ...]:
    """Opcodes that touch memory before a kernel waits for those in front of it; none for one that never waits.

    Constants, which hold its arguments, are not memory here.
    """
    opcodes = [found[1] for line in disassembly.splitlines() if (found := _INSTRUCTION.match(line))]
    if _WAIT not in opcodes:
        return ()
    before = opcodes[: opcodes.index(_WAIT)]
    return tuple(opcode for opcode in before if opcode.startswith(_MEMORY) and not opcode.startswith("LDC"))


def loops_of(disassembly: str) -> list[tuple[str, ...]]:
    """Opcodes between each branch backwards and where it leads, in nvdisasm's text."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in disassembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(opcodes)
        elif instruction := _INSTRUCTION.match(line):
            opcodes.append(instruction[1])
            target = re.search(r"\.L_x_\d+", instruction[2])
            if instruction[1].startswith("BRA") and target and target[0] in labels:
                loops.append(tuple(opcodes[labels[target[0]] :]))
    return loops


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
        launch = launch_each if args.few else launch_everything
        launch(torch.device("cpu"), early=args.capability >= 90)
    for kernel in sorted(found, key=lambda k: (k.kernel, k.constants)):
        print(kernel)
    print(f"{len(found)} kernels for compute capability {args.capability / 10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
