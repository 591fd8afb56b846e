"""Which replica a request goes to, seen from outside: real sockets, real KV events, fake engines."""

from __future__ import annotations

import asyncio
from typing import Any

from replicas.fake import FakeSettings
from tests.gateway.conftest import MODEL, Gateway, StartGateway, running

LONG = "a long shared preamble that fills many blocks of the cache; " * 40


def ask(http: Any, prompt: str, max_tokens: int = 2) -> dict[str, Any]:
    answer = http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": max_tokens})
    assert answer.status_code == 200, answer.text
    usage: dict[str, Any] = answer.json()["usage"]
    return usage


def cached(usage: dict[str, Any]) -> int:
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def burst(gateway: Gateway, prompts: list[str], max_tokens: int = 2) -> None:
    """All at once."""

    async def send() -> None:
        async with gateway.client() as client:
            bodies = [{"model": MODEL, "prompt": prompt, "max_tokens": max_tokens} for prompt in prompts]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        assert {answer.status_code for answer in answers} == {200}

    asyncio.run(send())


def indexed(gateway: Gateway) -> int:
    """Blocks that the gateway's prefix index holds."""
    return gateway.fleet.routes[MODEL].prefixes.entries


def test_a_prefix_goes_back_to_the_replica_that_holds_it(start_gateway: StartGateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings() for _ in range(4)])
    with gateway.http() as http:
        prompts = [f"{number} {LONG}" for number in range(6)]
        assert [cached(ask(http, prompt)) for prompt in prompts] == [0] * 6
        gateway.wait_until(lambda: indexed(gateway) >= 6 * (len(LONG) // 16))
        for prompt in prompts:
            assert cached(ask(http, prompt + " and a question")) >= len(LONG) - 16


def test_a_burst_of_different_prompts_spreads_over_idle_replicas(start_gateway: StartGateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50) for _ in range(4)])
    burst(gateway, [f"{number} {LONG}" for number in range(8)])
    assert sorted(replica.engine.stats().prompt_tokens > 0 for replica in gateway.replicas) == [True] * 4


def test_a_hot_prefix_spreads_when_its_replica_is_full(start_gateway: StartGateway) -> None:
    """A queue longer than the prefix is worth makes another replica cheaper; no threshold says so."""
    settings = FakeSettings(tokens_per_s=200, prefill_tokens_per_s=20_000, max_num_seqs=4)
    gateway = start_gateway(replicas=[settings, settings])
    with gateway.http() as http:
        ask(http, LONG)
        gateway.wait_until(lambda: indexed(gateway) > 0)
    burst(gateway, [LONG + str(number) * 200 for number in range(24)], max_tokens=40)
    counts = [replica.engine.stats().prefix_cache_queries for replica in gateway.replicas]
    assert min(counts) > 0


def test_a_gateway_that_starts_late_knows_what_replicas_hold(start_gateway: StartGateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(), FakeSettings()])
    with gateway.http() as http:
        ask(http, LONG)
        known = len(LONG) // 16
        gateway.wait_until(lambda: indexed(gateway) >= known)
        with running(gateway.config_of_another(), gateway.key) as late:
            late.loop.call_soon_threadsafe(
                late.directory.publish, [replica.server.address for replica in gateway.replicas]
            )
            late.wait_ready(2)
            late.wait_until(lambda: indexed(late) >= known)
            with late.http() as other:
                assert cached(ask(other, LONG)) >= len(LONG) - 32


def test_a_replica_that_is_gone_is_forgotten(start_gateway: StartGateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(), FakeSettings()])
    with gateway.http() as http:
        ask(http, LONG)
        gateway.wait_until(lambda: indexed(gateway) > 0)
        holder = next(replica for replica in gateway.replicas if replica.engine.stats().prompt_tokens)
        gateway.remove(holder)
        gateway.wait_ready(1)
        assert cached(ask(http, LONG)) == 0
    holder.server.stop()
