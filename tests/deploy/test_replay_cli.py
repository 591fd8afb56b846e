"""`policy replay`, `policy publish --gate`, `policy score` and `frontier` on traffic in a file, without an instance."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from deploy.frontier_cli import parse_slo
from deploy.policy_cli import app
from policies.sweep import Slo

FLEET = """
models:
  - name: quick
    engine: fake
    price: {input: 1.0, output: 4.0}
    engine_settings: {prefill_tokens_per_s: 8000, tokens_per_s: 100, num_blocks: 2000}
  - name: slow
    engine: fake
    price: {input: 0.1, output: 0.4}
    engine_settings: {prefill_tokens_per_s: 600, tokens_per_s: 100, num_blocks: 2000}
"""
SERVING = "groups: {chat: {models: [quick, slow]}}\n"
CHEAPER = "groups: {chat: {models: [slow, quick]}}\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "250")
    (tmp_path / "fleet.yaml").write_text(FLEET)
    (tmp_path / "serving.yaml").write_text(SERVING)
    (tmp_path / "cheaper.yaml").write_text(CHEAPER)
    record(tmp_path, 120)
    assert run(tmp_path, "publish", "serving.yaml").exit_code == 0
    return tmp_path


def record(home: Path, count: int, generation: int = 1, **fields: object) -> None:
    rng = random.Random(generation)
    at, lines = time.time() - 100, []
    for number in range(count):
        at += rng.expovariate(3.0)
        name = f"key-{number % 6}"
        line = {"time": at, "prompt_tokens": rng.randrange(40, 200), "output_tokens": rng.randrange(2, 12)}
        line |= {"key_id": name, "key": name, "asked": "chat", "model": "quick", "status": 200, "cost": 500}
        line |= {"generation": generation, "ttft_s": 0.05, "e2e_s": 0.2, "block_tokens": 16, **fields}
        lines.append(json.dumps(line))
    folder = home / "traffic"
    folder.mkdir(exist_ok=True)
    (folder / f"gw-{generation}.jsonl").write_text("\n".join(lines) + "\n")


def run(home: Path, command: str, *arguments: str) -> Result:
    given = [str(home / one) if one.endswith(".yaml") else one for one in arguments]
    fleet = [] if command in ("score", "traffic") else ["--fleet", str(home / "fleet.yaml")]
    return CliRunner().invoke(app, [command, *given, *fleet])


def test_a_replay_tells_every_change_with_its_interval(home: Path) -> None:
    out = home / "replay.json"
    found = run(home, "replay", "cheaper.yaml", "--json", str(out))
    assert found.exit_code == 0, found.output
    changes = json.loads(out.read_text())["changes"]
    assert changes["cost"]["value"] == pytest.approx(-0.9)
    assert 0 < changes["ttft_p95"]["low"] <= changes["ttft_p95"]["value"] <= changes["ttft_p95"]["high"]
    assert "120 recorded requests" in found.output
    same = run(home, "replay", "1")
    assert "+0.0%" in same.output


def test_the_gate_refuses_what_would_break_the_sla_and_says_by_how_much(home: Path) -> None:
    found = run(home, "publish", "cheaper.yaml", "--gate", "cost<=+0% ttft_p95<=+10%")
    assert found.exit_code == 1
    assert "ttft_p95<=+10%: ttft_p95 would be" in found.output
    audit = json.loads(run_plain("audit", "--json").output)
    assert (audit[0]["outcome"], audit[0]["why"]) == ("refused", "gate cost<=+0% ttft_p95<=+10%")
    assert "cost<=+0%:" not in audit[0]["detail"]
    assert json.loads(run_plain("history", "--json").output)[0]["number"] == 1  # nothing was numbered


def run_plain(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_passed_gate_is_in_the_audit_log_and_its_prediction_is_scored(home: Path) -> None:
    gate = "cost<=+0% ttft_p95<=+100000%"
    found = run(home, "publish", "cheaper.yaml", "--gate", gate, "--canary", "50%")
    assert found.exit_code == 0, found.output
    assert f"the gate '{gate}' is passed" in found.output
    kept = json.loads(json.loads(run_plain("audit", "--json").output)[0]["detail"])
    assert (kept["gate"], kept["passed"]) == (gate, True)
    later = time.time() + 1
    record(home, 90, generation=2, ttft_s=0.4, cost=50)
    shift(home / "traffic" / "gw-2.jsonl", later)
    shift(home / "traffic" / "gw-1.jsonl", later)
    out = home / "score.json"
    scored = run(home, "score", "2", "--json", str(out))
    assert scored.exit_code == 0, scored.output
    figures = {one["name"]: one for one in json.loads(out.read_text())}
    assert figures["cost"]["predicted"] == pytest.approx(-0.9, abs=0.05)
    assert figures["cost"]["measured"]["value"] == pytest.approx(-0.9)
    assert figures["ttft_p95"]["predicted"] > 1
    assert figures["ttft_p95"]["measured"]["value"] == pytest.approx(7.0)
    assert "predictions held" in scored.output


def shift(path: Path, begin: float) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = lines[0]["time"]
    path.write_text("".join(json.dumps({**one, "time": one["time"] - first + begin}) + "\n" for one in lines))


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("publish", "cheaper.yaml", "--gate", "speed<=+5%"), 2, "'speed' is none of"),
        (("publish", "cheaper.yaml", "--gate", "cost=5"), 2, "'cost=5' is no bound"),
        (("replay", "cheaper.yaml", "--since", "yesterday"), 2, "'yesterday' is no time"),
        (("replay", "cheaper.yaml", "--since", "1s"), 1, "no traffic was recorded"),
        (("replay", "cheaper.yaml", "--replica", "quick"), 2, "NAME=MODEL.json"),
        (("score", "1"), 1, "was not published with a gate"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(home: Path, arguments: tuple[str, ...], status: int, says: str) -> None:
    for file in (home / "traffic").glob("*"):
        shift(file, time.time() - 1000)
    found = run(home, *arguments)
    assert found.exit_code == status, found.output
    assert says in found.output.replace("\n", " ")


def test_a_broken_line_of_traffic_is_named(home: Path) -> None:
    file = home / "traffic" / "gw-1.jsonl"
    file.write_text(file.read_text() + '{"time": "noon", "prompt_tokens": 1, "output_tokens": 1}\n')
    found = run(home, "replay", "cheaper.yaml")
    assert found.exit_code == 1
    assert "gw-1.jsonl:121: time must be a number" in found.output


def test_a_frontier_has_every_value_at_every_load_and_the_live_point(home: Path) -> None:
    from deploy import frontier_cli
    from deploy.cli import app as signalbox

    assert frontier_cli.parse_slo("ttft=200ms e2e=5s") == Slo(0.2, 5.0) == parse_slo("e2e=5s ttft=0.2s")
    out = home / "frontier.json"
    options = ["--knob", "affinity.policy=affinity,round_robin", "--slo", "ttft=200ms", "--load", "1", "--load", "4"]
    fleet = ["--fleet", str(home / "fleet.yaml"), "--json", str(out)]
    png = home / "frontier.png"
    found = CliRunner().invoke(signalbox, ["frontier", *options, *fleet, "--png", str(png)])
    assert found.exit_code == 0, found.output
    assert png.read_bytes().startswith(b"\x89PNG")
    points = json.loads(out.read_text())["points"]
    assert [(one["value"], one["load"], one["live"]) for one in points] == [
        ("affinity", 1.0, False),
        ("affinity", 4.0, False),
        ("round_robin", 1.0, False),
        ("round_robin", 4.0, False),
        (None, 1.0, True),
    ]
    assert points[1]["goodput"] > 2 * points[0]["goodput"]
    assert points[0]["usd_per_million"] > 0
    wrong = CliRunner().invoke(signalbox, ["frontier", *options[:1], "affinity.speed=1", *options[2:], *fleet])
    assert wrong.exit_code == 1
