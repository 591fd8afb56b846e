"""The device script does its parts, goes on after one that fails, and reports them all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from replicas.engine import device_check, random_weights
from replicas.engine.random_weights import SHAPES
from replicas.engine.triton.accuracy import Measured
from tests.engine.test_bench_shapes import TINY

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "SHAPES", {**SHAPES, "smollm2-135m": TINY, "tiny": TINY})
    monkeypatch.setattr(device_check, "_PROMPTS", (1, 5, 17))
    monkeypatch.setattr(device_check, "_TOKENS", 6)


def test_backends_are_held_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "obstacles", lambda *_: {"native": "", "torch": "", "triton": "too slow here"})
    monkeypatch.setattr(device_check, "_MAX_LEN", 64)
    found = device_check.oracle(CPU, None)
    assert found["good"]
    assert set(found["backends"]) == {
        *(f"{name}, step_graphs {g}" for name in ("native", "torch") for g in ("off", "auto")),
        "native, a draft of the model's first layer",
    }
    assert found["backends"]["native, a draft of the model's first layer"]["guesses"] > 0
    assert all(row["leaked_blocks"] == row["wrong"] == 0 for row in found["backends"].values())


def test_a_wrong_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_check, "obstacles", lambda *_: {"torch": ""})
    monkeypatch.setattr(device_check, "_MAX_LEN", 64)
    generate = device_check.Reference.generate

    def lying(self: Any, prompt: list[int], *args: Any, **kwargs: Any) -> list[int]:
        tokens = generate(self, prompt, *args, **kwargs)
        return [*tokens[:2], (tokens[2] + 1) % 300, *tokens[3:]]

    monkeypatch.setattr(device_check.Reference, "generate", lying)
    monkeypatch.setattr(device_check, "_TIE", 0.0)
    found = device_check.oracle(CPU, None)
    assert not found["good"]
    assert found["backends"]["torch, step_graphs off"]["wrong"] == 3


def test_full_load_runs_until_its_time_is_up() -> None:
    found = device_check.full_load(CPU, "tiny", seconds=0.5)
    assert found["good"]
    assert found["steps"] > 0


def test_kernels_that_fail_are_rows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Measured]:
        raise RuntimeError("does not compile")

    class OutOfResources(Exception):
        """As Triton names it; it need not be installed."""

    def too_large() -> list[Measured]:
        raise OutOfResources("shared memory")

    from replicas.engine.triton import accuracy

    each = [broken, lambda: [Measured("far off", 0.5, 0.1)], lambda: [Measured("close", 0.01, 0.1)]]
    each.append(lambda: [Measured("no number", float("nan"), 0.1)])
    each.append(too_large)
    kinds = {"attention": each, f"{accuracy.CHOICE}sizes": each, f"{accuracy.CHOICE}none": [too_large]}
    monkeypatch.setattr(accuracy, "checks", lambda *_: kinds)
    found = device_check.kernels(CPU, 1)
    good = [row["good"] for row in found["rows"]]
    assert good[:5] == [False, False, True, False, False], "there is no other"
    assert good[5:10] == [False, False, True, False, True], "another size is chosen"
    assert good[10:] == [False], "none is left to be chosen"
    assert found["refused"] == 3
    assert not found["good"]


def test_a_part_that_fails_or_has_no_time_does_not_end_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> dict[str, Any]:
        raise RuntimeError("no such device")

    file = tmp_path / "report.json"
    monkeypatch.setattr(device_check, "kernels", broken)
    monkeypatch.setattr(device_check, "oracle", lambda *_: {"good": True})
    monkeypatch.setattr(device_check, "BENCHES", {"bench a": ["tiny"]})
    monkeypatch.setattr(device_check, "run_bench", lambda *_: {"good": True})
    command = ["device_check", "--device", "cpu", "--json", str(file), "--only", "kernels", "oracle", "bench"]
    monkeypatch.setattr(sys, "argv", command)
    assert device_check.main() == 1
    report = json.loads(file.read_text())
    assert [(name, part["good"]) for name, part in report["parts"].items()] == [
        ("kernels", False),
        ("oracle", True),
        ("bench a", True),
    ]
    assert "no such device" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "--seconds", "1"])
    assert device_check.main() == 1
    assert json.loads(file.read_text())["parts"]["oracle"]["error"] == "no time left"


def test_a_bench_that_says_nothing_is_reported() -> None:
    found = device_check.run_bench(["no-such-shape"], CPU, 60)
    assert not found["good"]
    assert "no-such-shape" in found["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "orcale"], "no part begins with 'orcale'; the parts are kernels, oracle, load"),
        (["--only", "kernels"], "TRITON_INTERPRET=1"),
        (["--json", "/no/such/folder/report.json"], "/no/such/folder is no folder"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "argv", ["device_check", "--device", "cpu", *arguments])
    assert device_check.main() == 2
    assert said in capsys.readouterr().err


def test_what_a_bench_had_before_its_time_was_up_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(command: list[str], **_: object) -> None:
        Path(command[command.index("--json") + 1]).write_text('{"sweep": [1]}')
        raise subprocess.TimeoutExpired(command, 3)

    monkeypatch.setattr(subprocess, "run", slow)
    found = device_check.run_bench(["tiny"], CPU, 3.0)
    assert found == {"sweep": [1], "good": False, "error": "not done after 3 s"}


def test_a_part_leaves_time_for_those_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(device_check, "BENCHES", {name: [name] for name in ("bench a", "bench b", "bench c")})
    monkeypatch.setattr(device_check, "run_bench", lambda *of: given.append(of[-1]) or {"good": True})
    command = ["device_check", "--device", "cpu", "--json", str(tmp_path / "r.json"), "--only", "bench"]
    monkeypatch.setattr(sys, "argv", [*command, "--seconds", "200"])
    assert device_check.main() == 0
    assert [round(seconds) for seconds in given] == [110, 155, 200]
