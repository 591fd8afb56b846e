"""Budgets and rate limits as callers meet them, over real sockets, with two gateways on one database."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from deploy.cli import app
from gateway import journals
from gateway.config import ServedModel
from gateway.db.database import open_engine, reading
from gateway.ledger import usage
from load import postgres
from replicas.fake import FakeSettings
from tests.gateway.conftest import Gateway, StartGateway, make_key, running

PRICE = {"input": 1.0, "cached_input": 1.0, "output": 2.0}
MODELS = (ServedModel(name="fake", price=PRICE), ServedModel(name="cheap", price={"input": 0.1, "output": 0.1}))
PROMPT = list(range(20))
BODY = {"model": "fake", "prompt": PROMPT, "max_tokens": 10, "ignore_eos": True}
# 20 prompt tokens at 1 and 10 generated ones at 2 dollars a million.
COST = 40e-6

Start = Callable[..., Gateway]


@pytest.fixture
def start(start_gateway: StartGateway) -> Start:
    """`start(policy, database_url=…)`: a gateway with one replica of each model, serving by that policy."""

    def begin(policy: str, settings: FakeSettings | None = None, **changes: Any) -> Gateway:
        gateway = start_gateway(replicas=[], models=MODELS, **changes)
        for model in MODELS:
            gateway.add(settings, name=f"{model.name}-0", model=model.name)
        gateway.wait_ready(2)
        with gateway.register() as register:
            register.publish(policy, author="test")
        return gateway

    return begin


@contextmanager
def second(gateway: Gateway) -> Iterator[Gateway]:
    with running(gateway.config_of_another(), gateway.key) as other:
        other.loop.call_soon_threadsafe(other.directory.publish, [one.server.address for one in gateway.replicas])
        other.wait_ready(2)
        yield other


def standings(gateway: Gateway) -> list[usage.Standing]:
    engine = open_engine(gateway.config.database_url)
    try:
        with reading(engine).begin() as connection:
            return usage.standings(connection, time.time())
    finally:
        engine.dispose()


def settled(gateway: Gateway) -> list[usage.Standing]:
    """The standings once nothing is reserved any more."""
    gateway.wait_until(lambda: not any(one.reserved_usd or one.reserved_tokens for one in standings(gateway)))
    return standings(gateway)


async def send_all(gateways: list[Gateway], count: int, body: dict[str, Any]) -> Counter[int]:
    """`count` requests at once, spread over the gateways, every other one streamed; answers by status."""
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def one(number: int) -> int:
            gateway = gateways[number % len(gateways)]
            url = f"{gateway.base_url}/v1/completions"
            asked = {**body, "stream": number % 4 < 2}
            answer = await client.post(url, json=asked, headers=gateway.headers)
            if answer.status_code == 429:
                assert answer.json()["error"]["type"] == "insufficient_quota"
                assert "retry-after" in answer.headers
            elif asked["stream"]:
                assert answer.text.endswith("data: [DONE]\n\n")
            return answer.status_code

        return Counter(await asyncio.gather(*map(one, range(count))))


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest) -> dict[str, str]:
    """Configuration changes for a database of that kind."""
    return {} if request.param == "sqlite" else {"database_url": postgres.shared().new_database()}


def test_of_200_at_once_a_budget_for_50_serves_exactly_50(start: Start, database: dict[str, str]) -> None:
    budget = f"budgets: [{{key: test, usd: {COST * 50:.6f}, window: day}}]"
    gateway = start(budget, FakeSettings(tokens_per_s=200), **database)
    with second(gateway) as other:
        done = asyncio.run(send_all([gateway, other], 200, BODY))
    assert done == {200: 50, 429: 150}
    (standing,) = settled(gateway)
    assert standing.cap_usd is not None
    assert standing.spent_usd == standing.cap_usd == round(COST * 50 * 1e12)


def test_a_budget_of_tokens_counts_prompt_and_answer(start: Start) -> None:
    gateway = start("budgets: [{key: '*', tokens: 65, window: hour}]")
    assert asyncio.run(send_all([gateway], 4, BODY)) == {200: 2, 429: 2}
    (standing,) = settled(gateway)
    assert standing.spent_tokens == 60


def test_what_was_reserved_and_not_used_comes_back(start: Start) -> None:
    gateway = start("budgets: [{key: test, tokens: 1100, window: hour}]", FakeSettings(reply_tokens=3))
    with gateway.http() as http:
        for _ in range(5):  # each reserves 920
            body = {"model": "fake", "prompt": PROMPT, "max_tokens": 900}
            assert http.post("/v1/completions", json=body).status_code == 200
            settled(gateway)
    assert [one.spent_tokens for one in standings(gateway)] == [5 * 23]


def test_a_client_that_hangs_up_pays_for_what_it_saw(start: Start) -> None:
    gateway = start("budgets: [{key: test, tokens: 5000, window: hour}]", FakeSettings(tokens_per_s=100))
    with gateway.http() as http:
        body = {**BODY, "max_tokens": 2000, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(20):
                next(lines)
    (standing,) = settled(gateway)
    assert 20 + 10 <= standing.spent_tokens < 20 + 200


def test_a_client_that_hangs_up_pays_cached_tokens_as_such(start: Start) -> None:
    gateway = start("budgets: [{key: test, tokens: 5000, window: hour}]", FakeSettings(tokens_per_s=100))
    body = {**BODY, "prompt": list(range(64)), "max_tokens": 1000, "stream": True}
    with gateway.http() as http:
        http.post("/v1/completions", json={**body, "max_tokens": 1, "stream": False})
        with http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
    settled(gateway)
    engine = open_engine(gateway.config.database_url)
    with reading(engine).begin() as connection:
        (total,) = usage.totals(connection)
    engine.dispose()
    assert (total.requests, total.prompt_tokens, total.cached_tokens) == (2, 128, 48)


def test_tokens_of_an_answer_that_began_again_elsewhere_are_borne_by_the_house(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller pays for the one answer that it got; what the dead replica had made is on the books all the same."""
    monkeypatch.setattr(journals, "_SOON_S", 0.2)
    gateway = start("budgets: [{key: test, tokens: 5000, window: hour}]", FakeSettings(tokens_per_s=50))
    dying = gateway.replicas[0]
    with ThreadPoolExecutor(1) as callers, gateway.http() as http:
        asked = callers.submit(http.post, "/v1/completions", json={**BODY, "max_tokens": 100})
        gateway.wait_until(lambda: dying.engine.stats().generation_tokens > 5)
        heir = gateway.add(name="heir")
        gateway.remove(dying)
        dying.server.stop()
        answer = asked.result()
    assert answer.json()["usage"]["completion_tokens"] == 100
    heir.server.adopt()
    made, token = dying.engine.stats().generation_tokens, gateway.admin_token()

    def attempts() -> list[tuple[Any, ...]]:
        found = gateway.explain(answer.headers["x-request-id"], token)[0]["steps"][0]["ledger"]
        return [(one["source"], one["completion_tokens"], one["unbilled_tokens"]) for one in found]

    gateway.wait_until(lambda: attempts() == [("compared", 0, made), ("gateway", 100, 0)])
    assert [one.spent_tokens for one in settled(gateway)] == [20 + 100]
    shown = CliRunner().invoke(app, ["usage", "--json", "--database", gateway.config.database_url])
    assert json.loads(shown.stdout)["total"]["unbilled_tokens"] == made


