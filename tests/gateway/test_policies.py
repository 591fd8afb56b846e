"""Policies as callers and admins meet them: groups, cascades, guarantees, fallbacks, generations, explanations."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from gateway.config import Retries, ServedModel
from gateway.db.database import open_engine, reading
from gateway.ledger import usage
from replicas.fake import FakeSettings
from tests.gateway.conftest import Gateway, StartGateway, make_key, running

MODELS = tuple(
    ServedModel(name=name, price={"input": price, "output": price}) for name, price in (("small", 1.0), ("large", 10.0))
)
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
RIGHT_SIZE = "groups: {auto: {models: [small, large], right_size: {cost_weight: %s}}}"


@pytest.fixture
def pair(start_gateway: StartGateway) -> Callable[..., Gateway]:
    """A gateway over one replica of a small and one of a large model."""

    def start(absent: str = "", small: FakeSettings | None = None, **changes: Any) -> Gateway:
        gateway = start_gateway(replicas=[], models=MODELS, **changes)
        for model in MODELS:
            if model.name != absent:
                settings = small if model.name == "small" else None
                gateway.add(settings, name=f"{model.name}-0", model=model.name)
        gateway.wait_ready(2 - bool(absent))
        return gateway

    return start


def publish(gateway: Gateway, text: str) -> int:
    with gateway.register() as register:
        return register.publish(text, author="test").switch.active


def ask(gateway: Gateway, model: str = "auto", **changes: Any) -> tuple[dict[str, Any], str]:
    """(the answer, its request id)."""
    with gateway.http() as http:
        answer = http.post("/v1/chat/completions", json={"model": model, **CHAT, **changes})
    assert answer.status_code == 200, answer.text
    return answer.json(), answer.headers["x-request-id"]


def test_a_group_answers_by_its_trade_and_says_why(pair: Callable[..., Gateway]) -> None:
    gateway = pair()
    token = gateway.admin_token()
    for weight, expected in ((0, "large"), (1e6, "small")):
        number = publish(gateway, RIGHT_SIZE % weight)
        answer, request_id = ask(gateway)
        assert answer["model"] == expected
        (told,) = gateway.explain(request_id, token)
        assert told["generation"] == number
        assert told["model_choice"]["chosen"] == expected
        assert {one["model"] for one in told["model_choice"]["candidates"]} == {"small", "large"}
        assert "untrained" in told["model_choice"]["source"]
        (step,) = told["steps"]
        usage = answer["usage"]
        price = 1e-6 if expected == "small" else 10e-6
        assert told["cost_usd"] == pytest.approx((usage["prompt_tokens"] + usage["completion_tokens"]) * price)
        (attempt,) = step["attempts"]
        assert attempt["replica"] == f"{expected}-0"
        assert attempt["policy"] == "affinity"
        assert {"queue_ms", "prefill_ms", "score"} <= attempt["candidates"][0].keys()
        assert step["ttft_ms"] > 0
        assert step["predicted_ttft_ms"] is not None


def test_groups_and_aliases_are_listed_and_go_with_their_generation(pair: Callable[..., Gateway]) -> None:
    gateway = pair()
    publish(gateway, RIGHT_SIZE % 0 + "\naliases: {best: large, any: auto}")
    with gateway.http() as http:
        assert {one["id"] for one in http.get("/v1/models").json()["data"]} == {"small", "large", "auto", "best", "any"}
        assert http.get("/v1/models/best").json()["root"] == "large"
        assert http.get("/v1/models/any").json()["root"] == "auto"
        publish(gateway, "{}")
        refused = http.post("/v1/chat/completions", json={"model": "auto", **CHAT})
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "model"


def test_a_fallback_answers_when_the_model_has_no_replica(pair: Callable[..., Gateway]) -> None:
    gateway = pair(absent="large", retries=Retries(wait_s=0.3))
    with gateway.http() as http:
        assert http.post("/v1/chat/completions", json={"model": "large", **CHAT}).status_code == 503
    publish(gateway, "fallbacks: {large: [small]}")
    answer, request_id = ask(gateway, "large")
    assert answer["model"] == "small"
    (told,) = gateway.explain(request_id, gateway.admin_token())
    assert [step["role"] for step in told["steps"]] == ["fallback"]


CASCADE = "groups: {auto: {models: [small, large], cascade: {small: small, strong: large, min_mean_logprob: %s}}}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("threshold", "roles"), [(-0.6, ["cascade"]), (-0.4, ["cascade", "answer"])])
def test_a_cascade_keeps_a_confident_answer_and_escalates_the_rest(
    pair: Callable[..., Gateway], threshold: float, roles: list[str], stream: bool
) -> None:
    gateway = pair(small=FakeSettings(logprob=-0.5))
    publish(gateway, CASCADE % threshold)
    body = {"model": "auto", **CHAT, "stream": stream}
    with gateway.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    if stream:
        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        assert answer.text.endswith("data: [DONE]\n\n")
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        model, logprobs = events[0]["model"], events[1]["choices"][0]["logprobs"]
    else:
        choice, model = answer.json()["choices"][0], answer.json()["model"]
        text, logprobs = choice["message"]["content"], choice["logprobs"]
    assert len(text.encode()) == 8
    assert logprobs is None
    assert model == ("large" if len(roles) == 2 else "small")
    (told,) = gateway.explain(answer.headers["x-request-id"], gateway.admin_token())
    assert [step["role"] for step in told["steps"]] == roles
    assert told["steps"][0]["escalated"] == (len(roles) == 2)
    assert told["steps"][0]["mean_logprob"] == pytest.approx(-0.5)
    assert told["cost_usd"] == pytest.approx(sum(step["cost_usd"] for step in told["steps"]))
    assert all(step["cost_usd"] > 0 for step in told["steps"])


def test_a_cascade_goes_on_when_its_small_model_cannot_answer(pair: Callable[..., Gateway]) -> None:
    gateway = pair(absent="small")
    publish(gateway, CASCADE % -0.5)
    assert ask(gateway)[0]["model"] == "large"


def test_a_guarantee_that_is_broken_moves_the_group_to_the_strong_model(pair: Callable[..., Gateway]) -> None:
    gateway = pair(small=FakeSettings(reply_tokens=2))  # one word at most, where the large model says several
    promise = "guarantee: {strong: large, agreement: 0.99, share: 1.0, usd_per_day: 1000}"
    publish(gateway, f"groups: {{auto: {{models: [small, large], right_size: {{cost_weight: 1000000}}, {promise}}}}}")
    token = gateway.admin_token()
    deadline, seen = time.monotonic() + 30, set[str]()
    while "large" not in seen and time.monotonic() < deadline:
        answer, request_id = ask(gateway, max_tokens=40)
        seen.add(answer["model"])
    (told,) = gateway.explain(request_id, token)
    assert seen == {"small", "large"}
    assert "guarantee" in told["model_choice"]["reason"]


def test_a_canary_serves_a_share_of_the_keys_and_each_key_always_alike(pair: Callable[..., Gateway]) -> None:
    gateway = pair()
    publish(gateway, RIGHT_SIZE % 0)
    with gateway.register() as register:
        register.publish(RIGHT_SIZE % 1e6, author="test", canary=0.5)
    keys = [make_key(gateway.config, f"key-{number}") for number in range(24)]
    served = []
    for key in keys:
        with gateway.http(headers={"authorization": f"Bearer {key}"}) as http:
            models = {http.post("/v1/chat/completions", json={"model": "auto", **CHAT}).json()["model"] for _ in "ab"}
        assert len(models) == 1
        served += models
    assert 3 < served.count("small") < 21
    with gateway.register() as register:
        register.promote(author="test")
    assert ask(gateway)[0]["model"] == "small"


def test_every_request_is_explained_by_one_generation_while_policies_change(pair: Callable[..., Gateway]) -> None:
    """Two gateways on one database; generations alternate between two models, so a mixed request would show."""
    gateway = pair()
    model_of: dict[int, str] = {}
    answers: list[tuple[str, str]] = []
    stop = threading.Event()

    with running(gateway.config_of_another(), gateway.key) as other:
        other.loop.call_soon_threadsafe(other.directory.publish, [one.server.address for one in gateway.replicas])
        other.wait_ready(2)

        async def load() -> None:
            async def one(client: httpx.AsyncClient) -> None:
                answer = await client.post("/v1/chat/completions", json={"model": "auto", **CHAT})
                assert answer.status_code == 200, answer.text
                answers.append((answer.headers["x-request-id"], answer.json()["model"]))

            async with gateway.client() as first, other.client() as second:
                tasks = []
                while not stop.is_set():
                    tasks += [asyncio.create_task(one(client)) for client in (first, second)]
                    await asyncio.sleep(0.05)
                await asyncio.gather(*tasks)

        model_of[publish(gateway, RIGHT_SIZE % 0)] = "large"
        thread = threading.Thread(target=lambda: asyncio.run(load()))
        thread.start()
        try:
            for number in range(8):
                model_of[publish(gateway, RIGHT_SIZE % (number + 1e6) if number % 2 == 0 else RIGHT_SIZE % 0)] = (
                    "small" if number % 2 == 0 else "large"
                )
        finally:
            stop.set()
            thread.join()
        token = gateway.admin_token()
        generations = set()
        for request_id, model in answers[::4]:
            (told,) = gateway.explain(request_id, token)
            (attempt,) = told["steps"][0]["attempts"]
            assert model_of[told["generation"]] == model == told["steps"][0]["model"]
            assert attempt["replica"] == f"{model}-0"
            generations.add(told["generation"])
        assert len(generations) > 3
        assert {gateway_id(gateway.explain(i, token)) for i, _ in answers[:2]} == {
            gateway.config.gateway_id,
            other.config.gateway_id,
        }


def gateway_id(told: list[dict[str, Any]]) -> str:
    return str(told[0]["gateway"])


def test_explanations_are_for_admins(pair: Callable[..., Gateway]) -> None:
    gateway = pair()
    _, request_id = ask(gateway, "small")
    with gateway.http() as http:
        refused = http.get(f"/admin/v1/requests/{request_id}")
        assert refused.status_code == 401
        assert refused.json()["error"]["message"]
    with gateway.http(headers={"authorization": f"Bearer {gateway.admin_token()}"}) as http:
        missing = http.get("/admin/v1/requests/req_nobody")
        assert missing.status_code == 404
        assert http.get("/v1/models").status_code == 401


def test_a_refused_request_is_explained_too(pair: Callable[..., Gateway]) -> None:
    gateway = pair()
    with gateway.http() as http:
        refused = http.post("/v1/chat/completions", json={"model": "small", "messages": [], "max_tokens": 3})
    (told,) = gateway.explain(refused.headers["x-request-id"], gateway.admin_token())
    assert told["status"] == 400
    assert told["error"] == refused.json()["error"]["message"]


def test_a_cascade_whose_strong_model_may_not_answer_gives_the_small_ones_answer(
    pair: Callable[..., Gateway],
) -> None:
    gateway = pair(small=FakeSettings(logprob=-0.5))
    publish(gateway, CASCADE % -0.1 + "\nbudgets: [{model: large, tokens: 1, window: day}]")
    answer, request_id = ask(gateway)
    assert answer["model"] == "small"
    (told,) = gateway.explain(request_id, gateway.admin_token())
    assert told["steps"][0]["escalated"] is True


def test_a_prompt_too_long_for_the_small_model_goes_to_the_strong_one_at_once(pair: Callable[..., Gateway]) -> None:
    gateway = pair(small=FakeSettings(logprob=-0.5, max_model_len=64))
    publish(gateway, CASCADE % -0.9)
    answer, _ = ask(gateway, messages=[{"role": "user", "content": "Hello " * 30}])
    assert answer["model"] == "large"


def test_a_fallback_that_the_prompt_does_not_fit_does_not_turn_503_into_400(pair: Callable[..., Gateway]) -> None:
    gateway = pair(absent="large", small=FakeSettings(max_model_len=64), retries=Retries(wait_s=0.2))
    publish(gateway, "fallbacks: {large: [small]}")
    with gateway.http() as http:
        body = {"model": "large", "messages": [{"role": "user", "content": "Hello " * 30}], "max_tokens": 4}
        assert http.post("/v1/chat/completions", json=body).status_code == 503


def test_records_hold_no_prompt_once_the_caller_is_answered(pair: Callable[..., Gateway]) -> None:
    gateway = pair()
    _, request_id = ask(gateway, "small")
    record = gateway.app.state.gateway.running.services.book.get(request_id)
    gateway.wait_until(lambda: not record.steps[0].jobs)
    assert record.steps[0].attempts
    assert record.shown()["steps"][0]["usage"]["completion_tokens"] == 8


def test_what_was_made_before_a_client_left_is_explained(pair: Callable[..., Gateway]) -> None:
    gateway = pair(small=FakeSettings(tokens_per_s=100))
    with gateway.http() as http:
        body = {"model": "small", **CHAT, "max_tokens": 2000, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body, headers={"x-request-id": "left-1"}) as answer:
            lines = answer.iter_lines()
            for _ in range(12):
                next(lines)
    token = gateway.admin_token()
    gateway.wait_until(lambda: gateway.explain("left-1", token)[0]["status"] == 499)
    (told,) = gateway.explain("left-1", token)
    assert told["steps"][0]["usage"]["completion_tokens"] > 3
    assert told["cost_usd"] > 0


def test_shadows_are_on_no_callers_account(pair: Callable[..., Gateway]) -> None:
    gateway = pair()
    promise = "guarantee: {strong: large, share: 1.0, usd_per_day: 1000}"
    publish(
        gateway,
        f"groups: {{auto: {{models: [small, large], right_size: {{cost_weight: 1000000}}, {promise}}}}}\n"
        "budgets: [{team: '*', tokens: 100000, window: day}, {key: '*', tokens: 100000, window: day}]",
    )
    answer, request_id = ask(gateway)
    token = gateway.admin_token()
    gateway.wait_until(lambda: len(gateway.explain(request_id, token)[0]["steps"]) == 2)
    gateway.wait_until(lambda: gateway.explain(request_id, token)[0]["shadow_cost_usd"] > 0)
    engine = open_engine(gateway.config.database_url)
    try:
        with reading(engine).begin() as connection:
            spent = {one.spent_tokens for one in usage.standings(connection, time.time())}
    finally:
        engine.dispose()
    assert spent == {answer["usage"]["total_tokens"]}
