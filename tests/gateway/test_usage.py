"""What was used, by whom, for how much: over the admin API, on the command line, and per request in explanations."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from gateway.config import ServedModel
from gateway.journals import ReplicaJournals
from gateway.ledger.ledger import Ledger
from replicas.fake import FakeSettings
from tests.gateway.conftest import Gateway, StartGateway

PRICE = {"input": 1.0, "cached_input": 0.25, "output": 2.0}
BODY = {"model": "fake", "prompt": list(range(64)), "max_tokens": 10, "ignore_eos": True}
POLICY = """
budgets:
  - {key: test, usd: 0.01, window: day}
  - {team: elsewhere, tokens: 1000, window: month}
"""


@pytest.fixture
def spent(start_gateway: StartGateway) -> Gateway:
    """A gateway that has answered the same prompt twice, the second time from the cache."""
    gateway = start_gateway(models=(ServedModel(name="fake", price=PRICE),), replicas=[FakeSettings()])
    with gateway.register() as register:
        register.publish(POLICY, author="test")
    with gateway.http() as http:
        for number in range(2):
            answer = http.post("/v1/completions", json=BODY, headers={"x-request-id": f"ask-{number}"})
            assert answer.status_code == 200, answer.text
    return gateway


def ask(gateway: Gateway, query: str = "", token: str | None = None) -> Any:
    headers = {"authorization": f"Bearer {token or gateway.admin_token()}"}
    with gateway.http(headers=headers) as http:
        return http.get(f"/admin/v1/usage{query}")


def settled(gateway: Gateway, query: str = "", token: str = "") -> dict[str, Any]:
    """The report once nothing is reserved any more."""
    token = token or gateway.admin_token()
    gateway.wait_until(lambda: not any(b["reserved_tokens"] for b in ask(gateway, token=token).json()["budgets"]))
    found: dict[str, Any] = ask(gateway, query, token).json()
    return found


def test_totals_by_day_key_team_and_model(spent: Gateway) -> None:
    found = settled(spent)
    (row,) = found["data"]
    today = datetime.now(UTC).strftime("%Y-%m-%d")
    assert (row["period"], row["key"], row["team"], row["model"]) == (today, "test", "test", "fake")
    # 48 of 64 prompt tokens came from the cache the second time: one has to be computed, so one block of 16 is
    assert (row["requests"], row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]) == (2, 128, 48, 20)
    micro_usd = (128 - 48) * 1.0 + 48 * 0.25 + 20 * 2.0
    assert row["cost_usd"] == found["total"]["cost_usd"] == pytest.approx(micro_usd / 1e6)
    assert row["estimated"] == 0


def test_budgets_stand_at_what_was_spent_and_unused_ones_at_zero(spent: Gateway) -> None:
    mine, theirs = sorted(settled(spent)["budgets"], key=lambda budget: str(budget["key"] is None))
    assert (mine["key"], mine["window"], mine["cap_usd"], mine["cap_tokens"]) == ("test", "day", 0.01, None)
    assert mine["spent_usd"] == pytest.approx(132e-6)
    assert mine["starts"] <= time.time() < mine["ends"]
    assert (theirs["team"], theirs["cap_tokens"], theirs["spent_tokens"]) == ("elsewhere", 1000, 0)


@pytest.mark.parametrize(
    ("query", "rows", "budgets"),
    [
        ("?key=test", 1, 2),
        ("?key=other", 0, 1),
        ("?team=test&model=fake", 1, 1),
        ("?since=2026-01", 1, 2),
        ("?since=9998-12-31", 0, 2),
    ],
)
def test_filters(spent: Gateway, query: str, rows: int, budgets: int) -> None:
    found = settled(spent, query)
    assert (len(found["data"]), len(found["budgets"])) == (rows, budgets)
    assert found["total"]["requests"] == 2 * rows


def test_it_takes_an_admin_token_and_a_day_that_exists(spent: Gateway) -> None:
    assert ask(spent, token=spent.key).status_code == 401
    refused = ask(spent, "?since=2026-02-30")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "since"
    operation = spent.app.openapi()["paths"]["/admin/v1/usage"]["get"]
    assert operation["security"] == [{"admin": []}]


def test_an_explanation_has_reservation_and_settlement(spent: Gateway) -> None:
    token = spent.admin_token()
    settled(spent, token=token)
    (told,) = spent.explain("ask-1", token)
    (entry,) = told["steps"][0]["ledger"]
    assert (entry["state"], entry["source"], entry["estimated"]) == ("settled", "gateway", False)
    assert (entry["reserved_tokens"], entry["cached_tokens"], entry["completion_tokens"]) == (74, 48, 10)
    assert entry["reserved_usd"] == pytest.approx(84e-6)
    assert entry["cost_usd"] == told["cost_usd"] == pytest.approx(48e-6)


def test_the_command_shows_the_same(spent: Gateway) -> None:
    token = spent.admin_token()
    settled(spent, token=token)
    run = CliRunner().invoke(app, ["usage", "--json", "--since", "7d", "--database", spent.config.database_url])
    assert run.exit_code == 0, run.output
    assert json.loads(run.output) == settled(spent, token=token)
    shown = CliRunner().invoke(app, ["usage", "--database", spent.config.database_url], env={"COLUMNS": "200"})
    assert "0.000132" in shown.output
    assert "key test" in shown.output


def test_what_is_on_the_books_leaves_the_journals(spent: Gateway) -> None:
    """Acknowledged as it is committed, in batches of a quarter of a second."""
    settled(spent)
    journal = spent.replicas[0].server._recorder._journal
    assert journal is not None
    spent.wait_until(lambda: len(journal) == 0)


def test_what_was_not_acknowledged_is_found_to_be_on_the_books(spent: Gateway) -> None:
    settled(spent)
    journal = spent.replicas[0].server._recorder._journal
    assert journal is not None
    spent.wait_until(lambda: len(journal) == 0)
    journal.begin("gw-long-gone", "lost-acknowledgement", 8, "note")
    journal.end("lost-acknowledgement")

    async def tidy() -> None:
        (connection,) = spent.fleet.connections
        services = spent.app.state.gateway.running.services
        ledger: Ledger = services.answering._ledger
        await ReplicaJournals(spent.fleet, ledger).tidy(connection)

    asyncio.run_coroutine_threadsafe(tidy(), spent.loop).result(5)
    spent.wait_until(lambda: len(journal) == 0)
