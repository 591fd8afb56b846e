"""The comparison with peers, with small programs and made-up figures in the place of peers."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from deploy.load_cli import app
from load import environments, results
from load.environments import CannotInstall, Environment, interpreter, is_complete
from load.execute import Collected
from load.own_instance import free_port
from load.peers import comparison
from load.peers.comparison import Comparison, Setting, verdict
from load.peers.contestants import CONTESTANTS, OURS, PEER, PEERS, Contestant, Stage, chosen
from load.peers.rows import ADDED, START, flaws_of, rows
from load.peers.serving import PeerFailed, Served, first_token
from load.peers.show import cell, flaws, page, show
from load.peers.workloads import ALONE, ECHO, GATEWAY, MODEL, tasks
from load.processes import BEHIND, Child, cores_in_use, last_lines, marked, running, session, step_behind
from load.scripted import null_server
from load.units import BadOption, LoadError

Json = dict[str, Any]

# ---------------------------------------------------------------------------------------------------------- the choice


def test_ours_come_along_with_the_peers_of_their_kind() -> None:
    assert [one.name for one in chosen(only=["litellm"])] == ["mock", "signalbox-gateway", "litellm"]
    assert [one.name for one in chosen(skip=["vllm", "transformers", "litellm", "ray-serve"])] == [
        "signalbox",
        "signalbox-float32",
        "llama-cpp",
    ]
    assert [one.name for one in chosen()] == list(CONTESTANTS)


@pytest.mark.parametrize(("only", "skip"), [(["vlm"], []), ([], ["signalbox"]), (["vllm"], ["vllm"])])
def test_a_name_that_is_no_peer_is_refused(only: list[str], skip: list[str]) -> None:
    with pytest.raises(BadOption, match=r"vllm, llama-cpp, transformers, litellm, ray-serve|leave no peer"):
        chosen(only, skip)


def test_the_command_line_refuses_it_too() -> None:
    found = CliRunner().invoke(app, ["peers", "--only", "vllm,llama"])
    assert found.exit_code == 2
    assert "no peer 'llama'" in found.output


def test_every_task_of_a_kind_has_prompts_of_its_own() -> None:
    for kind in (MODEL, GATEWAY, ECHO):
        prompts = [str(next(task.workload.conversation(0)).prompt)[-60:] for task in tasks(kind, 1.0)]
        assert len(set(prompts)) == len(prompts) == 3


# ---------------------------------------------------------------------------------------------------------- processes

FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], process_group=0)
print("born", child.pid, flush=True)
STUBBORN
time.sleep(600)
"""


@pytest.mark.parametrize("stubborn", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_stopping_a_process_stops_what_it_started(tmp_path: Path, stubborn: str) -> None:
    """Also out of its process group, and when it does not listen."""
    log = tmp_path / "log"
    child = Child([sys.executable, "-c", FAMILY.replace("STUBBORN", stubborn)], os.environ, log)
    while not last_lines(log, 1):
        assert child.ended(0.05) is None
    assert len(session(child.pid)) == 2
    child.stop(patience_s=0.5)
    assert session(child.pid) == []
    assert child.ended() is not None


def test_an_exception_stops_it_too(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        running([sys.executable, "-c", "import time; time.sleep(600)"], os.environ, tmp_path / "log") as child,
    ):
        raise KeyboardInterrupt
    assert session(child.pid) == []


def test_last_lines_are_what_a_terminal_would_show(tmp_path: Path) -> None:
    (log := tmp_path / "log").write_bytes(b"first\n\n 10 %\r 50 %\r100 %\r\nlast\xff")
    assert last_lines(log, 2) == ["100 %", "last\ufffd"]


# ------------------------------------------------------------------------------------------------------- environments


def _fake_pip(monkeypatch: pytest.MonkeyPatch, fails: bool = False) -> list[list[str]]:
    """Steps are written down instead of run; the first makes an interpreter that has a pip."""
    steps: list[list[str]] = []

    def run(command: list[str], variables: Mapping[str, str], log: Path, say: Callable[[str], None]) -> None:
        assert variables["PATH"] == os.environ["PATH"]
        steps.append(
            [*command[1:], *(f"{name}={variables[name]}" for name in ("FOR_THE_COMPILER",) if name in variables)]
        )
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.write_text("#!/bin/sh\n")
            python.chmod(0o755)
        elif fails:
            raise CannotInstall("x: -m pip install ended with exit status 1", ["no such version"])

    monkeypatch.setattr(environments, "_run", run)
    return steps


def test_an_environment_is_made_once_and_again_for_other_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _fake_pip(monkeypatch)
    said: list[str] = []
    old = Environment("x", ("x==1", "torch==2"), without=("y",), variables={"FOR_THE_COMPILER": "less"}, cost="large, ")
    for _ in range(2):
        assert interpreter(old, tmp_path, said.append) == tmp_path / "x" / "bin" / "python"
    assert len(said) == 1
    assert "large, once" in said[0]
    assert [step[1:3] for step in steps] == [["venv", "--clear"], ["pip", "install"], ["pip", "uninstall"]]
    assert steps[1][-1] == "FOR_THE_COMPILER=less"
    new = replace(old, packages=("x==2", "torch==2"))
    assert not is_complete(new, tmp_path)
    interpreter(new, tmp_path, said.append)
    assert [step[1] for step in steps[3:]] == ["pip", "pip"], "taken up where it stands"


def test_what_broke_off_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, fails=True)
    with pytest.raises(CannotInstall):
        interpreter(environment := Environment("x", ("x==1",)), tmp_path, lambda _: None)
    assert not is_complete(environment, tmp_path)


