"""The check of publications under traffic: it holds on a real gateway, and it sees what it is there to see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from gateway.config import ServedModel
from load.check_publish import main
from load.live_client import Published, Reply
from load.live_publish import (
    Asked,
    Prescription,
    answered_by,
    check_request,
    document,
    mistakes,
    overlap_ms,
    possible,
)
from policies.document import FleetNames, parse
from policies.yaml_text import DocumentError
from replicas.fake import FakeSettings
from tests.gateway.conftest import Gateway, make_config, make_key, running

MODELS = ("small", "large")
FLEET = FleetNames(MODELS)


def switch(generation: int, asked: float, answered: float) -> Published:
    return Published(generation, asked, answered, ("a", "b"), (), 0.0)


# 1 serves from somewhere in [0, 1] on, 2 from somewhere in [10, 11] on; at [20, 21] it goes back to 1
SWITCHES = (switch(1, 0, 1), switch(2, 10, 11), switch(1, 20, 21))
PRESCRIBED = {1: Prescription("small", "affinity"), 2: Prescription("large", "least_load")}


# ---------------------------------------------------------------------------------------------------------- documents


def test_successive_documents_differ_in_model_and_in_replica_policy() -> None:
    made = [document(number, "auto", MODELS) for number in range(11)]
    for (text, wanted), (_, following) in pairwise(made):
        parsed = parse(text, names=FLEET)
        assert parsed.groups["auto"].models[0] == wanted.model
        assert parsed.affinity.policy == wanted.policy
        assert wanted.model != following.model
        assert wanted.policy != following.policy


@pytest.mark.parametrize("mistake", mistakes("auto", MODELS), ids=lambda mistake: mistake.what)
def test_every_mistake_is_one_and_stands_at_its_line(mistake: Any) -> None:
    with pytest.raises(DocumentError, match=rf"^policy:{mistake.line}: "):
        parse(mistake.document, names=FLEET)


# ---------------------------------------------------------------------------------------------------------- judgement


@pytest.mark.parametrize(
    ("begun", "ended", "generations"),
    [
        (2, 9, {1}),  # between two publications
        (2, 10.5, {1, 2}),  # ended while the next was being published
        (10.5, 12, {1, 2}),  # began while it was
        (11.5, 19, {2}),
        (9, 12, {1, 2}),  # across the whole of it
        (21.5, 30, {1}),  # after the way back
    ],
)
def test_a_generation_may_answer_only_between_its_publication_and_the_end_of_the_next(
    begun: float, ended: float, generations: set[int]
) -> None:
    assert possible(begun, ended, SWITCHES) == generations


def whole(model: str = "small") -> bytes:
    return json.dumps({"model": model, "choices": [{"finish_reason": "stop"}]}).encode()


def streamed(*models: str, done: bool = True, error: bool = False) -> bytes:
    chunks: list[dict[str, Any]] = [{"model": model, "choices": [{"finish_reason": None}]} for model in models]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    chunks += [{"error": {"message": "broken"}}] * error
    events = [json.dumps(chunk).encode() for chunk in chunks] + [b"[DONE]"] * done
    return b"".join(b"data: " + event + b"\n\n" for event in events)


def asked(body: bytes = b"", *, stream: bool = False, begun: float = 2, ended: float = 3, status: int = 200) -> Asked:
    return Asked("id", stream, begun, Reply(begun, ended, status, body=body or whole()))


def explained(**changes: Any) -> dict[str, Any]:
    step = {"role": "answer", "model": "small", "attempts": [{"policy": "affinity"}]}
    return {"generation": 1, "status": 200, "gateway": "a", "created_at": 2.0, "steps": [step], **changes}


def test_a_request_that_is_as_its_generation_says_is_no_violation() -> None:
    assert check_request(asked(), [explained()], SWITCHES, PRESCRIBED) is None
    stream = asked(streamed("small", "small"), stream=True)
    assert check_request(stream, [explained()], SWITCHES, PRESCRIBED) is None


@pytest.mark.parametrize(
    ("one", "records", "what"),
    [
        (asked(status=503), [explained()], "failed request"),
        (replace(asked(), reply=Reply(2, 3, fault="cut: the connection broke")), [explained()], "failed request"),
        (asked(streamed("small", done=False), stream=True), [explained()], "failed request"),
        (asked(streamed("small", error=True), stream=True), [explained()], "failed request"),
        (asked(streamed("small", "large"), stream=True), [explained()], "failed request"),
        (asked(), [], "not explained exactly once"),
        (asked(), [explained(), explained()], "not explained exactly once"),
        (asked(), [explained(generation=2)], "a generation that was not active"),
        (asked(begun=12, ended=13), [explained()], "a generation that was not active"),
        (asked(whole("large")), [explained()], "another model than its generation's"),
        (asked(), [explained(status=None)], "explained as something else"),
        (asked(), [explained(steps=[])], "explained as something else"),
        (
            asked(),
            [explained(steps=[{"role": "answer", "model": "small", "attempts": [{"policy": "round_robin"}]}])],
            "another replica policy than its generation's",
        ),
    ],
)
def test_every_way_to_be_wrong_is_seen(one: Asked, records: list[dict[str, Any]], what: str) -> None:
    found = check_request(one, records, SWITCHES, PRESCRIBED)
    assert found is not None
    assert found.what == what


def test_an_answer_says_which_model_it_is_of() -> None:
    assert answered_by(asked(whole("large"))) == "large"
    assert answered_by(asked(streamed("large"), stream=True)) == "large"
    with pytest.raises(ValueError, match="no whole answer"):
        answered_by(asked(b'{"model": "small", "choices": []}'))


def test_overlap_is_the_longest_time_in_which_two_generations_began_requests() -> None:
    records = [
        explained(generation=1, created_at=10.030, gateway="slow"),
        explained(generation=2, created_at=10.010, gateway="fast"),
        explained(generation=2, created_at=10.040, gateway="slow"),
    ]
    switches = SWITCHES[:2]
    assert overlap_ms(records, switches) == pytest.approx(20.0)
    assert overlap_ms(records[1:], switches) == 0.0


# ------------------------------------------------------------------------------------------------------------ command


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    config = replace(make_config(tmp_path), models=tuple(ServedModel(name=name) for name in MODELS))
    with running(config, make_key(config, "test")) as gateway:
        for name in MODELS:
            gateway.add(FakeSettings(tokens_per_s=400), name=f"{name}-0", model=name)
        gateway.wait_ready(2)
        yield gateway


@pytest.fixture
def arguments(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("SIGNALBOX_API_KEY", gateway.key)
    monkeypatch.setenv("SIGNALBOX_ADMIN_TOKEN", gateway.admin_token())
    return ["--base-url", gateway.base_url, "--publishes", "3", "--rate", "40", "--pause", "0.05"]


def test_publications_under_traffic_hold_and_the_old_generation_serves_again(
    gateway: Gateway, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--gateways", "1", "--json", str(tmp_path / "found.json")]) == 0, capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["violations"] == []
    assert found["publications"] == 3
    assert found["requests"] == found["explained"] > 80
    assert set(found["by_model"]) == set(MODELS)
    assert len(found["refusals"]) == 4
    with gateway.register() as register:
        assert register.state().active == 0
        done = [(entry.action, entry.outcome) for entry in register.audit()]
    assert done.count(("publish", "done")) == 4
    assert done.count(("publish", "refused")) == 4
    assert done.count(("rollback", "done")) == 2


def test_too_few_gateways_are_a_violation(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--gateways", "2", "--publishes", "1"]) == 1
    assert "VIOLATED       1x gateways" in capsys.readouterr().out


def test_a_canary_is_not_ended_for_a_rehearsal(
    gateway: Gateway, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with gateway.register() as register:
        register.publish("aliases: {best: large}\n", author="test", canary=0.5)
    assert main(arguments) == 2
    assert "generation 1 is a canary" in capsys.readouterr().err
    with gateway.register() as register:
        assert register.state().canary == 1


def test_a_group_that_the_fleet_cannot_have_ends_the_check_before_it_begins(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--group", "small"]) == 2
    assert "the fleet has a model" in capsys.readouterr().err
