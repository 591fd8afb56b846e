from __future__ import annotations

import json
from pathlib import Path

import pytest

from load.check_prediction import CALIBRATE, SCENARIOS, judge, live_figures, traffic, write_trace
from policies.traces import read_trace


def test_a_prediction_holds_within_15_percent_or_twice_the_spread_whichever_is_more() -> None:
    assert judge(1.14, [1.0, 1.0, 1.0])[2]
    assert not judge(1.16, [1.0, 1.0, 1.0])[2]
    assert judge(1.39, [0.9, 1.0, 1.1])[2]
    assert not judge(1.41, [0.9, 1.0, 1.1])[2]
    assert not judge(0.84, [1.0, 1.0, 1.0])[2]


def test_every_scenario_is_a_trace_that_shares_its_prefixes(tmp_path: Path) -> None:
    for scenario in (CALIBRATE, *SCENARIOS):
        requests = read_trace(write_trace(tmp_path, scenario))
        assert len(requests) == pytest.approx(scenario.rate * scenario.seconds, rel=0.5)
        firsts = {request.prefix_ids[: scenario.shared] for request in requests}
        assert scenario.groups - 1 <= len(firsts) <= scenario.groups
        assert len({request.prefix_ids[scenario.shared] for request in requests}) == len(requests)
        assert all(16 * scenario.shared < request.prompt_tokens for request in requests)
        assert list(traffic(scenario)) == list(traffic(scenario))


def test_live_figures_are_the_simulators_by_definition() -> None:
    rows = {
        "scheduled": [0.0, 1.0, 2.0],
        "first": [0.5, 1.25, None],
        "end": [1.0, 4.0, 3.0],
        "error": ["", "", "cut"],
        "prompt_tokens": [100, 100, -1],
        "cached_tokens": [0, 50, -1],
    }
    found = live_figures(json.loads(json.dumps({"requests": rows, "generator": {"kept_up": True}})))
    assert (found["completed"], found["failed"]) == (2, 1)
    assert found["ttft_p50_s"] == pytest.approx(0.375)
    assert found["requests_per_s"] == pytest.approx(0.5)
    assert found["hit_rate"] == pytest.approx(0.25)
