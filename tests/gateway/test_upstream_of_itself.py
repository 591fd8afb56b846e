"""Our own gateway as the upstream of a gateway: what one side writes the other must read, and pass hang-ups on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import pytest

from replicas.fake import FakeSettings
from replicas.protocol import ConfigError, ContextLengthExceeded, InvalidRequest, Unavailable
from replicas.upstream import UpstreamConnection
from replicas.upstream_config import Upstream
from replicas.upstream_messages import Assembled, UpstreamRequest
from replicas.upstream_tokens import estimate

T = TypeVar("T")
Ask = Callable[[UpstreamConnection], Awaitable[T]]


def with_upstream(gateway: Any, ask: Ask[T], *, key: str = "", model: str = "fake") -> T:
    """`ask` with a connection to the gateway, on a loop of its own."""

    async def run() -> T:
        upstream = Upstream(name="outer", base_url=f"{gateway.base_url}/v1", api_key_env="KEY", upstream_model=model)
        conn = await UpstreamConnection.connect(upstream, environ={"KEY": key or gateway.key}, count=estimate)
        try:
            return await ask(conn)
        finally:
            assert conn.in_flight == 0
            await conn.aclose()

    return asyncio.run(run())


def asking(**body: Any) -> Ask[Assembled]:
    async def ask(conn: UpstreamConnection) -> Assembled:
        request = UpstreamRequest(request_id="outer-1", body=body)
        whole = Assembled(request.choices, chat=request.chat)
        async with aclosing(conn.generate(request)) as stream:
            async for ready in stream:
                whole.add(ready)
        return whole

    return ask


CHAT = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("body", [{"messages": CHAT, "n": 2}, {"prompt": ["one", "two"]}])
def test_answers_and_usage_are_the_same_as_straight_from_the_gateway(module_gateway: Any, body: dict[str, Any]) -> None:
    body = {**body, "max_tokens": 12, "temperature": 0}
    answer = with_upstream(module_gateway, asking(**body))
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    with module_gateway.http() as http:
        straight = http.post(path, json={"model": "fake", **body}).json()
    assert answer.choices() == straight["choices"]
    assert answer.usage is not None
    assert not answer.usage.estimated
    assert answer.usage.completion_tokens == straight["usage"]["completion_tokens"]
    assert answer.usage.prompt_tokens == straight["usage"]["prompt_tokens"]


def test_refusals_keep_their_meaning(module_gateway: Any) -> None:
    with pytest.raises(ContextLengthExceeded):
        with_upstream(module_gateway, asking(messages=[{"role": "user", "content": "x" * 10_000}]))
    with pytest.raises(InvalidRequest) as error:
        with_upstream(module_gateway, asking(messages=CHAT, temperature="hot"))
    assert error.value.param == "temperature"
    with pytest.raises(ConfigError):
        with_upstream(module_gateway, asking(messages=CHAT), key="sk-wrong")
    with pytest.raises(ConfigError):
        with_upstream(module_gateway, asking(messages=CHAT), model="absent")


def test_a_caller_who_leaves_the_outer_side_frees_the_engine_behind_the_inner(start_gateway: Any) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50)])

    async def leave(conn: UpstreamConnection) -> None:
        request = UpstreamRequest(request_id="outer-1", body={"messages": CHAT, "max_tokens": 4000})
        async with aclosing(conn.generate(request)) as stream:
            await anext(stream)
        await asyncio.to_thread(gateway.assert_idle, 2.0)

    with_upstream(gateway, leave)


def test_a_replica_that_dies_in_the_middle_is_no_clean_end_two_doors_further(start_gateway: Any) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50)])

    async def lose(conn: UpstreamConnection) -> str:
        request = UpstreamRequest(request_id="outer-1", body={"messages": CHAT, "max_tokens": 4000})
        async with aclosing(conn.generate(request)) as stream:
            shown = (await anext(stream))[0].text
            await asyncio.to_thread(gateway.replicas[0].server.stop)
            with pytest.raises(Unavailable):
                [ready async for ready in stream]
        return shown

    assert with_upstream(gateway, lose)
    gateway.remove(gateway.replicas[0])
