"""`signalbox keys` and `signalbox chat`, as a user runs them."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from deploy import keys_cli
from deploy.chat import ChatFailed, Conversation, chat
from gateway.keys import KeyRegister, load_secret
from replicas.protocol import Chunk, ConfigError, InvalidRequest, ReplicaLost


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path))
    for name in ("SIGNALBOX_KEY_SECRET", "SIGNALBOX_DATABASE", "DATABASE_URL", "SIGNALBOX_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def keys(*arguments: str):
    return CliRunner().invoke(keys_cli.app, list(arguments), catch_exceptions=False)


def test_create_prints_the_key_alone_on_its_last_line_and_list_never_shows_it(home) -> None:
    key = keys("create", "alice", "--tenant", "acme").stdout.splitlines()[-1]
    assert key.startswith("sk-")
    assert " " not in key
    listed = keys("list").stdout
    assert "alice" in listed
    assert "acme" in listed
    assert key not in listed
    with KeyRegister(f"sqlite:///{home}/signalbox.db", load_secret(home)) as register:
        assert [(one.name, one.revoked_at) for one in register.list()] == [("alice", None)]
    assert keys("revoke", "alice").exit_code == 0
    assert "revoked" in keys("list").stdout
    with pytest.raises(InvalidRequest, match="no live key"):
        keys("revoke", "alice")


def talk(gateway, *arguments: str, **options):
    app = typer.Typer()
    app.command()(chat)
    given = ["--base-url", f"{gateway.base_url}/v1", "--api-key", gateway.key, *arguments]
    return CliRunner().invoke(app, given, catch_exceptions=False, **options)


def test_chat_answers_one_question_in_a_pipe(module_gateway, home) -> None:
    with module_gateway.openai() as client:
        messages = [{"role": "user", "content": "hello"}]
        expected = client.chat.completions.create(model="fake", messages=messages, max_tokens=20)
    assert talk(module_gateway, "--max-tokens", "20", "hello").stdout == expected.choices[0].message.content + "\n"


def test_chat_remembers_its_turns_until_reset(module_gateway, home) -> None:
    result = talk(module_gateway, "--max-tokens", "5", input="hello\n/reset\nhello\nhello\n/exit\nnot sent\n")
    answers = [line.removeprefix("> ").removeprefix("> ") for line in result.stdout.splitlines()[1:]]
    assert len(answers) >= 3
    assert answers[0] == answers[1] != answers[2]


def test_a_turn_that_fails_midway_keeps_what_came(start_gateway, scripted, home) -> None:
    connection = scripted([[Chunk(request_id="x", text="some text", token_ids=(1,))], ReplicaLost("gone")])
    gateway = start_gateway(connections=[connection])
    with gateway.http() as http:
        conversation = Conversation(http, "fake", "be brief", {})
        pieces = []
        with pytest.raises(ChatFailed, match="gone"):
            pieces.extend(conversation.say("hello"))
        assert pieces == [] or pieces == ["some text"]
        with pytest.raises(ChatFailed):
            list(conversation.say("again"))
    spoken = bytes(token for token in connection.requests[1].prompt_token_ids if token < 256).decode()
    assert spoken == "system\nbe brief\nuser\nhello\nassistant\nsome text\nuser\nagain\nassistant\n"


def test_chat_says_what_is_missing(module_gateway, home) -> None:
    with pytest.raises(ConfigError, match="no instance is running"):
        chat(prompt="x", base_url=None, api_key="k", model=None, system=None, temperature=None, max_tokens=None)
    with pytest.raises(ChatFailed, match="incorrect API key"):
        talk(module_gateway, "--api-key", "sk-wrong", "hello")
    with pytest.raises(ChatFailed, match="does not answer"):
        talk(module_gateway, "--base-url", "http://127.0.0.1:9", "hello")
