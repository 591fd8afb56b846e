"""Policies compared on live replicas: the same traffic for each, nothing shared between runs, the order judged."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.fleet import FLEETS, load
from load.compare_policies import main, measure, options, plan_of, read_simulated
from load.execute import Collected
from load.live_client import Published
from load.live_order import Figures, judge
from load.live_trace import SaltedTrace, segment
from load.record import Record
from load.units import BadOption, LoadError
from policies.sim_replica import ReplicaModel
from policies.traces import TraceRequest, mean_rate
from replicas.fake import FakeSettings
from tests.gateway.conftest import Gateway, make_config, make_key, running

GOOD = (
    Figures("affinity", 0.4, 0.24),
    Figures("cache_aware", 0.8, 0.20),
    Figures("least_load", 0.9, 0.11),
    Figures("power_of_two", 0.92, 0.115),
    Figures("round_robin", 1.2, 0.10),
)


def swapped(policy: str, other: str) -> list[Figures]:
    by_name = {one.policy: one for one in GOOD}
    name = {policy: other, other: policy}
    return [
        Figures(one.policy, by_name[name.get(one.policy, one.policy)].ttft_p95_s, one.hit_rate)
        for one in by_name.values()
    ]


# ------------------------------------------------------------------------------------------------------------ traffic


def prompt(trace: SaltedTrace, index: int) -> list[int]:
    ask = next(trace.conversation(index))
    assert isinstance(ask.prompt, list)
    assert ask.prompt_tokens == len(ask.prompt)
    return [int(token) for token in ask.prompt]  # type: ignore[call-overload]


def test_requests_share_exactly_the_tokens_that_the_trace_says() -> None:
    requests = (TraceRequest(0.0, 40, 3, (1, 2, 3), 16), TraceRequest(0.1, 48, 3, (1, 2, 9), 16))
    first, second = (prompt(SaltedTrace(requests, "a"), index) for index in range(2))
    assert (len(first), len(second)) == (40, 48)
    assert first[:32] == second[:32]
    assert first[32:40] != second[32:40]
    assert all(0 <= token < 256 for token in first + second)


def test_runs_of_different_salt_share_no_block() -> None:
    requests = (TraceRequest(0.0, 32, 3, (1, 2), 16),)
    one, other = prompt(SaltedTrace(requests, "a"), 0), prompt(SaltedTrace(requests, "b"), 0)
    assert one[:16] != other[:16]
    assert prompt(SaltedTrace(requests, "a"), 0) == one


def test_what_the_trace_knows_nothing_of_is_nobody_elses() -> None:
    requests = (TraceRequest(0.0, 100, 3), TraceRequest(0.1, 100, 3))
    trace = SaltedTrace(requests, "a")
    assert len(prompt(trace, 0)) == 100
    assert prompt(trace, 0)[:16] != prompt(trace, 1)[:16]


def test_a_segment_keeps_the_traces_gaps_at_the_wanted_rate() -> None:
    requests = [TraceRequest(at, 10, 1) for at in (0.0, 1.0, 3.0, 100.0)]
    chosen = segment(requests, rate=4.0, count=3)
    assert mean_rate(chosen) == pytest.approx(4.0)
    assert [one.arrival_s for one in chosen] == pytest.approx([0.0, 1 / 6, 0.5])
    with pytest.raises(BadOption, match="no rate"):
        segment([requests[0]] * 3, rate=4.0, count=3)


# -------------------------------------------------------------------------------------------------------------- order


def test_the_same_order_agrees_whatever_the_figures() -> None:
    live = [Figures(one.policy, one.ttft_p95_s * 1.7, one.hit_rate * 0.9) for one in GOOD]
    verdict = judge(live, GOOD)
    assert verdict.agrees
    assert all(not ranking.contradicted for ranking in verdict.rankings)
    assert verdict.rankings[0].live[0] == verdict.rankings[0].simulated[0] == "affinity"
    assert [claim.live and claim.simulated for claim in verdict.claims] == [True] * 3


def test_a_clear_pair_that_stands_the_other_way_round_is_named() -> None:
    verdict = judge(swapped("cache_aware", "round_robin"), GOOD)
    assert not verdict.agrees
    assert ("cache_aware", "round_robin") in verdict.rankings[0].contradicted
    assert not verdict.rankings[1].contradicted


def test_a_pair_that_the_simulator_hardly_tells_apart_may_stand_either_way() -> None:
    assert judge(swapped("least_load", "power_of_two"), GOOD).agrees


def test_a_pair_that_seeds_put_either_way_may_stand_either_way() -> None:
    live, other_seed = swapped("cache_aware", "round_robin"), swapped("cache_aware", "round_robin")
    verdict = judge(live, GOOD, other_seed, GOOD)
    assert verdict.agrees
    assert verdict.rankings[0].compared < judge(live, GOOD).rankings[0].compared
    assert judge(live, GOOD, GOOD).rankings[0].contradicted


@pytest.mark.parametrize(("policy", "other"), [("affinity", "least_load"), ("affinity", "cache_aware")])
def test_another_policy_that_beats_ours_fails_the_claim(policy: str, other: str) -> None:
    verdict = judge(swapped(policy, other))
    assert not verdict.rankings
    assert [claim.live for claim in verdict.claims] == [False, True, True]
    assert not verdict.agrees


def test_only_policies_that_both_have_are_compared() -> None:
    verdict = judge(GOOD[:2], (Figures("all-seeing", 0.1, 0.9), *GOOD))
    assert verdict.agrees
    assert verdict.rankings[0].simulated == ("affinity", "cache_aware")


# ------------------------------------------------------------------------------------------------------------ figures


def record(scheduled: float, first: float, prompt_tokens: int, cached: int, error: str = "") -> Record:
    made = Record(0, 0, scheduled, prompt_tokens, 1, begun=scheduled + 0.01, first=first, end=first + 1, error=error)
    made.prompt_tokens, made.completion_tokens, made.cached_tokens = prompt_tokens, 2, cached
    made.chunks = array("d", (first,))
    return made


PUBLISHED = Published(7, 0.0, 0.1, ("a", "b"), (), 0.0)


def test_ttft_counts_from_the_due_time_and_the_hit_rate_is_of_tokens() -> None:
    records = [record(at, at + 0.5, 100 * (1 + at), 50) for at in (0, 1, 2)]
    row = measure(PUBLISHED, "affinity", Collected(records=[*records, record(3, math.nan, 100, 0, "timeout")]))
    assert (row.requests, row.errors, row.generation) == (4, 1, 7)
    assert row.first_error.startswith("timeout")
    assert row.ttft_p50_s == row.ttft_p99_s == 0.5
    assert row.hit_rate == 150 / 600
    assert row.rate == 1.0
    assert row.lag_p99_s == pytest.approx(0.01)


def test_an_answer_without_text_ends_its_callers_wait() -> None:
    records = [record(at, at + 0.5, 100, 50) for at in range(3)]
    records[2].first, records[2].end = math.nan, 2.9
    assert measure(PUBLISHED, "affinity", Collected(records=records)).ttft_p99_s == pytest.approx(0.9, rel=0.02)


def test_a_server_that_does_not_tell_what_it_cached_cannot_be_compared() -> None:
    with pytest.raises(LoadError, match="cached_tokens"):
        measure(PUBLISHED, "affinity", Collected(records=[record(0, 0.5, 100, -1)]))
    with pytest.raises(LoadError, match="no request"):
        measure(PUBLISHED, "affinity", Collected(records=[record(0, 0.5, 100, 0, "status")]))


# ------------------------------------------------------------------------------------------------------------ command


def write_trace(path: Path, count: int, conversations: int = 9) -> Path:
    """Conversations that come by in turn, each with a prompt of its own of 20 blocks and a block of news."""
    with path.open("w") as file:
        for number in range(count):
            own = number % conversations
            ids = [1000 * own + block for block in range(20)] + [1_000_000 + number]
            line = {"timestamp": number * 100, "input_length": 21 * 512, "output_length": 64, "hash_ids": ids}
            file.write(json.dumps(line) + "\n")
    return path


def write_simulated(path: Path, **changes: object) -> Path:
    rows = [{"load": 0.8, "policy": f.policy, "ttft_p95_s": f.ttft_p95_s, "hit_rate": f.hit_rate} for f in GOOD]
    path.write_text(json.dumps({"saturation_rate": 125.0, "requests": 400, "replicas": 4, "rows": rows, **changes}))
    return path


def test_the_rate_is_a_share_of_what_the_simulator_says_saturates(tmp_path: Path) -> None:
    trace, simulated = write_trace(tmp_path / "t.jsonl", 600), write_simulated(tmp_path / "s.json")
    requests, _ = plan_of(options(["--trace", str(trace), "--simulated", str(simulated), "--minutes", "5"]))
    assert len(requests) == 400  # what was simulated, though there would be time for more
    assert mean_rate(requests) == pytest.approx(100.0)
    assert requests[0].prompt_tokens == 21 * 16
    requests, _ = plan_of(options(["--trace", str(trace), "--simulated", str(simulated), "--minutes", "0.6"]))
    assert len(requests) == 220
    with pytest.raises(BadOption, match="minutes"):
        plan_of(options(["--trace", str(trace), "--rate", "1", "--minutes", "1"]))
    with pytest.raises(BadOption, match="how fast"):
        plan_of(options(["--trace", str(trace)]))


def test_a_file_that_no_simulation_wrote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match=r"load of 0\.5"):
        read_simulated([write_simulated(tmp_path / "s.json")], 0.5)
    (tmp_path / "n.json").write_text("[1]")
    with pytest.raises(BadOption, match="policy simulate"):
        read_simulated([tmp_path / "n.json"], 0.8)


def test_seeds_of_different_fleets_are_no_seeds(tmp_path: Path) -> None:
    first, other = write_simulated(tmp_path / "s.json"), write_simulated(tmp_path / "t.json", replicas=5)
    assert len(read_simulated([first, first], 0.8).runs) == 2
    with pytest.raises(BadOption, match=r"t\.json simulates another fleet"):
        read_simulated([first, other], 0.8)


def test_the_rehearsal_fleet_is_the_one_that_the_documentation_simulates() -> None:
    fleet = load(FLEETS / "rehearsal.yaml")
    large, small = fleet.models
    assert (large.name, large.replicas.min, small.name, fleet.gateway.replicas) == ("large", 4, "small", 2)
    text = (FLEETS.parents[1] / "docs" / "affinity.md").read_text()
    assert f"--replicas {large.replicas.min} --gateways {fleet.gateway.replicas}" in text
    assert f"--prefill-rate {large.settings['prefill_tokens_per_s']:.0f}" in text
    assert large.settings["num_blocks"] == ReplicaModel().num_blocks  # the simulator's default


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    config = make_config(tmp_path)
    with running(config, make_key(config, "test")) as gateway:
        for _ in range(4):
            gateway.add(FakeSettings(prefill_tokens_per_s=20_000, num_blocks=2000))
        gateway.wait_ready(4)
        yield gateway


def test_every_policy_is_run_and_the_old_generation_serves_again(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with gateway.register() as register:
        before = register.publish("aliases: {best: fake}\n", author="test").switch.active
    monkeypatch.setenv("SIGNALBOX_API_KEY", gateway.key)
    monkeypatch.setenv("SIGNALBOX_ADMIN_TOKEN", gateway.admin_token())
    arguments = ["--trace", str(write_trace(tmp_path / "t.jsonl", 200)), "--base-url", gateway.base_url]
    arguments += ["--model", "fake", "--policy", "round_robin", "--policy", "affinity", "--rate", "80"]
    arguments += ["--minutes", f"{2 * (5 + 2) / 60}", "--json", str(tmp_path / "found.json")]
    assert main(arguments) == 0, capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["policy"]: row for row in found["live"]}
    assert all(row["requests"] == 160 and row["errors"] == 0 for row in rows.values())
    assert all(row["ttft_p99_s"] >= row["ttft_p95_s"] >= row["ttft_p50_s"] > 0 for row in rows.values())
    # each conversation's 20 of 21 blocks once (affinity) or on every replica (in turn)
    assert rows["affinity"]["hit_rate"] > 0.8 > rows["round_robin"]["hit_rate"] > 0.5
    assert "affinity has the best token hit rate: yes" in capsys.readouterr().out
    with gateway.register() as register:
        assert register.state().active == before
        assert [entry.author.startswith("admin-") for entry in register.history()] == [True, True, False, False]


def test_a_wrong_admin_token_is_told_in_a_line(
    gateway: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--trace", str(write_trace(tmp_path / "t.jsonl", 200)), "--base-url", gateway.base_url]
    arguments += ["--rate", "100", "--model", "fake"]
    monkeypatch.setenv("SIGNALBOX_API_KEY", gateway.key)
    monkeypatch.delenv("SIGNALBOX_ADMIN_TOKEN", raising=False)
    assert main(arguments) == 2
    assert "SIGNALBOX_ADMIN_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("SIGNALBOX_ADMIN_TOKEN", "adm-wrong")
    assert main(arguments) == 2
    assert "401" in capsys.readouterr().err
