"""The few PTX instructions that kernels are written in by hand, which Triton's interpreter does not run."""

from __future__ import annotations

import re


def run_ptx(text: str, *inputs: int) -> list[int]:
    """Evaluate straight-line PTX of a few instructions; $0 and on are outputs, then come the inputs."""
    outputs = max(int(number) for number in re.findall(r"\$(\d+)", text)) + 1 - len(inputs)
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for line in text.strip("{} ").split(";"):
        name, _, arguments = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *names = [argument.strip() for argument in arguments.split(",")]
        a, b, *more = map(value, names)
        if name == "shr.b32":
            registers[target] = a >> b
        elif name == "and.b32":
            registers[target] = a & b
        elif name == "lop3.b32":
            c, table = more
            bits = [table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1 for i in range(32)]
            registers[target] = sum(bit << i for i, bit in enumerate(bits))
        elif name == "prmt.b32":
            pool = a | b << 32
            registers[target] = sum((pool >> 8 * (more[0] >> 4 * i & 7) & 255) << 8 * i for i in range(4))
        else:
            raise AssertionError(f"{name} is not one of the instructions that the kernels use")
    return [registers[f"${i}"] for i in range(outputs)]
