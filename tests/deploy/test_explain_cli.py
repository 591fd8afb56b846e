from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from replicas.protocol import SignalboxError
from tests.gateway.conftest import StartGateway
from tests.gateway.conftest import start_gateway as start_gateway

COLUMNS = {"COLUMNS": "200"}


def test_explain_shows_candidates_terms_and_what_came_of_them(start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    with gateway.http() as http:
        body = {"model": "fake", "prompt": "Hello", "max_tokens": 4}
        request_id = http.post("/v1/completions", json=body).headers["x-request-id"]
    where = ["explain", request_id, "--database", gateway.config.database_url]
    shown = CliRunner().invoke(app, where, env=COLUMNS)
    assert shown.exit_code == 0, shown.output
    assert all(word in shown.output for word in (request_id, "prefill_ms", "r0 <-", "generation 0", "4 generated"))
    (record,) = json.loads(CliRunner().invoke(app, [*where, "--json"], env=COLUMNS).stdout)
    assert record["steps"][0]["usage"]["completion_tokens"] == 4


def test_explain_of_an_unknown_id_is_an_error(start_gateway: StartGateway) -> None:
    gateway = start_gateway()
    failed = CliRunner().invoke(app, ["explain", "req_x", "--database", gateway.config.database_url])
    assert isinstance(failed.exception, SignalboxError)
    assert "req_x" in failed.exception.message


def test_explain_without_a_gateway_says_so(tmp_path: pytest.TempPathFactory) -> None:
    failed = CliRunner().invoke(app, ["explain", "req_x", "--database", f"sqlite:///{tmp_path}/nobody.db"])
    assert isinstance(failed.exception, SignalboxError)
    assert "no gateway" in failed.exception.message
