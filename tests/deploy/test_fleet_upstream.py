from __future__ import annotations

import dataclasses
import json

import pytest

from deploy.fleet import FLEETS, OpenAIGroup, load, parse, schema
from replicas.protocol import ConfigError
from replicas.upstream_config import Upstream, UpstreamTimeouts

SMALLEST = "models:\n  - name: a\n    engine: openai\n    base_url: http://localhost:9000/v1\n"


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(text, "f.yaml")
    return error.value.message


def test_the_smallest_group_takes_every_default_from_where_it_is_written() -> None:
    [upstream] = parse(SMALLEST).upstreams
    assert upstream == Upstream(name="a", base_url="http://localhost:9000/v1")


def test_everything_that_a_file_says_arrives() -> None:
    text = SMALLEST + (
        "    aliases: [b]\n    api_key_env: A_KEY\n    upstream_model: org/a\n    max_model_len: 4096\n"
        "    default_max_tokens: 99\n    max_connections: 7\n    tokenizer: estimate\n    price: {input: 2}\n"
        "    timeouts: {connect_s: 1, first_token_s: 2, gap_s: 3, keep_alive_s: 2.5}\n"
    )
    fleet = parse(text)
    assert fleet.upstreams == (
        Upstream(
            name="a",
            base_url="http://localhost:9000/v1",
            api_key_env="A_KEY",
            upstream_model="org/a",
            max_model_len=4096,
            default_max_tokens=99,
            max_connections=7,
            tokenizer="estimate",
            timeouts=UpstreamTimeouts(connect_s=1, first_token_s=2, gap_s=3, keep_alive_s=2.5),
        ),
    )
    [served] = fleet.gateway_config(database_url="sqlite:///x", state_dir="home").models
    assert (served.aliases, served.default_max_tokens, served.price["input"]) == (("b",), 99, 2.0)


def test_an_upstream_asks_nothing_of_this_machine() -> None:
    fleet = load(FLEETS / "upstream.yaml")
    [group] = [model for model in fleet.models if isinstance(model, OpenAIGroup)]
    assert (group.replicas.min, group.num_cpus, group.num_gpus) == (0, 0, 0)
    assert [model.name for model in fleet.local] == ["fake"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("    base_ulr: x\n", "f.yaml:5: models[0].base_ulr: unknown key; did you mean 'base_url'?"),
        ("    api_key: sk-123456\n", "f.yaml:5: models[0].api_key: unknown key; did you mean 'api_key_env'?"),
        ("    api_key_env: sk-123456\n", "f.yaml:5: models[0].api_key_env: "),
        ("    timeouts: {gap: 3}\n", "f.yaml:5: models[0].timeouts.gap: unknown key; did you mean 'gap_s'?"),
        ("    timeouts: {gap_s: 0}\n", "f.yaml:5: models[0].timeouts: gap_s must be greater than 0"),
        ("    num_gpus: 1\n", "f.yaml:5: models[0].num_gpus: unknown key"),
        ("    replicas: {min: 2, max: 2}\n", "f.yaml:5: models[0].replicas: unknown key"),
        ("    engine_settings: {}\n", "f.yaml:5: models[0].engine_settings: unknown key"),
        ("    max_connections: 0\n", "max_connections must be at least 1"),
        ("    http2: true\n", "http2: true is not supported"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_path(line: str, message: str) -> None:
    text = refused(SMALLEST + line)
    assert message in text
    assert "123456" not in text


@pytest.mark.parametrize(
    "url",
    ["localhost:9000/v1", "ftp://host/v1", "http://", "http://user:sk-123456@host/v1", "http://host/v1?key=sk-123456",
     "http://host/v1#x", "http://host:99999/v1", "http://ho st/v1"],
)  # fmt: skip
def test_a_base_url_that_is_none_or_holds_secrets_is_refused_without_showing_it(url: str) -> None:
    text = refused(f"models:\n  - name: a\n    engine: openai\n    base_url: '{url}'\n")
    assert text.startswith("f.yaml:4: models[0].base_url: base_url ")
    assert "123456" not in text


def test_the_schema_knows_every_field_of_an_upstream() -> None:
    text = json.dumps(schema())
    inner = {"max_event_bytes", "max_answer_bytes"}
    names = {field.name for kind in (Upstream, UpstreamTimeouts) for field in dataclasses.fields(kind)} - inner
    assert all(f'"{name}"' in text for name in names)
