"""Priorities, bounds, deadlines, retries, hedging, budgets, callers who leave, all at once: nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import httpx
import pytest

from gateway.config import ServedModel
from replicas.fake import FakeSettings
from replicas.mock_upstream import MockUpstream
from replicas.upstream_config import Upstream, UpstreamTimeouts
from tests.gateway.conftest import Gateway, StartGateway
from tests.gateway.test_billing import settled
from tests.gateway.upstream import mock

__all__ = ["mock"]

POLICY = """
budgets: [{key: "*", tokens: 100000000, window: total}, {model: fake, usd: 1000, window: day}]
rate_limits: [{key: "*", concurrency: 200}]
priorities: {classes: {chat: 0, batch: 5}, default: chat, tiers: {flex: {to: batch}}}
admission: {max_queued: 12, max_queued_tokens: 2000, max_queued_per_key: 12, max_deadline_s: 2}
retries:
  attempts: 3
  backoff_s: 0.005
  on: [lost, full, fault, failed, timeout]
  breaker: {failures: 3, cooldown_s: 0.05}
hedging: {fake: {after_s: 0.01, max_share: 50%}, far: {after_s: 0.02, max_share: 100%, to: fake}}
fallbacks: {fake: [far], far: [fake]}
groups: {auto: {models: [fake, far]}}
"""
REQUESTS = 180


async def one(http: httpx.AsyncClient, rng: random.Random) -> str:
    """One caller, and what became of him."""
    body = {
        "model": rng.choice(["fake", "far", "auto"]),
        "messages": [{"role": "user", "content": "x" * rng.randint(1, 300)}],
        "max_tokens": rng.randint(1, 12),
        "n": rng.choice([1, 1, 2]),
        "stream": rng.random() < 0.5,
        **rng.choice([{}, {"priority": rng.randint(0, 9)}, {"service_tier": "flex"}]),
    }
    headers = {"x-request-timeout-ms": str(rng.randint(1, 300))} if rng.random() < 0.5 else {}
    patience = rng.uniform(0.001, 0.2) if rng.random() < 0.3 else 10
    try:
        async with asyncio.timeout(patience):
            answer = await http.post("/v1/chat/completions", json=body, headers=headers)
    except TimeoutError:
        return "left"
    except (httpx.RemoteProtocolError, httpx.ReadError):
        assert body["stream"], "only a stream may be cut"
        return "cut"
    if answer.status_code == 200 and body["stream"]:
        assert answer.text.endswith("data: [DONE]\n\n")
    return str(answer.status_code)


async def everybody(gateway: Gateway, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    limits = httpx.Limits(max_connections=60)
    async with gateway.client(limits=limits, timeout=30) as http:

        async def after(pause_s: float, caller: random.Random) -> str:
            await asyncio.sleep(pause_s)
            return await one(http, caller)

        callers = [after(rng.uniform(0, 1.5), random.Random(rng.random())) for _ in range(REQUESTS)]
        return Counter(await asyncio.gather(*callers))


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_left_behind(start_gateway: StartGateway, mock: MockUpstream, seed: int) -> None:
    timeouts = UpstreamTimeouts(first_token_s=0.2, gap_s=0.2, keep_alive_s=0.5)
    upstream = Upstream(
        name="far",
        base_url=mock.base_url,
        upstream_model=f"status:code=500,times={20 * seed}",
        tokenizer="estimate",
        timeouts=timeouts,
        max_connections=6,
    )
    price = {"input": 1.0, "output": 1.0}
    models = (ServedModel(name="fake", price=price), ServedModel(name="far", price=price))
    slow = FakeSettings(max_num_seqs=4, tokens_per_s=100, prefill_tokens_per_s=3000)
    broken = FakeSettings(max_num_seqs=4, tokens_per_s=200, fail_after_tokens=7)
    gateway = start_gateway(replicas=[slow, broken, slow], models=models, upstreams=(upstream,))
    with gateway.register() as register:
        register.publish(POLICY, author="test")
    found = asyncio.run(everybody(gateway, seed))
    assert set(found) <= {"200", "500", "503", "504", "cut", "left"}, found
    assert found["200"] > REQUESTS / 4
    assert found["504"] > 0
    gateway.assert_idle()
    gateway.wait_until(lambda: mock.open_connections == 0)
    assert not any(one.reserved_usd or one.reserved_tokens for one in settled(gateway))
    services = gateway.app.state.gateway.running.services
    assert services.answering._ledger.open == 0
    assert not +gateway.fleet.waiting