def test_a_failed_step_tells_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('looking'); raise SystemExit('no wheel for this machine')"]
    with pytest.raises(CannotInstall, match=r"exit status 1.*x\.log") as caught:
        environments._run(command, os.environ, tmp_path / "x.log", lambda _: None)
    assert caught.value.log == ["looking", "no wheel for this machine"]


# ------------------------------------------------------------------------------------------- servers that do not serve


def _program(code: str, **more: Any) -> Contestant:
    """A peer that is a Python program; PORT is its port."""

    @contextmanager
    def serve(stage: Stage) -> Iterator[Served]:
        port = free_port()
        began = time.monotonic()
        with running(
            [sys.executable, "-c", code.replace("PORT", str(port))], os.environ, stage.scratch / "log"
        ) as child:
            yield Served(f"http://127.0.0.1:{port}", "m", began, child=child)

    return Contestant(**{"name": "peer", "kind": ECHO, "serve": serve, "packages": ("rich",)} | more)


def _null(name: str, role: str) -> Contestant:
    @contextmanager
    def serve(stage: Stage) -> Iterator[Served]:
        with null_server("--ttft", "5ms", "--itl", "1ms") as url:
            yield Served(url, "null", time.monotonic())

    return Contestant(name=name, kind=ECHO, serve=serve, packages=("rich",), role=role)


def _compared(tmp_path: Path, *contestants: Contestant) -> Json:
    with open(os.devnull, "w") as nowhere:
        *_, document = Comparison(contestants, Setting(tmp_path, 0.5, tmp_path), Console(file=nowhere)).run()
    return document


