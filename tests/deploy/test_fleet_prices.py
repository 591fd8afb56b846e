"""Prices of a fleet file: per token, by the hour of the hardware, or from the public lists."""

from __future__ import annotations

import pytest

from deploy.fleet import parse
from replicas.protocol import ConfigError

HOURLY = "{per_cpu_hour: 0.36, prefill_tokens_per_s: 1000, decode_tokens_per_s: 100}"
ELSEWHERE = "upstream_model: gpt-4o-mini, engine: openai"


def prices_of(group: str) -> dict[str, float]:
    """What the gateway is told, in dollars per million tokens."""
    (model,) = parse(f"models: [{{name: m, {group}}}]").gateway_config(database_url="x", state_dir="").models
    return {kind: dollars for kind, dollars in model.price.items() if dollars}


@pytest.mark.parametrize(
    ("group", "wanted"),
    [
        ("engine: fake, price: {input: 0.1, output: 0.3}", {"input": 0.1, "output": 0.3}),
        # 2 CPUs at 0.36 dollars an hour are 0.0002 a second: 1,000 prompt tokens, or 100 generated ones
        (f"engine: fake, num_cpus: 2, price: {HOURLY}", {"input": 0.2, "output": 2.0}),
        (f"{ELSEWHERE}, base_url: 'https://api.openai.com/v1'", {"input": 0.15, "cached_input": 0.075, "output": 0.6}),
        (f"{ELSEWHERE}, base_url: 'http://127.0.0.1:9/v1'", {}),
        (f"{ELSEWHERE}, base_url: 'https://api.openai.com/v1', price: {{input: 1}}", {"input": 1.0}),
        ("engine: fake, price: {public: gpt-4o, provider: openai}", {"input": 2.5, "cached_input": 1.25, "output": 10}),
    ],
)
def test_prices_are_stated_or_hourly_or_public(group: str, wanted: dict[str, float]) -> None:
    assert prices_of(group) == wanted


@pytest.mark.parametrize(
    ("group", "complaint"),
    [
        ("engine: fake, price: {input: 1, public: gpt-4o}", "exclude each other"),
        ("engine: fake, price: {per_gpu_hour: 2}", "need prefill_tokens_per_s, decode_tokens_per_s and"),
        ("engine: fake, price: {provider: openai}", "needs public"),
        ("engine: fake, price: {public: no-such-model}", "no public price is known"),
        (f"{ELSEWHERE}, base_url: 'http://127.0.0.1:9/v1', price: {HOURLY}", "nothing is known of the hardware"),
    ],
)
def test_a_price_that_cannot_be_is_refused(group: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        prices_of(group)
