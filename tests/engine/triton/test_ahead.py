"""Every kernel compiles for Hopper here, without one: what the interpreter lets pass, Triton and ptxas must too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from replicas.engine.triton.ahead import early_accesses, loops_of

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_hopper_and_keeps_its_registers(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "replicas.engine.triton.ahead", "--capability", "90", "--few"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if " registers " in line]
    kernels = {line.split()[0] for line in lines}
    assert kernels == {
        "prefill",
        "decode",
        "merge",
        "rope_and_write",
        "round_queries",
        "draw_rest",
        "rope",
        "rms_norm",
        "silu_mul",
    } | {
        "few_rows",
        "pad_step",
        "single_rows",
        "some_rows",
        "dequantise",
        "best_of_part",
        "best_of_row",
    }
    overlapping = set()
    for line in lines:
        spilled, shared = (int(re.search(rf"(\d+) B {kind}", line)[1]) for kind in ("local", "shared"))  # type: ignore[index]
        assert shared <= 227 * 1024, f"more shared memory than a Hopper block has: {line}"
        if "DOT=bf16" in line and "BLOCK_D=256" not in line:
            assert spilled == 0, f"registers spill: {line}"
        if "EARLY=True" in line:
            asked = line.partition("before waiting: ")[2].split()
            assert asked in ([], ["CCTL.E.PF2"]), f"more than weights are asked for before waiting: {line}"
            overlapping.add(line.split()[0])
        if line.startswith("some_rows"):
            # Eight weights a thread and product: under five instructions for each of them.
            spent, products = (int(re.search(rf"(\d+) {what}", line)[1]) for what in ("in loop", "GMMA"))  # type: ignore[index]
            assert products, f"not multiplied by Hopper's tensor cores: {line}"
            assert spent < 40 * products, f"too much is done around the products: {line}"
    assert overlapping >= {"decode", "merge", "few_rows", "some_rows", "single_rows", "rms_norm", "silu_mul"}
    assert "rope_and_write" in overlapping


def test_what_is_asked_for_before_waiting_is_found() -> None:
    text = """
        /*0010*/                   LDC R1, c[0x0][0x28] ;
        /*0020*/              @!P0 CCTL.E.PF2 [R2.64] ;
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0040*/                   ACQBULK ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
"""
    assert early_accesses(text) == ("CCTL.E.PF2", "LDG.E")
    assert early_accesses(text.replace("ACQBULK", "NOP")) == ()


def test_loops_are_found_in_a_disassembly() -> None:
    text = """
.L_x_1:
        /*0010*/                   LDG.E R1, desc[UR4][R2.64] ;
.L_x_2:
        /*0020*/              @!P0 FFMA R4, R1, R3, R4 ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   BRA `(.L_x_3) ;
        /*0050*/             @!UP1 BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   EXIT ;
"""
    assert loops_of(text) == [("FFMA", "BRA"), ("LDG.E", "FFMA", "BRA", "BRA", "BRA")]
