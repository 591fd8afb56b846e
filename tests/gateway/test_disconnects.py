"""A client that hangs up ends its request in the engine at once, wherever the request was."""

from __future__ import annotations

import asyncio
import contextlib
import time

import httpx
import pytest

from replicas.fake import FakeSettings
from replicas.protocol import Chunk

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hello"}]}


async def read_some(client: httpx.AsyncClient, body: dict, events: int | None) -> int:
    """Stream and leave after `events` events, or read to the end with None. Returns how many came."""
    seen = 0
    async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            seen += line.startswith("data: ")
            if events is not None and seen >= events:
                break
    return seen


async def test_200_streams_of_which_half_hang_up_leave_nothing_behind(start_gateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=200)] * 2)
    limits = httpx.Limits(max_connections=200)
    async with gateway.client(limits=limits) as client:
        kept = [read_some(client, {**CHAT, "max_tokens": 60}, None) for _ in range(100)]
        dropped = [read_some(client, {**CHAT, "max_tokens": 8000}, 1 + i % 20) for i in range(100)]
        seen = await asyncio.gather(*kept, *dropped)
    assert all(count > 50 for count in seen[:100])
    gateway.assert_idle()
    generated = sum(replica.engine.stats().generation_tokens for replica in gateway.replicas)
    assert generated < 100 * 60 + 100 * 4000, "the streams that hung up must not have run to their end"


@pytest.mark.parametrize("stream", [False, True])
async def test_hanging_up_before_the_first_token_aborts_the_prefill(start_gateway, stream: bool) -> None:
    gateway = start_gateway(replicas=[FakeSettings(prefill_tokens_per_s=1)])
    async with gateway.client() as client:
        with contextlib.suppress(httpx.ReadTimeout):
            await client.post("/v1/chat/completions", json={**CHAT, "stream": stream}, timeout=0.3)
            pytest.fail("a prefill of half a minute was answered")
        gateway.assert_idle(timeout_s=1)
        text = (await client.get("/metrics")).text
    assert 'signalbox_http_requests_total{method="POST",route="/v1/chat/completions",status="499"} 1.0' in text


async def test_hanging_up_on_a_whole_answer_aborts_its_generation(start_gateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=20)])
    async with gateway.client() as client:
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/chat/completions", json={**CHAT, "max_tokens": 8000}, timeout=0.3)
    gateway.assert_idle(timeout_s=1)


async def test_hanging_up_ends_every_prompt_and_choice_of_a_request(start_gateway) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50)] * 2)
    body = {"model": "fake", "prompt": ["a", "b", "c", "d"], "n": 3, "max_tokens": 5000, "stream": True}
    async with gateway.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line:
                break
        # the first event is one prompt's; the others may still be on their way
        gateway.wait_until(lambda: sum(r.engine.stats().num_requests_running for r in gateway.replicas) == 4)
    gateway.assert_idle(timeout_s=1)


async def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(module_gateway) -> None:
    address = httpx.URL(module_gateway.base_url)
    _, writer = await asyncio.open_connection(address.host, address.port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {module_gateway.key}\r\n"
    writer.write(head.encode() + b'content-length: 1000\r\n\r\n{"model":')
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    await writer.wait_closed()
    module_gateway.assert_idle(timeout_s=1)


async def test_the_engine_is_told_within_milliseconds(start_gateway, scripted) -> None:
    connection = scripted([[Chunk(request_id="x", text="a", token_ids=(1,))], 30.0])
    gateway = start_gateway(connections=[connection])
    async with gateway.client() as client:
        await read_some(client, CHAT, 2)
    left = time.monotonic()
    gateway.wait_until(lambda: connection.in_flight == 0, 1)
    assert time.monotonic() - left < 0.5
