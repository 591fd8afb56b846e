from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from policies.compare import compare, saturation_rate
from policies.peers import POLICIES
from policies.sim_replica import ReplicaModel
from policies.simulator import Fleet, SimRequest, prepare, simulate
from policies.traces import TraceRequest

FLEET = Fleet(replicas=4, model=ReplicaModel(num_blocks=400))


def chats(sessions: int, turns: int, seed: int = 0, rate: float = 4.0) -> list[SimRequest]:
    """Conversations over one system prompt: every turn repeats what was said and adds to it."""
    rng = random.Random(seed)
    requests = []
    for session in range(sessions):
        at, blocks = rng.uniform(0, sessions * turns / rate), 4
        for _turn in range(turns):
            blocks += rng.randrange(2, 12)
            ids = (*range(4), *(1000 * (session + 1) + n for n in range(blocks - 4)))
            requests.append(TraceRequest(at, blocks * 16 + 5, rng.randrange(1, 20), ids, 16))
            at += rng.uniform(4, 20)
    return prepare(sorted(requests, key=lambda request: request.arrival_s))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("gateways", [1, 3])
def test_every_request_ends_once_and_every_block_comes_back(policy: str, gateways: int) -> None:
    requests = chats(20, 5)
    result = simulate(requests, policy, replace(FLEET, gateways=gateways), rate_scale=2.0)  # recounts at its end
    assert (result.requests, result.completed, result.refused) == (100, 100, 0)
    assert sum(replica.requests for replica in result.replicas) == 100
    assert result.output_tokens == sum(request.output_tokens for request in requests)
    assert sum(replica.prompt_tokens for replica in result.replicas) == sum(r.prompt_tokens for r in requests)
    assert (result.ttft_s > 0).all()
    assert (result.e2e_s >= result.ttft_s).all()


def test_the_same_seed_gives_the_same_figures_and_another_one_others() -> None:
    requests = chats(20, 4)
    first, again, other = (simulate(requests, "power_of_two", FLEET, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.ttft_s, again.ttft_s)
    assert first.replicas == again.replicas
    assert not np.array_equal(first.ttft_s, other.ttft_s)


def test_a_lone_request_takes_what_its_steps_take() -> None:
    model = ReplicaModel(prefill_rate=100.0, step_s=0.5, decode_s=0.25, max_num_batched_tokens=64)
    [request] = prepare([TraceRequest(3.0, 100, 5)])
    result = simulate([request], "least_load", Fleet(replicas=2, model=model, lag_s=0.125))
    assert result.ttft_s.tolist() == [pytest.approx(2 * 0.5 + 1.0 + 2 * 0.125)]
    assert result.e2e_s.tolist() == [pytest.approx(2 * 0.5 + 1.0 + 4 * 0.75 + 2 * 0.125)]


def test_a_repeated_prompt_is_found_cached_but_for_its_last_block() -> None:
    ids = tuple(range(10))
    requests = prepare([TraceRequest(at, 160, 1, ids, 16) for at in (0.0, 100.0)])
    result = simulate(requests, "affinity", FLEET)
    assert result.hit_rate == pytest.approx(144 / 320)  # the last token is always computed, and with it its block
    assert result.ttft_s[1] < result.ttft_s[0] / 5


def test_a_request_larger_than_a_replica_is_refused_and_the_others_go_on() -> None:
    requests = prepare([TraceRequest(float(n), 40_000 if n == 1 else 50, 3) for n in range(3)])
    result = simulate(requests, "affinity", FLEET)
    assert (result.completed, result.refused) == (2, 1)


def test_affinity_beats_round_robin_and_sees_nearly_as_much_as_the_all_seeing() -> None:
    requests = chats(60, 6)
    ours, turns = (simulate(requests, policy, FLEET, rate_scale=2.0) for policy in ("affinity", "round_robin"))
    truth = simulate(requests, "affinity", replace(FLEET, all_seeing=True), rate_scale=2.0)
    assert ours.hit_rate > 1.5 * turns.hit_rate
    assert ours.hit_rate >= 0.95 * truth.hit_rate
    assert ours.ttft(95) < 0.8 * turns.ttft(95)


def test_a_hot_prefix_spreads_over_the_fleet_when_one_replica_is_not_enough() -> None:
    ids = tuple(range(20))
    requests = prepare([TraceRequest(n * 0.05, 321, 30, ids, 16) for n in range(400)])
    result = simulate(requests, "affinity", FLEET)
    shares = [replica.requests / 400 for replica in result.replicas]
    assert min(shares) > 0.15
    assert result.hit_rate > 0.9


def test_a_burst_on_stale_reports_does_not_pile_up() -> None:
    requests = prepare([TraceRequest(0.0, 200, 4) for _ in range(80)])
    result = simulate(requests, "affinity", replace(FLEET, lag_s=30.0))
    assert {replica.requests for replica in result.replicas} == {20}


def test_saturation_is_where_more_requests_only_wait_longer() -> None:
    requests = chats(60, 6)
    rate = saturation_rate(requests, FLEET)
    own = (len(requests) - 1) / (requests[-1].arrival_s - requests[0].arrival_s)
    over = simulate(requests, "round_robin", FLEET, rate_scale=20 * rate / own)
    assert 0.75 * rate < over.throughput <= rate * 1.1


def test_a_comparison_holds_every_policy_at_every_load_and_judges_ours() -> None:
    found = compare(chats(20, 4), FLEET, ["round_robin", "affinity"], shares=(0.5, 0.9))
    assert [(row.load, row.policy) for row in found.rows] == [
        (load, policy) for load in (0.5, 0.9) for policy in ("all-seeing", "round_robin", "affinity")
    ]
    assert [(target.load, target.bound) for target in found.targets] == [
        (0.5, 0.95),
        (0.5, 1.02),
        (0.9, 0.95),
        (0.9, 0.9),
    ]
    for target in found.targets:
        assert target.met == (target.value >= 0.95 if "hit rate" in target.what else target.value <= target.bound)


def trace_file(folder: Path, lines: int = 40) -> Path:
    path = folder / "trace.jsonl"
    record = {"input_length": 2000, "output_length": 100, "hash_ids": [0, 1, 2, 3]}
    path.write_text("".join(json.dumps({**record, "timestamp": 100 * n}) + "\n" for n in range(lines)))
    return path


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    from deploy.simulate_cli import app

    out = tmp_path / "figures.json"
    run = CliRunner().invoke(app, ["--trace", str(trace_file(tmp_path)), "--load", "0.5", "--json", str(out)])
    assert run.exit_code == 0, run.output
    assert all(policy in run.output for policy in POLICIES)
    figures = json.loads(out.read_text())
    assert len(figures["rows"]) == len(POLICIES) + 1
    assert figures["requests"] == 40


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--trace", "TRACE", "--policy", "fastest"], "fastest"),
        (["--trace", "TRACE", "--load", "-1"], "positive"),
        (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--trace", "BROKEN"], ":41:"),
        (["--trace", "TRACE", "--length-scale", "100"], "divide"),
    ],
)
def test_the_command_refuses_what_it_cannot_use_and_says_why(tmp_path: Path, options: list[str], says: str) -> None:
    from deploy.simulate_cli import app

    trace = trace_file(tmp_path)
    broken = tmp_path / "b.jsonl"
    broken.write_text(trace.read_text() + "{oops\n")
    names = {"TRACE": str(trace), "BROKEN": str(broken)}
    run = CliRunner(env={"COLUMNS": "300"}).invoke(app, [names.get(option, option) for option in options])
    assert run.exit_code == 2
    assert says in run.output
