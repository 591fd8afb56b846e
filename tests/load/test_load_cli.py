"""`signalbox load` as it is typed: exit statuses, messages, and what is left on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.load_cli import app
from tests.load.conftest import Start

SHORT = ("--prompt-tokens", "8", "--output-tokens", "4", "--no-metrics")


def load(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    command = [sys.executable, "-m", "deploy.cli", "load", *arguments]
    inherited = {**clean, "PYTHONPATH": os.getcwd(), "COLUMNS": "160", **environment}
    return subprocess.run(command, cwd=folder, env=inherited, capture_output=True, text=True, timeout=120, check=False)


def run(
    folder: Path, url: str, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any] | None]:
    done = load(folder, "run", url, *arguments, *SHORT, "-o", "out.json", **environment)
    file = folder / "out.json"
    return done, json.loads(file.read_text()) if file.exists() else None


def test_a_run_writes_results_and_page_and_keeps_the_key_to_itself(null: Start, tmp_path: Path) -> None:
    options = ("--concurrency", "2", "--requests", "30", "--html", "page.html")
    done, document = run(tmp_path, null("--key", "sk-right"), *options, SIGNALBOX_API_KEY="sk-right")
    assert done.returncode in (0, 4), done.stderr  # 4: this machine was too busy
    assert document is not None
    assert document["runs"][0]["counts"]["all"]["completed"] == 30
    assert document["settings"]["model"] == "scripted"
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page
    assert "sk-right" not in done.stdout + done.stderr + json.dumps(document) + page


def test_objectives_decide_the_exit_status(null: Start, tmp_path: Path) -> None:
    options = ("--concurrency", "1", "--requests", "20", "--slo")
    done, document = run(tmp_path, null("--ttft", "30ms"), *options, "ttft_p95=20ms")
    assert done.returncode in (1, 4), done.stderr
    assert "MISSED" in done.stdout
    assert document is not None
    assert document["runs"][0]["slo"]["attainment"]["value"] == 0
    assert run(tmp_path, null("--ttft", "30ms"), *options, "ttft_p95=60s")[0].returncode in (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "5", "--slo", "ttft_p95<500"), "'ttft_p95<500' is not METRIC_pNN=TIME"),
        (("--rate", "5", "--slo", "ttfb_p95=500ms"), "did you mean ttft_p95"),
        (("--rate", "0"), "--rate must be above 0"),
        ((), "say how requests arrive"),
        (("--rate", "1", "--concurrency", "2"), "exclude each other"),
        (("--trace", "broken.jsonl"), "broken.jsonl:3: not JSON"),
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--stages", "5@never"), "--stages"),
        (("--rate", "5", "--prompts", "prompts.jsonl"), "prompts.jsonl:2"),
        (("--rate", "5", "--extra-body", "{"), "--extra-body is not JSON"),
        (("--rate", "5", "--api-key-env", "NOT_SET_AT_ALL"), "no NOT_SET_AT_ALL"),
        (("--concurrency", "5", "--find-max-rate", "--slo", "e2e_p95=1s"), "starts from one --rate"),
        (("--rate", "5", "--find-max-rate"), "needs at least one --slo"),
        (("--rate", "5", "--duration", "soon"), "--duration: 'soon' is not a time"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    good = '{"timestamp": 0, "input_length": 5, "output_length": 3, "hash_ids": [0]}\n'
    (tmp_path / "broken.jsonl").write_text(f"{good}{good}{{oops\n{good}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x"}\n{"prompt": 5}\n')
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", "http://127.0.0.1:9", *arguments])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("*load*.json"))


def test_an_unreachable_server_is_named_and_a_result_file_says_so(tmp_path: Path) -> None:
    done, document = run(tmp_path, "http://127.0.0.1:9", "--rate", "5", "--model", "m")
    assert done.returncode == 3
    assert "nobody listens at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
    assert document is not None
    assert (document["runs"], "nobody listens" in document["failure"]) == ([], True)


def test_a_refused_key_is_said_before_anything_is_sent(null: Start, tmp_path: Path) -> None:
    done, document = run(tmp_path, null("--key", "sk-right"), "--rate", "5", OPENAI_API_KEY="sk-wrong")
    assert done.returncode == 3
    assert "refuses the key with 401" in done.stderr
    assert document is not None
    assert "sk-wrong" not in done.stderr + json.dumps(document)


@pytest.mark.parametrize(("fault", "word"), [("garbage", "garbage"), ("401", "401: scripted 401"), ("cut", "cut")])
def test_a_server_that_only_fails_ends_the_run_and_partial_results_stay(
    null: Start, tmp_path: Path, fault: str, word: str
) -> None:
    done, document = run(tmp_path, null("--fault", fault), "--concurrency", "4", "--requests", "5000")
    assert done.returncode == 3
    assert word in done.stdout
    assert document is not None
    found = document["runs"][0]
    assert 20 <= found["counts"]["all"]["sent"] < 5000
    assert found["stopped"].startswith("the first 20 requests all failed")


def test_some_failures_are_a_failure_too(null: Start, tmp_path: Path) -> None:
    done, document = run(
        tmp_path, null("--fault", "garbage", "--fault-every", "5"), "--concurrency", "2", "--requests", "20"
    )
    assert done.returncode == 3
    assert document is not None
    counts = document["runs"][0]["counts"]["all"]
    assert {name: count for name, count in counts.items() if count} == {
        "sent": 20,
        "completed": 16,
        "garbage": 4,
        "failed": 4,
        "statuses": {"200": 20},
    }


def test_ctrl_c_keeps_what_was_measured(null: Start, tmp_path: Path) -> None:
    url = null()
    command = [
        sys.executable,
        "-m",
        "deploy.cli",
        "load",
        "run",
        url,
        "--rate",
        "50",
        "--duration",
        "60s",
        *SHORT,
        "-o",
        "out.json",
    ]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    before = requests_of(url)
    deadline = time.monotonic() + 60
    while requests_of(url) < before + 20 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    found = json.loads((tmp_path / "out.json").read_text())["runs"][0]
    assert found["interrupted"]
    assert 20 <= found["counts"]["all"]["completed"] < 3000
    assert "ended early: interrupted" in out


def requests_of(url: str) -> int:
    import urllib.request

    with urllib.request.urlopen(f"{url}/null/stats", timeout=10) as answer:
        return int(json.load(answer)["requests"])


def test_a_sweep_is_compared_and_reported(null: Start, tmp_path: Path) -> None:
    sweep = ("--rate", "40", "--rate", "80", "--requests", "25")
    assert run(tmp_path, null(), *sweep)[0].returncode in (0, 4)
    (tmp_path / "out.json").rename(tmp_path / "a.json")
    assert run(tmp_path, null("--ttft", "30ms"), *sweep)[0].returncode in (0, 4)
    done = load(tmp_path, "compare", "a.json", "out.json", "--json", "ratios.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "ratios.json").read_text())["comparisons"]
    assert len(found) == 2
    ratios = {row["name"]: row["ratio"]["value"] for row in found[0]["figures"]}
    assert ratios["TTFT p50"] > 3
    done = load(tmp_path, "report", "a.json", "out.json", "-o", "page.html")
    assert done.returncode == 0, done.stderr
    assert "Rate against latency" in (tmp_path / "page.html").read_text()


def test_what_is_no_result_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    for arguments in (("compare", "x.json", "x.json"), ("report", "x.json"), ("report", "nowhere.json")):
        done = load(tmp_path, *arguments)
        assert done.returncode == 3
        assert done.stderr.count("\n") == 1


def test_help_has_examples_and_the_exit_statuses(tmp_path: Path) -> None:
    done = load(tmp_path, "run", "--help")
    assert done.returncode == 0
    for word in ("--find-max-rate", "--trace", "Examples", "Exit status"):
        assert word in done.stdout


def test_a_search_keeps_its_probes(null: Start, tmp_path: Path) -> None:
    options = ("--rate", "20", "--duration", "500ms", "--find-max-rate", "--max-probes", "3", "--slo", "e2e_p90=1us")
    done, document = run(tmp_path, null(), *options)
    assert done.returncode == 1, done.stderr
    assert "no rate" in done.stdout
    assert document is not None
    assert document["kind"] == "search"
    assert document["search"]["rate"] is None
    assert [probe["met"] for probe in document["search"]["probes"]] == [False] * 3
    assert len(document["runs"]) == 3
