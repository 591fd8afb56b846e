"""Whole runs: worker processes against the null server. What is asserted are counts and kinds, never speeds."""

from __future__ import annotations

import json
import urllib.request
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from load.arrivals import Stage
from load.execute import Collected, ServerRefuses, choose_model, execute, models
from load.http1 import Unreachable, parse_url
from load.plan import Arrivals, ClosedLoop, OpenLoop, Plan, Replayed, Target
from load.workload import Chat, Contents, Synthetic, Workload, parse_lengths
from tests.load.conftest import Start


def plan(
    url: str, arrivals: Arrivals, *, workload: Workload | None = None, target: dict[str, Any] | None = None, **more: Any
) -> Plan:
    workload = workload or Synthetic(Contents(), parse_lengths("12", "p"), parse_lengths("5", "o"))
    return Plan(
        Target(parse_url(url), "scripted", **target or {}),
        workload,
        arrivals,
        **{"scrape": False, "drain_s": 20} | more,
    )


def stats(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(f"{url}/null/stats", timeout=10) as answer:
        return dict(json.load(answer))


def kinds(collected: Collected) -> set[str]:
    return {record.error for record in collected.records}


def test_every_worker_does_its_share_and_nothing_is_lost(null: Start) -> None:
    url = null("--prefix-cache", "4")
    before = stats(url)["requests"]
    got = execute(plan(url, ClosedLoop(6, limit=41), workers=3))
    assert sorted(record.index for record in got.records) == list(range(41))
    assert stats(url)["requests"] - before == 41
    assert kinds(got) == {""}
    assert [end.worker for end in sorted(got.ends, key=lambda end: end.worker)] == [0, 1, 2]
    for record in got.records:
        assert (record.prompt_tokens, record.completion_tokens, len(record.chunks)) == (12, 5, 5)
        assert record.scheduled <= record.begun <= record.sent <= record.first <= record.last <= record.end


@pytest.mark.parametrize("workers", [1, 2])
def test_requests_are_due_when_the_plan_says_whatever_the_number_of_workers(null: Start, workers: int) -> None:
    arrivals = OpenLoop((Stage(60, 60, 0.5),), "gamma", 0.5)
    got = execute(plan(null(), arrivals, workers=workers, seed=4))
    due = [record.scheduled - got.start for record in got.records]
    assert due == pytest.approx(arrivals.times(4).tolist(), abs=1e-6)


def test_a_replay_keeps_the_traces_times(null: Start) -> None:
    got = execute(plan(null(), Replayed((0.0, 0.0, 0.05, 0.3))))
    assert [record.scheduled - got.start for record in got.records] == pytest.approx([0, 0, 0.05, 0.3], abs=1e-6)


def test_turns_of_a_session_follow_each_other(null: Start) -> None:
    chat = Chat(Contents(), parse_lengths("3", "t"), parse_lengths("8", "p"), parse_lengths("4", "o"), think_s=0.02)
    got = execute(plan(null("--prefix-cache", "4"), OpenLoop((Stage(40, 40, 1),), "constant", limit=10), workload=chat))
    assert len(got.records) == 30
    for session in range(10):
        turns = sorted((one for one in got.records if one.index == session), key=lambda one: one.turn)
        assert [one.turn for one in turns] == [0, 1, 2]
        assert [one.prompt_tokens for one in turns] == [8, 20, 32]  # the server's own four words come back
        for one, following in pairwise(turns):
            assert following.scheduled == pytest.approx(one.end + 0.02, abs=1e-6)
            assert following.cached_tokens >= one.prompt_tokens // 4 * 4


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_both_endpoints_in_both_ways(null: Start, stream: bool, endpoint: str) -> None:
    got = execute(plan(null(), ClosedLoop(2, limit=4), target={"stream": stream, "endpoint": endpoint}, keep_text=True))
    assert kinds(got) == {""}
    assert {record.text for record in got.records} == {" word" * 5}
    assert all(bool(record.chunks) == stream for record in got.records)


def test_token_ids_are_counted_exactly(null: Start) -> None:
    ids = Synthetic(Contents(vocab=1000), parse_lengths("37", "p"), parse_lengths("2", "o"))
    got = execute(plan(null(), ClosedLoop(1, limit=3), workload=ids, target={"endpoint": "completions"}))
    assert {record.prompt_tokens for record in got.records} == {37}


@pytest.mark.parametrize(
    ("fault", "kind", "detail"),
    [
        ("401", "status", "401: scripted 401"),
        ("500", "status", "500"),
        ("503", "rejected", "503"),
        ("429", "rejected", "429"),
        ("garbage", "garbage", "not"),
        ("cut", "cut", "broke"),
        ("no-finish", "cut", "[DONE]"),
        ("error-event", "server_error", "scripted failure"),
        ("not-http", "garbage", "HTTP"),
    ],
)
def test_every_other_request_fails_and_is_named_for_what_it_is(null: Start, fault: str, kind: str, detail: str) -> None:
    got = execute(plan(null("--fault", fault, "--fault-every", "2"), ClosedLoop(1, limit=8)))
    failed = [record for record in got.records if record.error]
    assert len(got.records) == 8
    assert len(failed) == 4
    assert {record.error for record in failed} == {kind}
    assert detail in failed[0].detail
    if kind == "rejected":
        assert failed[0].retry_after_s == 1


def test_a_server_of_which_every_answer_fails_is_not_asked_for_ever(null: Start) -> None:
    got = execute(plan(null("--fault", "garbage"), ClosedLoop(4, limit=10_000)))
    assert "the first 20 requests all failed" in got.stopped
    assert 20 <= len(got.records) < 10_000


def test_a_request_without_an_end_times_out(null: Start) -> None:
    got = execute(plan(null("--fault", "hang", "--fault-every", "2"), ClosedLoop(2, limit=6), timeout_s=0.3))
    assert sorted(record.error for record in got.records).count("timeout") == 3
    assert len(got.records) == 6


def test_what_still_runs_after_the_drain_is_counted_unfinished(null: Start) -> None:
    got = execute(plan(null("--ttft", "30s"), OpenLoop((Stage(20, 20, 0.2),), "constant"), drain_s=0.1))
    assert len(got.records) == 4
    assert kinds(got) == {"unfinished"}


def test_a_queueing_server_tells_its_queue(null: Start) -> None:
    got = execute(plan(null("--slots", "1", "--ttft", "20ms"), ClosedLoop(4, limit=12)))
    assert np.median([record.queue_s for record in got.records]) >= 0.03
    assert kinds(got) == {""}


def test_the_servers_load_is_watched(null: Start) -> None:
    got = execute(plan(null("--slots", "1", "--ttft", "20ms"), ClosedLoop(4, duration_s=0.5), scrape=True))
    assert {series.name for series in got.server} >= {"num_requests_running", "num_requests_waiting"}


def test_the_only_model_is_chosen_and_a_wrong_one_refused(null: Start) -> None:
    target = Target(parse_url(null()), "")
    assert choose_model(target, None) == "scripted"
    with pytest.raises(ServerRefuses, match="has no model 'other'; it lists scripted"):
        choose_model(target, "other")


def test_who_is_not_there_or_not_for_us_is_said_before_the_run(null: Start) -> None:
    with pytest.raises(Unreachable, match="nobody listens at"):
        models(Target(parse_url("http://127.0.0.1:9"), ""))
    with pytest.raises(Unreachable, match="not known"):
        execute(plan("http://no-such-host.invalid", ClosedLoop(1, limit=1)))
    url = null("--key", "sk-right")
    with pytest.raises(ServerRefuses, match="wants a key"):
        models(Target(parse_url(url), ""))
    with pytest.raises(ServerRefuses, match="is the key right"):
        models(Target(parse_url(url), "", api_key="sk-wrong"))
    assert models(Target(parse_url(url), "", api_key="sk-right")) == ["scripted"]
