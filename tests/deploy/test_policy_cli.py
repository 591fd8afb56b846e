"""`signalbox policy …` and `signalbox admin-token …` as a person types them: output, exit status, what changed."""

from __future__ import annotations

import asyncio
import getpass
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deploy import cli, generations_cli, instance
from deploy.instance import Instance
from gateway.admin_tokens import AdminTokens
from gateway.db.database import Database
from gateway.keys import load_secret
from gateway.policy_follower import PolicyFollower
from policies.document import FleetNames
from policies.document_schema import schema_text
from policies.rightsize.table import ScoreTable
from policies.rightsize.train import train

FLEET = "models:\n  - {name: small, engine: fake}\n  - {name: big, engine: fake, aliases: [large]}\n"


@dataclass(frozen=True)
class Run:
    status: int
    out: str
    err: str


Signalbox = Callable[..., Run]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("SIGNALBOX_DATABASE", "SIGNALBOX_KEY_SECRET"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fleet.yaml").write_text(FLEET)
    return tmp_path / "home"


@pytest.fixture
def signalbox(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Signalbox:
    def run(*arguments: str) -> Run:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["signalbox", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Run(int(ended.value.code or 0), printed.out, printed.err)

    return run


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def test_a_document_goes_through_its_whole_life(signalbox: Signalbox) -> None:
    first, second = write("one.yaml", "aliases:\n  fast: small\n"), write("two.yaml", "aliases:\n  fast: big\n")
    assert signalbox("policy", "diff", first).out == '+ aliases.fast: "small"\n'
    done = signalbox("policy", "publish", first, "--why", "a faster one", "--as", "alice", "--fleet", "fleet.yaml")
    assert (done.status, done.out) == (0, '+ aliases.fast: "small"\ngeneration 1 serves (no gateway runs)\n')
    assert signalbox("policy", "diff", first).out == "no difference\n"
    assert (
        "generation 2 serves 0.05 of the keys, 1 the others"
        in signalbox("policy", "publish", second, "--canary", "5%").out
    )
    assert "generation 2 serves 0.2 of the keys" in signalbox("policy", "promote", "20%").out
    assert "generation 1 serves (" in signalbox("policy", "cancel").out
    assert "generation 3 serves (" in signalbox("policy", "publish", second, "--parent", "1").out
    assert "generation 1 serves (" in signalbox("policy", "rollback", "--why", "slower").out
    assert "generation 3 serves (" in signalbox("policy", "rollback", "3").out
    assert "generation 4 serves 0.5" in signalbox("policy", "publish", first, "--canary", "0.5").out
    assert "generation 4 serves (" in signalbox("policy", "promote").out

    history = json.loads(signalbox("policy", "history", "--json").out)
    assert [(one["number"], one["state"]) for one in history] == [
        (4, "active"), (3, "past"), (2, "past"), (1, "past"), (0, "past"),
    ]  # fmt: skip
    assert (history[3]["author"], history[3]["note"]) == ("alice", "a faster one")
    assert history[0]["author"] == getpass.getuser()
    assert "a faster one" in signalbox("policy", "history").out
    assert signalbox("policy", "show").out == "aliases:\n  fast: small\n"
    assert signalbox("policy", "show", "3").out == "aliases:\n  fast: big\n"
    audit = json.loads(signalbox("policy", "audit", "--json").out)
    assert (audit[-1]["action"], audit[-1]["diff"]) == ("publish", '+ aliases.fast: "small"')
    assert "slower" in signalbox("policy", "audit").out


def test_an_invalid_document_changes_nothing_names_the_line_and_exits_with_1(signalbox: Signalbox) -> None:
    wrong = write("wrong.yaml", "aliases: {}\ngroups:\n  auto:\n    modles: [small]\n")
    for command in ("validate", "diff", "publish"):
        run = signalbox("policy", command, wrong)
        assert (run.status, run.out) == (1, "")
        assert "wrong.yaml:4: groups.auto.modles: unknown key; did you mean 'models'?" in run.err
    assert [one["number"] for one in json.loads(signalbox("policy", "history", "--json").out)] == [0]
    [entry] = json.loads(signalbox("policy", "audit", "--json").out)
    assert (entry["outcome"], "wrong.yaml:4" in entry["detail"]) == ("refused", True)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("publish", "nothing.yaml"), 1, "cannot read"),
        (("publish", "good.yaml", "--parent", "7"), 1, "generation 0 is active, not 7"),
        (("publish", "good.yaml", "--canary", "0%"), 2, "is no share"),
        (("publish", "good.yaml", "--canary", "nan"), 2, "is no share"),
        (("publish", "good.yaml", "--as", "a\nb"), 1, "author"),
        (
            ("publish", "good.yaml", "--fleet", "fleet.yaml"),
            1,
            "good.yaml:1: aliases.x: there is no model or group",
        ),
        (("validate", "good.yaml", "--fleet", "fleet.yaml"), 1, "did you mean 'small'?"),
        (("rollback",), 1, "nothing to roll back to"),
        (("rollback", "9"), 1, "no policy generation 9"),
        (("show", "9"), 1, "no policy generation 9"),
        (("promote",), 1, "no canary"),
        (("promote", "200%"), 2, "is no share"),
        (("cancel",), 1, "no canary"),
    ],
)
def test_refusals_are_sentences_and_exit_statuses(
    signalbox: Signalbox, arguments: tuple[str, ...], status: int, message: str
) -> None:
    write("good.yaml", "aliases: {x: smal}\n")
    run = signalbox("policy", *arguments)
    assert run.status == status
    assert message in " ".join(run.err.replace("│", " ").split())
    assert "Traceback" not in run.err