HANGS = """
import socket, time
server = socket.create_server(("127.0.0.1", PORT))
print("listening and never answering", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("code", "limit_s", "reason", "log"),
    [
        ("raise SystemExit('no master key')", 60.0, "ended with exit status 1 before its first token", "no master key"),
        (HANGS, 1.5, "no token within 1.5 s: a request was not answered", "listening and never answering"),
    ],
)
def test_a_peer_that_dies_or_hangs_is_named_in_time(
    tmp_path: Path, code: str, limit_s: float, reason: str, log: str
) -> None:
    began = time.monotonic()
    document = _compared(tmp_path, _program(code, limit_s=limit_s))
    assert time.monotonic() - began < 50
    (server,) = document["servers"]
    assert server["failure"] == {"step": "start", "reason": reason, "log": [log]}
    assert verdict(document) == 3


def test_a_server_that_says_no_is_not_asked_again() -> None:
    with null_server("--fault", "401") as url, pytest.raises(PeerFailed, match="refused: 401"):
        first_token(Served(url, "null", time.monotonic()), 60.0)


def test_a_peer_that_cannot_be_installed_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _fake_pip(monkeypatch, fails=True)
    broken = replace(_null("broken", PEER), environment=Environment("x", ("x==1",)))
    document = _compared(tmp_path, broken, _null("signalbox-fake", OURS))
    served, failed = document["servers"]
    assert failed["failure"]["step"] == "install"
    assert failed["failure"]["log"] == ["no such version"]
    assert served["failure"] is None
    assert served["first_token_s"] > 0
    assert [run["label"] for run in served["runs"]] == [task.name for task in tasks(ECHO, 1.0)]
    with open(os.devnull, "w") as nowhere:
        show(document, console := Console(width=170, record=True, file=nowhere))
    text = console.export_text()
    assert "FAILED: broken failed to install: x: -m pip install ended with exit status 1" in text
    assert "no such version" in text


def test_a_server_that_fails_under_load_is_named_with_what_it_said(tmp_path: Path) -> None:
    @contextmanager
    def serve(stage: Stage) -> Iterator[Served]:
        with null_server("--fault", "500", "--fault-every", "3") as url:
            yield Served(url, "null", time.monotonic())

    document = _compared(tmp_path, Contestant(name="peer", kind=ECHO, serve=serve, packages=("rich",)))
    (server,) = document["servers"]
    assert server["failure"]["step"] == "load"
    assert "requests failed (warm-up): 500" in server["failure"]["reason"]


def test_ctrl_c_keeps_what_there_is(tmp_path: Path) -> None:
    @contextmanager
    def serve(stage: Stage) -> Iterator[Served]:
        raise KeyboardInterrupt
        yield

    interrupted = Contestant(name="peer", kind=ECHO, serve=serve, packages=("rich",))
    document = _compared(tmp_path, _null("signalbox-fake", OURS), interrupted, _null("later", PEER))
    assert [server["name"] for server in document["servers"]] == ["signalbox-fake", "peer"]
    assert len(document["servers"][0]["runs"]) == 3
    assert document["servers"][1]["failure"] == {"step": "start", "reason": "interrupted", "log": []}
    assert verdict(document) == 130


def test_ctrl_c_under_load_ends_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes Ctrl-C as its end and returns: nobody else may have a turn all the same."""
    stopped = Collected(stopped="interrupted", interrupted=True)
    monkeypatch.setattr(comparison, "execute", lambda plan, update: stopped)
    document = _compared(tmp_path, _null("signalbox-fake", OURS), _null("later", PEER))
    (server,) = document["servers"]
    assert server["failure"] == {"step": "load", "reason": "interrupted", "log": []}
    assert document["interrupted"]


def test_a_comparison_goes_on_where_another_ended(tmp_path: Path) -> None:
    def begun(seconds: float) -> Comparison:
        return Comparison(
            [_null("ray-serve", PEER), _null("signalbox-fake", OURS)], Setting(tmp_path, seconds), Console()
        )

    failed = _server("ray-serve", ECHO, PEER, []) | {"failure": {"step": "start", "reason": "no luck", "log": []}}
    earlier = begun(0.5)
    earlier.servers = [failed, _server("signalbox-fake", ECHO, OURS, [_run("x", 0.1, 9)])]
    results.write(path := tmp_path / "earlier.json", earlier.document())
    now = begun(0.5)
    now.go_on_from(path)
    assert [one.name for one in now.contestants] == ["ray-serve"], "what failed has another turn"
    assert [one["name"] for one in now.document()["servers"]] == ["signalbox-fake"]
    with pytest.raises(LoadError, match=r"settings differs: .*'seconds': 0\.5.* there, .*'seconds': 2"):
        begun(2.0).go_on_from(path)


# ------------------------------------------------------------------------------------------------------------ the table


