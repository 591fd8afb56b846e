"""Structured logs: a line per request that says what became of it, and never what was said."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.logs import JsonFormatter, destination, redacted
from replicas.fake import FakeSettings
from replicas.protocol import Chunk, ConfigError, EngineFault, ReplicaLost
from tests.gateway.conftest import Gateway, StartGateway

SECRET = "Wunderkind"
CHAT = {"model": "fake", "messages": [{"role": "user", "content": f"Tell me of the {SECRET}"}], "max_tokens": 6}
TOKEN = [Chunk(request_id="x", text="a", token_ids=(1,))]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """Switches logs on, into the gateway's own folder; gives the lines so far."""
    monkeypatch.setenv("SIGNALBOX_LOG", "json:gateway.jsonl")

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "gateway.jsonl").read_text().splitlines()]

    return lines


def post(gateway: Gateway, *, headers: dict[str, str] | None = None, **changes: object) -> httpx.Response:
    with gateway.http(headers={**gateway.headers, **(headers or {})}) as http:
        return http.post("/v1/chat/completions", json={**CHAT, **changes})


def of(log: Callable[[], list[dict[str, Any]]], request_id: str, logger: str = "signalbox.requests") -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        return [line for line in log() if line.get("request_id") == request_id and line["logger"] == logger]

    Gateway.wait_until(lambda: bool(found()))
    (line,) = found()
    return line


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_one_line(start_gateway: StartGateway, log, stream: bool) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=200, prefill_tokens_per_s=2000)])
    answer = post(gateway, headers={"x-request-id": "r-1"}, stream=stream, model="gpt-fake")
    assert answer.status_code == 200
    line = of(log, "r-1")
    assert (line["level"], line["method"], line["route"]) == ("INFO", "POST", "/v1/chat/completions")
    assert (line["status"], line["stream"], line["generation"]) == (200, stream, 0)
    assert (line["model"], line["answered_by"], line["replica"], line["attempts"]) == ("gpt-fake", "fake", "r0", 1)
    assert line["completion_tokens"] == 6
    assert line["prompt_tokens"] > 10
    assert line["key_id"]
    assert line["time"].endswith("Z")
    parts = line["queued_s"] + line["prefill_s"] + line["decode_s"]
    assert 0 < parts <= line["duration_s"]
    assert line["decode_s"] == pytest.approx(5 / 200, abs=0.02)
    assert 0 < line["ttft_s"] < line["duration_s"]
    assert "error" not in line


def test_refusals_and_cut_streams_say_why(start_gateway: StartGateway, log, scripted) -> None:
    gateway = start_gateway(connections=[scripted([TOKEN, 0.01, EngineFault("the engine failed")])])
    post(gateway, headers={"x-request-id": "r-1", "authorization": "Bearer sk-nobody"})
    post(gateway, headers={"x-request-id": "r-2"}, model=SECRET)
    with pytest.raises(httpx.RemoteProtocolError):
        post(gateway, headers={"x-request-id": "r-3"}, stream=True)
    assert (of(log, "r-1")["status"], of(log, "r-1")["error"]) == (401, "AuthenticationFailed")
    assert (of(log, "r-2")["status"], of(log, "r-2")["error"]) == (404, "ModelNotFound")
    assert (of(log, "r-3")["status"], of(log, "r-3")["error"]) == (200, "EngineFault")


def test_a_client_that_hangs_up_is_a_499(start_gateway: StartGateway, log) -> None:
    gateway = start_gateway(replicas=[FakeSettings(tokens_per_s=50)])
    body = {**CHAT, "max_tokens": 4000, "stream": True}
    with gateway.http(headers={**gateway.headers, "x-request-id": "r-1"}) as http:
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
    line = of(log, "r-1")
    assert (line["status"], line["error"]) == (499, "ClientGone")
    assert line["completion_tokens"] >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_an_exception_is_logged_with_its_place_and_without_its_message(
    start_gateway: StartGateway, log, scripted, stream: bool, tmp_path: Path
) -> None:
    gateway = start_gateway(connections=[scripted([TOKEN, ValueError(f"cannot encode {SECRET!r}")])])
    if stream:
        with pytest.raises(httpx.RemoteProtocolError):
            post(gateway, headers={"x-request-id": "r-1"}, stream=True)
    else:
        assert post(gateway, headers={"x-request-id": "r-1"}).status_code == 500
    line = of(log, "r-1", "gateway.generate" if stream else "gateway.edge")
    assert line["level"] == "ERROR"
    assert line["exception"].startswith("ValueError")
    assert any("dispatch.py" in frame for frame in line["stack"])
    assert of(log, "r-1")["error"] == "ValueError"
    assert SECRET not in (tmp_path / "gateway.jsonl").read_text()


def test_what_is_logged_meanwhile_has_the_requests_id_and_what_is_not_has_none(
    start_gateway: StartGateway, log, scripted
) -> None:
    connection = scripted([TOKEN])
    plain = connection.generate

    async def generate(request: Any) -> Any:
        logging.getLogger("gateway.anything").warning("a replica is odd")
        async for ready in plain(request):
            yield ready

    connection.generate = generate
    gateway = start_gateway(connections=[connection])
    post(gateway, headers={"x-request-id": "r-1"})
    logging.getLogger("gateway.anything").warning("nobody's")
    assert of(log, "r-1", "gateway.anything")["message"] == "a replica is odd"
    (other,) = (line for line in log() if line["message"] == "nobody's")
    assert "request_id" not in other


def test_scrapes_and_health_checks_are_no_lines(start_gateway: StartGateway, log) -> None:
    gateway = start_gateway()
    with gateway.http() as http:
        http.get("/health"), http.get("/metrics"), http.get("/v1/models"), http.get(f"/{SECRET}")
    gateway.wait_until(lambda: len(log()) >= 2)
    assert [line["route"] for line in log() if line["logger"] == "signalbox.requests"] == ["/v1/models", "unmatched"]


def test_off_means_off(start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SIGNALBOX_LOG", raising=False)
    before = list(logging.getLogger().handlers)
    gateway = start_gateway()
    assert logging.getLogger().handlers == before
    assert post(gateway).status_code == 200
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    handler = destination({"SIGNALBOX_LOG": "json:a.jsonl"}, str(tmp_path))
    assert handler is not None
    handler.setFormatter(JsonFormatter())
    record = logging.makeLogRecord({"msg": "one", "name": "gateway", "levelname": "INFO"})
    handler.emit(record)
    os.rename(tmp_path / "a.jsonl", tmp_path / "a.jsonl.1")
    handler.emit(record)
    handler.close()
    for name in ("a.jsonl", "a.jsonl.1"):
        assert json.loads((tmp_path / name).read_text())["message"] == "one"


@pytest.mark.parametrize("value", ["yes", "json:", "text", "json:/nowhere/at/all.jsonl"])
def test_what_it_cannot_mean_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="SIGNALBOX_LOG"):
        destination({"SIGNALBOX_LOG": value}, "")


def test_redaction_keeps_causes_and_our_own_messages() -> None:
    try:
        try:
            raise KeyError(SECRET)
        except KeyError as error:
            raise ReplicaLost("the replica is gone") from error
    except ReplicaLost as error:
        safe = redacted(error)
    record = logging.makeLogRecord({"msg": "oh", "exc_info": (type(safe), safe, safe.__traceback__)})
    line = json.loads(JsonFormatter().format(record))
    assert line["exception"] == "ReplicaLost: the replica is gone"
    assert any("KeyError" in frame for frame in line["stack"])
    assert SECRET not in json.dumps(line)
    assert SECRET not in logging.Formatter().format(record)
