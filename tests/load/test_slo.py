"""Objectives: what can be written, and what is answered to the rest."""

from __future__ import annotations

import pytest

from load.slo import Objective, parse_objective, parse_objectives
from load.units import BadOption, seconds, share, show_time


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("ttft_p95=500ms", Objective("ttft", 95, 0.5)),
        ("itl_p99.9 <= 80ms", Objective("itl", 99.9, 0.08)),
        ("e2e_mean=2s", Objective("e2e", None, 2)),
        ("error_rate=1%", Objective("error_rate", None, 0.01)),
        ("chunk_gap_p50=0.1", Objective("chunk_gap", 50, 0.1)),
    ],
)
def test_objectives_are_read(text: str, wanted: Objective) -> None:
    assert parse_objective(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        *("", "=", "ttft", "ttft_p95", "ttft_p95=", "ttft_p95=fast", "ttft_p95=-5ms", "ttft_p95=0ms", "ttft_p95>500ms"),
        *("ttft_p95=5 apples", "p95=5s", "ttft_p0=5s", "ttft_p100=5s", "ttft_95=5s", "latency_p95=1s"),
        *("error_rate=5s", "error_rate=200%", "error_rate_p95=1%"),
    ],
)
def test_an_impossible_objective_is_quoted_and_explained(text: str) -> None:
    with pytest.raises(BadOption, match="--slo") as caught:
        parse_objective(text)
    assert repr(text) in str(caught.value)


def test_a_near_miss_gets_a_suggestion() -> None:
    with pytest.raises(BadOption, match="did you mean ttft_p95"):
        parse_objective("tfft_p95=500ms")


def test_several_in_one_text_and_none_twice() -> None:
    assert [one.name for one in parse_objectives(["ttft_p95=1s,itl_p99=50ms", "error_rate=0%"])] == [
        "ttft_p95",
        "itl_p99",
        "error_rate",
    ]
    with pytest.raises(BadOption, match="twice"):
        parse_objectives(["ttft_p95=1s", "ttft_p95=2s"])
    with pytest.raises(BadOption, match="empty"):
        parse_objectives([","])


def test_units() -> None:
    assert [seconds(text) for text in ("500ms", "1.5s", "2m", "1h", "3", "20us")] == pytest.approx(
        [0.5, 1.5, 120, 3600, 3, 2e-5]
    )
    assert (share("5%"), share("0.05")) == (0.05, 0.05)
    assert [show_time(value) for value in (5e-6, 0.0123, 0.5, 1.234, 250.0, float("nan"))] == [
        "5 µs",
        "12.3 ms",
        "500 ms",
        "1.23 s",
        "250 s",
        "-",
    ]
    for wrong in ("", "ms", "1 day", "-1s", "1e3s", "nan", "inf"):
        with pytest.raises(BadOption):
            seconds(wrong)