def _run(label: str, ttft: float, rate: float, **more: Any) -> Json:
    def figure(value: float, width: float = 0.05) -> Json:
        return {"value": value, "low": value * (1 - width), "high": value * (1 + width)}

    latency = {
        metric: {"count": 9, "max": ttft, "cdf": [ttft, 2 * ttft]}
        | {rank: figure(ttft) for rank in ("mean", "p50", "p90", "p95", "p99", "p99.9")}
        for metric in ("ttft", "tpot", "itl", "chunk_gap", "e2e", "queue")
    }
    counts = {"sent": 9, "completed": 9, "failed": 0, "rejected": 0, "statuses": {"200": 9}}
    rates = {"output_tokens_per_s": figure(rate), "requests_per_s": figure(rate / 8), "offered_requests_per_s": None}
    return {
        "label": label,
        "stopped": "",
        "failures": [],
        "latency": latency,
        "counts": {"all": counts, "measured": counts},
        "rates": rates | {"input_tokens_per_s": None},
        "tokens": {"output": 72, "tokens_per_event": 1.0, "cached_share": None},
        "asked_output": 8,
        "generator": {"kept_up": True, "lag": {"p50": 0.0, "p99": 0.0, "max": 0.0}},
        "window": {"warmup": {"settled": True, "cut": 0, "rule": "none"}},
        "checks": {},
        "cost": None,
        "slo": None,
        "timeline": {"t": []},
        "server": [],
    } | more


def _server(name: str, kind: str, role: str, runs: list[Json], start: float = 10.0) -> Json:
    about = {"name": name, "kind": kind, "role": role, "weights": "", "note": "", "versions": {"v": "1.2"}}
    return about | {"others_cores": 0.0, "first_token_s": start, "failure": None, "runs": runs}


def _document(*servers: Json) -> Json:
    machine = {"cores": 2, "processor": "P", "system": "S", "python": "3", "signalbox": "0"}
    about = {"machine": machine, "created": "now", "settings": {"model": "m", "seconds": 20.0}, "interrupted": False}
    return about | {"servers": list(servers)}


@pytest.fixture
def models() -> Json:
    return _document(
        _server("signalbox", MODEL, "ours", [_run("8 callers", 0.1, 300)], start=20.0),
        _server("signalbox-float32", MODEL, "ours", [_run("8 callers", 0.2, 150)], start=30.0),
        _server("vllm", MODEL, "peer", [_run("8 callers", 0.4, 100)], start=100.0),
    )


def test_ratios_are_ours_over_theirs_for_each_of_ours(models: Json) -> None:
    row = rows(models["servers"])[-1]
    assert (row["server"], row["task"]) == ("vllm", "8 callers")
    fast, exact = row["ratios"]["signalbox"], row["ratios"]["signalbox-float32"]
    assert fast["ttft_p50"]["value"] == pytest.approx(0.25)
    assert exact["ttft_p50"]["value"] == pytest.approx(0.5)
    assert fast["output_tokens_per_s"]["value"] == pytest.approx(3.0)
    assert exact["output_tokens_per_s"]["value"] == pytest.approx(1.5)
    assert 0.25 * 0.9 < fast["ttft_p50"]["low"] < 0.25 < fast["ttft_p50"]["high"] < 0.25 * 1.1
    starts = {row["server"]: row for row in rows(models["servers"]) if row["task"] == START}
    assert starts["vllm"]["ratios"]["signalbox"]["first_token_s"]["value"] == pytest.approx(0.2)
    assert not rows(models["servers"])[0]["ratios"], "ours are compared with peers, not with each other"


def test_what_a_gateway_adds_is_counted_over_its_upstream() -> None:
    found = rows(
        [
            _server("mock", GATEWAY, "yardstick", [_run(ALONE, 0.001, 9)]),
            _server("signalbox-gateway", GATEWAY, "ours", [_run(ALONE, 0.004, 9)]),
            _server("litellm", GATEWAY, "peer", [_run(ALONE, 0.013, 9)]),
        ]
    )
    row = found[-1]
    assert row["figures"][ADDED]["value"] == pytest.approx(0.012)
    assert row["ratios"]["signalbox-gateway"][ADDED]["value"] == pytest.approx(0.25)
    assert ADDED not in next(one for one in found if one["server"] == "mock")["figures"]