def test_validating_needs_no_instance_and_makes_no_database(signalbox: Signalbox, home: Path) -> None:
    good = write("good.yaml", "aliases: {fast: small}\n")
    run = signalbox("policy", "validate", good)
    assert run.status == 0
    assert "good.yaml is valid: aliases fast; replicas by affinity (no gateway runs" in run.out
    assert not (home / "signalbox.db").exists()
    assert "not checked" not in signalbox("policy", "validate", good, "--fleet", "fleet.yaml").out


def test_a_document_may_come_from_standard_input(signalbox: Signalbox, monkeypatch: pytest.MonkeyPatch) -> None:
    class Input:
        class buffer:
            @staticmethod
            def read(_: int) -> bytes:
                return b"affinty: {}\n"

    monkeypatch.setattr(sys, "stdin", Input)
    run = signalbox("policy", "publish", "-")
    assert run.status == 1
    assert "standard input:1: affinty: unknown key; did you mean 'affinity'?" in run.err


def test_a_predictor_is_loaded_before_anything_is_published(signalbox: Signalbox, home: Path) -> None:
    rng = np.random.default_rng(0)
    table = ScoreTable(
        prompts=tuple(f"prompt {n} about {n % 7}" for n in range(120)),
        models=("small", "big"),
        scores=rng.random((120, 2)).astype(np.float32),
        tasks=("",) * 120,
    )
    folder = home / "predictors" / "chat"
    train(table, np.ones((120, 2), np.float32), seed=0).predictor.save(folder)
    sha256 = hashlib.sha256((folder / "predictor.json").read_bytes()).hexdigest()
    text = "groups:\n  auto:\n    models: [small, big]\n    right_size:\n      quality_floor: 0.5\n"
    text += "      predictor: {{path: {}, sha256: '{}'}}\n"
    assert signalbox("policy", "validate", write("p.yaml", text.format("chat", sha256))).status == 0
    assert signalbox("policy", "publish", "p.yaml").status == 0
    other = signalbox("policy", "publish", write("p.yaml", text.format("chat", "0" * 64)))
    assert other.status == 1
    assert f"p.yaml:6: groups.auto.right_size.predictor: the predictor there has the sha256 {sha256}" in other.err
    assert "cannot read" in signalbox("policy", "validate", write("p.yaml", text.format("gone", sha256))).err
    stranger = text.format("chat", sha256).replace("[small, big]", "[x, y]")
    assert "none of the group's models" in signalbox("policy", "validate", write("p.yaml", stranger)).err


async def test_running_gateways_know_their_models_and_confirm(signalbox: Signalbox, home: Path) -> None:
    url = f"sqlite:///{home}/signalbox.db"
    database = Database(url)
    follower = PolicyFollower(database, "gw-1", FleetNames(("small",)), lambda number, _: number, poll_s=0.02)
    await follower.start()
    write("p.yaml", "aliases: {fast: smal}\n")
    refused = await asyncio.to_thread(signalbox, "policy", "publish", "p.yaml")
    assert (refused.status, "did you mean 'small'?" in refused.err) == (1, True)
    assert (await asyncio.to_thread(signalbox, "policy", "validate", "p.yaml", "--database", url)).status == 1
    write("p.yaml", "aliases: {fast: small}\n")
    done = await asyncio.to_thread(signalbox, "policy", "publish", "p.yaml")
    assert done.out.endswith("generation 1 serves (1 gateway)\n")
    assert follower.generation_for("key").number == 1
    await follower.aclose()
    database.close()


def test_the_database_is_the_running_instance_s(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = f"sqlite:///{tmp_path}/own.db"
    assert generations_cli.database_url() == f"sqlite:///{home}/signalbox.db"
    record = Instance(pid=1, host="127.0.0.1", port=8000, fleet="default", log="", database=own)
    monkeypatch.setattr(instance, "running", lambda: record)
    assert generations_cli.database_url() == own
    assert generations_cli.database_url("sqlite:///given.db") == "sqlite:///given.db"


def test_the_schema_is_printed_for_editors(signalbox: Signalbox) -> None:
    assert signalbox("policy", "schema").out == schema_text()


async def test_admin_tokens_are_made_listed_and_ended(signalbox: Signalbox, home: Path) -> None:
    made = await asyncio.to_thread(signalbox, "admin-token", "create", "ops")
    token = made.out.strip()
    assert token.startswith("adm-")
    database = Database(f"sqlite:///{home}/signalbox.db")
    tokens = AdminTokens(database, load_secret(home))
    assert (await tokens.authenticate(b"Bearer " + token.encode())).name == "ops"
    database.close()
    assert token not in (await asyncio.to_thread(signalbox, "admin-token", "list")).out
    assert "revoked 'ops'" in (await asyncio.to_thread(signalbox, "admin-token", "revoke", "ops")).out
    assert (await asyncio.to_thread(signalbox, "admin-token", "revoke", "ops")).status == 1
    assert "revoked" in (await asyncio.to_thread(signalbox, "admin-token", "list")).out