def test_what_no_replica_took_costs_nothing(start: Start) -> None:
    gateway = start("budgets: [{key: test, tokens: 5000, window: hour}]", FakeSettings(refuse_as_full=True))
    with gateway.http() as http:
        assert http.post("/v1/completions", json=BODY).status_code == 503
    assert [one.spent_tokens for one in settled(gateway)] == [0]


def test_a_rate_limit_tells_where_one_stands_and_when_to_come_again(start: Start) -> None:
    gateway = start("rate_limits: [{key: '*', requests_per_minute: 60, tokens_per_minute: 6000}]")
    with gateway.http() as http:
        first = http.post("/v1/completions", json=BODY)
        assert first.headers["x-ratelimit-limit-requests"] == "60"
        assert first.headers["x-ratelimit-remaining-requests"] == "59"
        assert first.headers["x-ratelimit-limit-tokens"] == "6000"
        statuses = [http.post("/v1/completions", json=BODY).status_code for _ in range(70)]
        refused = http.post("/v1/completions", json={**BODY, "prompt": [7, *PROMPT]})
        assert 200 in statuses
        assert 429 in statuses
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        time.sleep(int(refused.headers["retry-after"]))
        assert http.post("/v1/completions", json={**BODY, "prompt": [7, *PROMPT]}).status_code == 200


