"""The comparison with vLLM, with two small programs in the place of the engines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from load.bench_engine import Worker, WorkerFailed, compare, rates, table

PROGRAM = """
import json, sys
print("noise before", flush=True)
print("@@", json.dumps({"first_token_s": FIRST, "threads": 2, "vector_isa": "X", "torch": "t", "ops": "o",
      "attention": "a", "dtype": "float32", "version": "v", "settings": {"VLLM_CPU_A": "1", "OTHER": "2"}}), flush=True)
for line in sys.stdin:
    print("noise between", flush=True)
    print("@@", json.dumps({"batch": int(line), "prefill_s": 1.0 * SLOW, "total_s": 5.0 * SLOW}), flush=True)
"""


@pytest.fixture
def workers() -> Iterator[tuple[Worker, Worker]]:
    programs = [PROGRAM.replace("FIRST", first).replace("SLOW", slow) for first, slow in (("2.0", "1"), ("50.0", "3"))]
    pair = (Worker("a", [sys.executable, "-c", programs[0]]), Worker("b", [sys.executable, "-c", programs[1]]))
    yield pair
    for worker in pair:
        worker.close()


def test_rates_are_tokens_over_the_readings() -> None:
    figures = rates({"batch": 8, "prefill_s": 2.0, "total_s": 10.0}, prompt=128, output=65)
    assert figures == {"out tok/s": 52.0, "prefill tok/s": 512.0, "decode tok/s": 64.0}


def test_workers_take_turns_and_every_figure_has_a_ratio(workers: tuple[Worker, Worker]) -> None:
    rows = compare(*workers, [1, 4], prompt=10, output=9, repeat=2)
    assert [row["batch"] for row in rows] == [1, 4]
    assert rows[1]["ours"] == {"out tok/s": 4 * 9 / 5, "prefill tok/s": 40.0, "decode tok/s": 8.0}
    assert all(ratio == pytest.approx(3) for row in rows for ratio in row["ratio"].values())
    report = {"machine": "m", "prompt": 10, "output": 9, "repeat": 2, "rows": rows}
    text = table({**report, "ours": workers[0].ready, "peer": workers[1].ready})
    assert "25.00x sooner" in text
    assert "VLLM_CPU_A=1" in text
    assert text.count("3.00x") == 6


def test_a_worker_that_dies_says_why() -> None:
    with pytest.raises(WorkerFailed, match=r"(?s)peer ended with exit status 3:.*out of luck"):
        Worker("peer", [sys.executable, "-c", "import sys; print('out of luck', file=sys.stderr); sys.exit(3)"])


def test_the_peer_script_needs_nothing_of_ours(tmp_path: Path) -> None:
    import subprocess

    script = Path(__file__).parents[2] / "load" / "peer_vllm.py"
    done = subprocess.run([sys.executable, "-I", str(script), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0
    assert "VLLM_CPU_OMP_THREADS_BIND" in done.stdout