def test_the_table_names_versions_ratios_and_failures(models: Json) -> None:
    failed = _server("llama-cpp", MODEL, "peer", [])
    failed |= {"first_token_s": None, "failure": {"step": "install", "reason": "no compiler", "log": ["cc: not found"]}}
    models["servers"].append(failed)
    with open(os.devnull, "w") as nowhere:
        show(models, console := Console(width=170, record=True, file=nowhere))
    text = console.export_text()
    assert "vllm: v 1.2" in text
    assert "400 ms (0.25 0.50)" in text
    assert "100 (3.00 1.50)" in text
    assert "100 s (0.20 0.30)" in text
    assert "llama-cpp failed to install: no compiler" in text
    assert "cc: not found" in text


def test_the_page_holds_the_table_the_charts_and_every_run(models: Json) -> None:
    models["servers"][2]["failure"] = {"step": "load", "reason": "<b>broke", "log": ["<script>"]}
    text = page(models)
    assert "400 ms (0.25 0.50)" in text
    assert "&lt;b&gt;broke" in text
    assert "<script>" not in text
    assert text.count("<svg") >= 2
    for name in ("signalbox-float32", "vllm"):
        assert f"<h2>{name}: 8 callers</h2>" in text


def test_answers_shorter_than_asked_are_named() -> None:
    assert flaws_of(_run("x", 0.1, 1)) == []
    (flaw,) = flaws_of(_run("x", 0.1, 1, tokens={"output": 36, "tokens_per_event": 1.0, "cached_share": None}))
    assert flaw == "answers have 4.0 tokens on average, 8 were asked for"


def test_a_machine_that_others_keep_busy_is_named(models: Json) -> None:
    assert flaws(models["servers"]) == []
    models["servers"][1]["others_cores"] = 1.5
    (flaw,) = flaws(models["servers"])
    assert flaw.startswith("THE MACHINE WAS BUSY")
    assert flaw.endswith("cores that others kept before: signalbox-float32 1.5")


def test_cores_in_use_counts_what_a_process_computes(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('begun', flush=True)\nwhile True: pass"]
    with running(command, os.environ, log := tmp_path / "log") as child:
        while not last_lines(log, 1):
            assert child.ended(0.05) is None
        found = cores_in_use(0.5)
    assert found is None or found > 0.5


def test_a_late_generator_shows_in_the_exit_status(models: Json) -> None:
    assert verdict(models) == 0
    models["servers"][0]["runs"][0]["generator"]["kept_up"] = False
    assert verdict(models) == 4
    (flaw,) = flaws(models["servers"])
    assert flaw.startswith("OUR GENERATOR COULD NOT KEEP UP")
    assert flaw.endswith("in: signalbox, 8 callers")


def test_over_a_time_of_nothing_there_is_no_ratio() -> None:
    runs = [[_run("x", 0.01, 9)], [_run("x", 0.0, 9)]]
    servers = [_server("signalbox-fake", ECHO, OURS, runs[0]), _server("ray-serve", ECHO, PEER, runs[1])]
    assert cell(rows(servers)[-1], "ttft_p50") == ("0 µs", False)


def test_every_peer_is_in_the_table_of_versions() -> None:
    for name in PEERS:
        environment = CONTESTANTS[name].environment
        assert environment is None or all("==" in package for package in environment.packages), name


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="this system shares cores among processes only")
def test_marked_processes_and_their_sessions_step_behind(tmp_path: Path) -> None:
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    with marked("of-this-test"):
        server = Child([*BEHIND, *sleeps], {**os.environ}, tmp_path / "server.log")
    other = Child(sleeps, {**os.environ}, tmp_path / "other.log")
    try:
        deadline = time.monotonic() + 20
        while b"-c" not in Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")[1:2]:  # until nice became it
            assert time.monotonic() < deadline
            time.sleep(0.01)
        step_behind("of-this-test")
        assert Path(f"/proc/{server.pid}/autogroup").read_text().split()[-1] == "19"
        assert Path(f"/proc/{other.pid}/autogroup").read_text().split()[-1] == "0"
        assert os.getpriority(os.PRIO_PROCESS, server.pid) == 19
    finally:
        server.stop()
        other.stop()