def test_everybody_who_waits_as_long_as_told_gets_in(start: Start) -> None:
    """70 at once over two gateways, under newcomers who come all the time; identical bodies among them."""
    gateway = start("rate_limits: [{key: test, requests_per_minute: 60}]")

    async def caller(client: httpx.AsyncClient, number: int, url: str) -> list[int]:
        body = {**BODY, "prompt": [number % 35 + 1, *PROMPT]}  # each body comes from two callers
        first = await client.post(url, json=body, headers=gateway.headers)
        if first.status_code == 200:
            return [200]
        await asyncio.sleep(int(first.headers["retry-after"]))
        return [first.status_code, (await client.post(url, json=body, headers=gateway.headers)).status_code]

    async def newcomers(client: httpx.AsyncClient, url: str) -> None:
        for number in range(1000):
            await client.post(url, json={**BODY, "prompt": [200, number]}, headers=gateway.headers)
            await asyncio.sleep(0.1)

    async def run(urls: list[str]) -> list[list[int]]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
            callers = [asyncio.create_task(caller(client, number, urls[number % 2])) for number in range(70)]
            await asyncio.sleep(0.5)
            pressing = asyncio.create_task(newcomers(client, urls[0]))
            answers = await asyncio.gather(*callers)
            pressing.cancel()
            return answers

    with second(gateway) as other:
        answers = asyncio.run(run([f"{one.base_url}/v1/completions" for one in (gateway, other)]))
    waited = [answer for answer in answers if len(answer) > 1]
    assert len(waited) >= 8
    assert waited == [[429, 200]] * len(waited)


def test_keys_do_not_share_what_is_each_ones_own(start: Start) -> None:
    gateway = start("budgets: [{key: '*', tokens: 30, window: day}]")
    other = make_key(gateway.config, "other")
    with gateway.http() as http, gateway.http(headers={"authorization": f"Bearer {other}"}) as theirs:
        for client in (http, theirs):
            statuses = [client.post("/v1/completions", json=BODY).status_code for _ in range(2)]
            assert statuses == [200, 429]


def test_near_its_budget_a_caller_is_answered_by_the_cheaper_model_and_told(start: Start) -> None:
    gateway = start("budgets: [{key: test, tokens: 300, window: day, downgrade: {at: 20%, to: cheap}}]")
    with gateway.http() as http:
        answers = []
        for _ in range(4):
            answers.append(http.post("/v1/completions", json=BODY))
            settled(gateway)
        told = gateway.explain(answers[-1].headers["x-request-id"], gateway.admin_token())[0]
    assert [answer.json()["model"] for answer in answers] == ["fake", "fake", "cheap", "cheap"]
    assert [answer.headers.get("x-signalbox-downgraded-from") for answer in answers] == [None, None, "fake", "fake"]
    assert told["downgraded_from"] == "fake"


def test_a_caller_near_its_budget_is_not_refused_for_what_the_cheaper_model_cannot_hold(
    start_gateway: StartGateway,
) -> None:
    """It was 400 context_length_exceeded, of a model that the caller had not asked for."""
    gateway = start_gateway(replicas=[], models=MODELS)
    gateway.add(name="fake-0", model="fake")
    gateway.add(FakeSettings(max_model_len=64), name="cheap-0", model="cheap")
    gateway.wait_ready(2)
    with gateway.register() as register:
        policy = "budgets: [{key: test, tokens: 300, window: day, downgrade: {at: 5%, to: cheap}}]"
        register.publish(policy, author="test")
    with gateway.http() as http:
        first, short, long = [http.post("/v1/completions", json={**BODY, "prompt": [7] * n}) for n in (20, 20, 90)]
        assert [one.json()["model"] for one in (first, short, long)] == ["fake", "cheap", "fake"]
        assert [one.headers.get("x-signalbox-downgraded-from") for one in (short, long)] == ["fake", None]
        [cheap] = [one for one in gateway.replicas if one.server.address.model == "cheap"]
        gateway.remove(cheap)
        gateway.wait_ready(1)
        without = http.post("/v1/completions", json=BODY)
    cheap.server.stop()
    assert (without.json()["model"], without.headers.get("x-signalbox-downgraded-from")) == ("fake", None)


def test_a_soft_threshold_is_told_once(start: Start) -> None:
    """In the log and at a webhook, when it is passed and never again in that window."""
    heard: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        hook = f"http://127.0.0.1:{server.server_port}/hook"
        gateway = start(f"budgets: [{{key: test, tokens: 100, window: day, alerts: {{at: [50%], webhook: '{hook}'}}}}]")
        with gateway.http() as http:
            for _ in range(3):
                assert http.post("/v1/completions", json=BODY).status_code == 200
        gateway.wait_until(lambda: bool(heard))
        time.sleep(1.2)  # another round of deliveries would have come by then
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert [event["type"] for event in heard] == ["budget.alert"]
