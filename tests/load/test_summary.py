"""From records with made-up times to figures."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest

from load import compare, report, results
from load.arrivals import Stage
from load.driver import WorkerEnd
from load.execute import Collected
from load.http1 import parse_url
from load.plan import Arrivals, ClosedLoop, OpenLoop, Plan, Target
from load.record import REJECTED, Record
from load.scrape import Series, grown, parse
from load.slo import parse_objectives
from load.summary import Judging, Prices, summarise
from load.workload import Contents, Synthetic, parse_lengths

START = 100.0


def record(
    index: int, due: float, *, ttft: float = 0.1, itl: float = 0.01, tokens: int = 11, lag: float = 0.001, **more: Any
) -> Record:
    chunks = array("d", [START + due + ttft + itl * k for k in range(tokens)])
    begun = START + due + lag
    found = Record(index, 0, START + due, 20, tokens, begun=begun, sent=begun, status=200, finish_reason="length")
    found.first, found.last, found.end, found.chunks = chunks[0], chunks[-1], chunks[-1], chunks
    found.prompt_tokens, found.completion_tokens, found.cached_tokens = 30, tokens, 10
    for name, value in more.items():
        setattr(found, name, value)
    return found


def refused(index: int, due: float) -> Record:
    when = START + due
    return Record(index, 0, when, 20, 11, begun=when, end=when, status=503, error=REJECTED)


def plan(arrivals: Arrivals | None = None) -> Plan:
    workload = Synthetic(Contents(), parse_lengths("20", "p"), parse_lengths("11", "o"))
    return Plan(Target(parse_url("http://h"), "m"), workload, arrivals or OpenLoop((Stage(10, 10, 20),), "constant"))


def summary(
    records: list[Record], *, arrivals: Arrivals | None = None, ends: list[WorkerEnd] | None = None, **judging: Any
) -> dict[str, Any]:
    collected = Collected(records, start=START, load_end=START + 20, ends=ends or [WorkerEnd(0, 1, 0, 0.1, lasted=20)])
    return summarise(plan(arrivals), collected, Judging(**{"warmup": "none"} | judging), "x")


def even(count: int = 200, **more: Any) -> list[Record]:
    return [record(index, index / 10, **more) for index in range(count)]


def test_figures_of_an_even_run_are_those_of_its_script() -> None:
    run = summary(even())
    means = {metric: found["mean"]["value"] for metric, found in run["latency"].items() if found}
    assert means == pytest.approx(
        {"ttft": 0.1, "tpot": 0.01, "itl": 0.01, "chunk_gap": 0.01, "e2e": 0.2, "ttft_sent": 0.099, "e2e_sent": 0.199}
    )
    assert run["rates"]["requests_per_s"]["value"] == pytest.approx(10, rel=0.01)
    assert run["rates"]["output_tokens_per_s"]["value"] == pytest.approx(110, rel=0.01)
    assert run["rates"]["input_tokens_per_s"]["value"] == pytest.approx(300, rel=0.01)
    assert run["tokens"]["cached_share"] == pytest.approx(1 / 3)
    assert run["generator"]["kept_up"]
    assert not any(run["checks"].values())


def test_a_closed_loops_rate_is_callers_over_latency() -> None:
    records = [record(index, (index // 4) * 0.2) for index in range(400)]
    assert summary(records, arrivals=ClosedLoop(4, duration_s=20))["rates"]["requests_per_s"]["value"] == pytest.approx(
        20, rel=0.01
    )


def test_warm_up_is_cut_from_latencies_and_kept_in_the_rows() -> None:
    records = [record(index, index / 10, ttft=2.0 - index * 0.04 if index < 45 else 0.2) for index in range(200)]
    run = summary(records, warmup="auto")
    warmup = run["window"]["warmup"]
    assert 35 <= warmup["cut"] <= 60
    assert run["latency"]["ttft"]["max"] < 0.7
    assert len(run["requests"]["index"]) == run["counts"]["all"]["sent"] == 200
    assert run["counts"]["measured"]["sent"] == 200 - warmup["cut"]
    assert summary(records, warmup=5.0)["window"]["warmup"]["cut"] == 50


def test_goodput_counts_what_meets_every_objective_and_rejects_beside_it() -> None:
    records = even()
    for at in range(0, 200, 10):
        records[at] = record(at, at / 10, ttft=0.6)  # too late
        records[at + 1] = record(at + 1, (at + 1) / 10, itl=0.05)  # too slow
        records[at + 2] = refused(at + 2, (at + 2) / 10)
    run = summary(records, objectives=parse_objectives(["ttft_p80=500ms", "itl_p99=20ms", "error_rate=11%"]))
    slo = run["slo"]
    assert [one["met"] for one in slo["objectives"]] == [True, False, True]
    assert not slo["met"]
    assert slo["attainment"]["value"] == pytest.approx(0.7)
    assert slo["goodput_requests_per_s"]["value"] == pytest.approx(7, rel=0.03)
    assert slo["reject_rate"]["value"] == pytest.approx(0.1)


def test_what_was_not_measured_meets_no_objective() -> None:
    assert not summary(even(), objectives=parse_objectives(["queue_p95=1s"]))["slo"]["met"]


def test_a_late_generator_is_told_from_a_slow_server() -> None:
    assert not summary(even(ttft=0.15, lag=0.04))["generator"]["kept_up"]
    assert summary(even(ttft=3.0, lag=0.04))["generator"]["kept_up"]  # 40 ms of 3 s are no matter
    stood_still = [WorkerEnd(0, 1, 0, 0.1, stalled=3.0, longest=3.0, lasted=20)]
    assert not summary(even(), ends=stood_still)["generator"]["kept_up"]


def test_cost_counts_cached_tokens_at_their_price() -> None:
    cost = summary(even(), prices=Prices(1.0, 2.0, 0.1))["cost"]
    assert cost["usd"] == pytest.approx(200 * (20 * 1.0 + 10 * 0.1 + 11 * 2.0) / 1e6)
    assert summary(even())["cost"] is None


@pytest.mark.parametrize(
    ("flaw", "more"),
    [
        ("no_usage", {"completion_tokens": -1}),
        ("more_events_than_tokens", {"completion_tokens": 9, "finish_reason": "stop"}),
        ("more_tokens_than_asked", {"asked_output": 10, "finish_reason": "stop"}),
        ("length_but_not_as_asked", {"asked_output": 12}),
        ("prompt_smaller_than_put_in", {"prompt_tokens": 19}),
        ("more_cached_than_prompt", {"cached_tokens": 31}),
    ],
)
def test_usage_is_checked_against_our_own_count(flaw: str, more: dict[str, Any]) -> None:
    checks = summary([record(0, 0.0, **more)])["checks"]
    assert {name for name, count in checks.items() if count} == {flaw}


def test_a_tokenizer_counts_again() -> None:
    records = [record(0, 0.0, text="a " * 11), record(1, 1.0, text="a " * 5)]
    assert summary(records, count=lambda text: len(text.split()))["checks"]["not_as_tokenizer_counts"] == 1


def test_an_empty_run_has_no_figures_and_no_errors() -> None:
    run = summary([])
    assert run["counts"]["all"]["sent"] == 0
    assert run["latency"]["ttft"] is None
    page = report.page([("a.json", results.document("run", {}, [run]))])
    assert "<h2>" in page


# ------------------------------------------------------------------------------------------------------ files and pages


def document(run: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return results.document("run", settings, [run])


def test_files_keep_their_figures(tmp_path: Any) -> None:
    path = tmp_path / "a.json"
    results.write(path, document(summary(even()), seed=1))
    back = results.read(path)
    assert back["schema"] == "signalbox.load/1"
    assert back["runs"][0]["latency"]["e2e"]["p50"]["value"] == pytest.approx(0.2)
    path.write_text('{"schema": "other"}')
    with pytest.raises(results.LoadError, match="other"):
        results.read(path)
    path.write_text("{")
    with pytest.raises(results.LoadError, match="not JSON"):
        results.read(path)


def test_compared_runs_have_ratios_and_their_differences_named() -> None:
    slow = summary(even(ttft=0.2))
    group = compare.pairs([("a", document(summary(even()), rate=10)), ("b", document(slow, rate=12))])[0]
    found = {row["name"]: row["ratio"]["value"] for row in compare.as_json(group)[0]["figures"]}
    assert found["TTFT p50"] == pytest.approx(2.0)
    assert found["TPOT p50"] == pytest.approx(1.0)
    assert compare.as_json(group)[0]["asked_differently"] == ["rate: 10 / 12"]


def test_a_page_fetches_nothing_and_escapes_what_servers_say() -> None:
    bad = record(3, 0.3, error="status", detail='500: <script>alert("x")</script>')
    run = summary([*even(), bad])
    run["server"] = [
        {"name": "num_requests_running", "labels": 'replica="<b>"', "times": [0.0, 1.0], "values": [1.0, 2.0]}
    ]
    page = report.page([("a.json", document(run)), ("b.json", document(summary(even())))])
    assert "<script" not in page
    assert "<b>" not in page
    assert "http://" not in page.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert page.count("<svg") >= 8
    assert "Replicas: requests running" in page


def test_metrics_are_read_whatever_their_prefix() -> None:
    text = (
        '# HELP x\nvllm:num_requests_running{model_name="m"} 3\nsignalbox_prefix_cache_hits_total{replica="a"} 5\n'
        'signalbox_prefix_cache_hits_total{replica="b"} 7\nother_metric 9\n'
        "signalbox_kv_cache_usage_perc NaN\nbroken{ 1\n"
    )
    found = parse(text)
    assert found["num_requests_running", 'model_name="m"'] == 3
    assert sum(value for (name, _), value in found.items() if name == "prefix_cache_hits_total") == 12
    assert grown([Series("a", "", [0, 1], [5, 9]), Series("a", "x", [0, 1], [1, 2])], "a") == 5
    assert grown([], "a") is None


def test_percentiles_of_a_known_distribution_come_back() -> None:
    rng = np.random.default_rng(0)
    records = [record(index, index / 100, ttft=float(value)) for index, value in enumerate(rng.exponential(0.5, 2000))]
    found = summary(records)["latency"]["ttft"]
    for rank, truth in (("p50", 0.3466), ("p90", 1.1513), ("p99", 2.3026)):
        assert found[rank]["low"] <= truth <= found[rank]["high"]
