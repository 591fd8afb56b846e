"""The check of misbehaving upstreams finds what is wrong, and finds nothing wrong with the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.fleet import parse
from load import check_upstreams
from load.check_upstreams import FALLBACK, MOODS, Wrong, check, fleet, left_behind, policy, verdict
from load.http1 import parse_url
from load.live_client import Client, Reply
from load.loop import run
from replicas.mock_upstream import MockUpstream
from tests.gateway.conftest import Gateway, make_config, make_key, running
from tests.gateway.upstream import mock

__all__ = ["mock"]


def whole(text: str, model: str = "far-0", finish: str | None = "length") -> Reply:
    choice = {"message": {"content": text}, "finish_reason": finish}
    return Reply(0.0, status=200, body=json.dumps({"model": model, "choices": [choice]}).encode())


def streamed(text: str, *last: str, fault: str = "", finish: str | None = "length") -> Reply:
    chunk = {"model": "far-0", "choices": [{"delta": {"content": text}, "finish_reason": finish}]}
    events = [json.dumps(chunk), *last]
    return Reply(0.0, status=200, body="".join(f"data: {one}\n\n" for one in events).encode(), fault=fault)


def refused(status: int, error: object, **headers: bytes) -> Reply:
    found = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    return Reply(0.0, status=status, headers=found, body=json.dumps({"error": error}).encode())


RIGHT = check_upstreams._RIGHT
ERROR = json.dumps({"error": {"message": "cut"}})
GOOD = [
    (whole(RIGHT), False, "upstream"),
    (whole("anything", FALLBACK), False, "fallback"),
    (streamed(RIGHT, "[DONE]"), True, "upstream"),
    (streamed("w0 w1 ", ERROR, fault="cut", finish=None), True, "error event"),
    (refused(503, {"message": "m", "code": "c"}, retry_after=b"3"), False, "503 c"),
]
BAD = [
    (whole("w0 "), False),
    (whole(RIGHT, finish=None), False),
    (whole(RIGHT, "elsewhere"), False),
    (streamed("w0 ", "[DONE]"), True),
    (streamed(RIGHT, "[DONE]", fault="cut"), True),
    (streamed("w0 ", fault="cut", finish=None), True),
    (streamed("w0 ", finish=None), True),
    (streamed("w7 ", ERROR, fault="cut", finish=None), True),
    (streamed("w0 ", ERROR, "[DONE]", finish=None), True),
    (refused(503, {"message": "m"}), False),
    (refused(500, {"message": "m"}), False),
    (refused(503, {"message": "see 127.0.0.1:80"}, retry_after=b"3"), False),
    (refused(503, {}, retry_after=b"3"), False),
    (Reply(0.0, fault="timeout"), False),
]


@pytest.mark.parametrize(("reply", "stream", "expected"), GOOD, ids=range(len(GOOD)))
def test_right_answers_and_honest_errors_pass(reply: Reply, stream: bool, expected: str) -> None:
    assert verdict(reply, stream, "far-0") == expected


@pytest.mark.parametrize(("reply", "stream"), BAD, ids=range(len(BAD)))
def test_what_lies_to_the_caller_does_not(reply: Reply, stream: bool) -> None:
    with pytest.raises(Wrong):
        verdict(reply, stream, "far-0")


@pytest.fixture
def gateway(tmp_path: Path, mock: MockUpstream) -> Iterator[Gateway]:
    """One over the fleet of the check."""
    stated = parse(fleet(mock.base_url))
    config = make_config(tmp_path)
    config = stated.gateway_config(database_url=config.database_url, state_dir=config.state_dir)
    with running(config, make_key(config, "load")) as gateway:
        gateway.add(model=FALLBACK)
        gateway.wait_ready(1)
        with gateway.register() as register:
            register.publish(policy(), author="test")
        yield gateway


def test_callers_of_the_gateway_see_right_answers_or_proper_errors_and_nothing_is_left(
    gateway: Gateway, mock: MockUpstream
) -> None:
    found, left = run(check(gateway.base_url, gateway.key, mock.base_url, 8))
    assert [what for one in found for what in one.wrong] == []
    assert not any(left.values()), left
    seen = {one.mood: one.verdicts for one in found}
    assert len(seen) == 2 * len(MOODS)
    assert seen["well"] == {"upstream": 8}
    assert seen["hangs"] == {"fallback": 8}
    assert seen["closes in the middle"] == {"fallback": 4, "error event": 4}
    assert set(seen["is busy (429), alone"]) <= {"503 queue_full", "503 no_replica"}
    assert seen["fails for a while (500)"]["fallback"] >= 1


def test_a_connection_that_stays_open_is_found(
    gateway: Gateway, mock: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check_upstreams, "_PATIENCE_S", 0.3)

    async def leaking() -> dict[str, float]:
        async with (
            Client(parse_url(gateway.base_url), gateway.key) as client,
            Client(parse_url(mock.base_url), "") as books,
            Client(parse_url(mock.base_url), "") as leak,
        ):
            await leak.ask("GET", "/mock")
            return await left_behind(client, books)

    assert run(leaking())["connections at the upstream"] == 1
