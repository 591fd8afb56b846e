"""Prices from the fleet file, from the hardware's seconds, and from public lists without a network."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from policies import prices
from policies.budget import Price, usd
from replicas.protocol import ConfigError, Usage

NOW = datetime(2026, 11, 24, tzinfo=UTC)


def test_cached_tokens_cost_like_others_unless_the_fleet_file_says_otherwise() -> None:
    assert prices.from_fleet({"input": 1.0, "output": 2.0}) == Price(input=10**6, cached_input=10**6, output=2 * 10**6)
    assert prices.from_fleet({"input": 1.0, "cached_input": 0.0}) == Price(input=10**6)
    assert prices.from_fleet({}).free


def test_an_unknown_kind_of_price_is_refused() -> None:
    with pytest.raises(ConfigError, match="inptu"):
        prices.from_fleet({"inptu": 1.0})


def test_an_hour_of_busy_hardware_costs_its_hourly_rate() -> None:
    price = prices.from_seconds(
        gpus=1, gpu_hour_usd="3.6", cpus=8, cpu_hour_usd="0.045", prefill_rate=2000, decode_rate=100
    )
    one_hour = Usage(prompt_tokens=0, completion_tokens=3600 * 100)
    assert usd(price.cost(one_hour)) == Decimal("3.96")
    assert usd(price.cost(Usage(prompt_tokens=3600 * 2000, completion_tokens=0))) == Decimal("3.96")


@pytest.mark.parametrize("wrong", [{"prefill_rate": 0}, {"decode_rate": -1}, {"gpu_hour_usd": -1, "gpus": 1}])
def test_rates_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        prices.from_seconds(**{"prefill_rate": 1, "decode_rate": 1, **wrong})  # type: ignore[arg-type]


def test_public_prices_are_the_lists_own_and_need_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    from genai_prices import Usage as ListUsage
    from genai_prices import calc_price

    for model, provider in (
        ("gpt-4o-mini", "openai"),
        ("claude-sonnet-4-5", "anthropic"),
        ("gemini-2.5-pro", "google"),
    ):
        for prompt, cached in ((1000, 0), (1000, 400), (300_000, 1000)):
            price = prices.public(model, provider=provider, at=NOW, prompt_tokens=prompt)
            ours = price.cost(Usage(prompt_tokens=prompt, completion_tokens=500, cached_tokens=cached))
            theirs = calc_price(
                ListUsage(input_tokens=prompt, cache_read_tokens=cached, output_tokens=500),
                model,
                provider_id=provider,
                genai_request_timestamp=NOW,
            )
            assert usd(ours) == theirs.total_price


def test_a_model_that_is_on_no_list_is_named() -> None:
    with pytest.raises(ConfigError, match="no-such-model"):
        prices.public("no-such-model", at=NOW)
