from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from deploy.app import deployment_names
from deploy.fleet import FLEETS, EngineSettings, FakeEngineSettings, load, parse, schema
from replicas.engine.config import EngineConfig
from replicas.fake import FakeSettings
from replicas.protocol import ConfigError

FAKE = "models:\n  - name: a\n    engine: fake\n"


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(text, "f.yaml")
    return error.value.message


@pytest.mark.parametrize("path", sorted(FLEETS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_fleets_that_come_along_are_valid(path: Path) -> None:
    assert load(path).models


def test_engine_settings_are_the_engines_own_fields_with_their_defaults() -> None:
    for section, config, without in (
        (EngineSettings, EngineConfig, {"model"}),
        (FakeEngineSettings, FakeSettings, set()),
    ):
        fields = {field.name: field.default for field in dataclasses.fields(config) if field.name not in without}
        assert {name: field.default for name, field in section.model_fields.items()} == fields


def test_only_what_the_file_sets_is_passed_on() -> None:
    fleet = parse(FAKE + "    engine_settings: {tokens_per_s: 5}\n")
    assert fleet.models[0].settings == {"tokens_per_s": 5.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modles: []\n", "f.yaml:1: modles: unknown key; did you mean 'models'?"),
        (FAKE + "    engine_settings:\n      tokens_per_sec: 3\n",
         "f.yaml:5: models[0].engine_settings.tokens_per_sec: unknown key; did you mean 'tokens_per_s'?"),
        (FAKE + "gateway:\n  limits:\n    max_body: 3\n",
         "f.yaml:6: gateway.limits.max_body: unknown key; did you mean 'max_body_bytes'?"),
        (FAKE + "    replicas: {min: 1, max: 3}\n", "f.yaml:4: models[0].replicas: min (1) and max (3) must be equal: "
         "autoscaling is not supported yet"),
        (FAKE + "    replicas: {min: 0, max: 0}\n", "f.yaml:4: models[0].replicas.min: "),
        (FAKE + "    source: x\n", "f.yaml:4: models[0].source: unknown key"),
        (FAKE + "    engine: fake\n", "f.yaml:4: models[0]: 'engine' is given twice"),
        (FAKE + "    aliases: [a]\n", "the name 'a' is used twice"),
        (FAKE + "    price: {input: -1}\n", "f.yaml:4: models[0].price.input: "),
        (FAKE + "    price: {input: .nan}\n", "f.yaml:4: models[0].price.input: "),
        (FAKE + "gateway:\n  retries:\n    attempts: 0\n", "f.yaml:5: gateway.retries: attempts and breaker_failures"),
        (FAKE + "gateway:\n  retries:\n    on: [often]\n", "f.yaml:6: gateway.retries.on[0]: Input should be 'lost', "),
        (FAKE + "gateway: {port: 70000}\n", "f.yaml:4: gateway.port: "),
        ("models:\n  - name: a\n    engine: openai\n", "f.yaml:2: models[0].base_url: Field required"),
        ("models:\n  - name: a\n    engine: vllm\n", "engine must be 'signalbox', 'fake' or 'openai'"),
        ("models:\n  - name: a\n", "f.yaml:2: models[0].source: Field required"),
        ("models: []\n", "at least one model"),
        ("models: [", "not valid YAML"),
        ("", "must be a mapping"),
        ("- a\n", "must be a mapping"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line_and_path(text: str, message: str) -> None:
    assert message in refused(text)


def test_every_mistake_is_reported_at_once() -> None:
    lines = refused(FAKE + "    num_cpu: 1\n    default_max_tokens: -1\ngatway: {}\n").splitlines()
    assert len(lines) == 3


def test_a_file_that_is_not_there_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load(tmp_path / "nothing.yaml")


def test_the_schema_knows_every_engine_setting() -> None:
    text = json.dumps(schema())
    assert all(f'"{field.name}"' in text for field in dataclasses.fields(FakeSettings))


def test_deployment_names_are_safe_and_distinct() -> None:
    fleet = parse("models:\n" + "".join(f"  - {{name: '{name}', engine: fake}}\n" for name in ("a/b", "a-b", "ü")))
    assert deployment_names(fleet) == ["model-0-a-b", "model-1-a-b", "model-2-"]


def test_the_gateway_gets_names_prices_and_limits() -> None:
    fleet = parse(FAKE + "    aliases: [b]\n    price: {input: 1, output: 2}\ngateway: {limits: {max_choices: 3}}\n")
    config = fleet.gateway_config(database_url="sqlite:///x", state_dir="home")
    [model] = config.models
    assert (model.name, model.aliases, model.price["output"]) == ("a", ("b",), 2.0)
    assert (config.limits.max_choices, config.database_url, config.state_dir) == (3, "sqlite:///x", "home")


def test_the_cluster_file_holds_a_valid_fleet() -> None:
    document = yaml.safe_load((FLEETS.parent / "serve.yaml").read_text())
    [application] = document["applications"]
    assert application["import_path"] == "deploy.app:build"
    assert parse(yaml.safe_dump(application["args"]["fleet"])).models


def test_recording_traffic_is_switched_and_bounded_in_the_fleet_file() -> None:
    fleet = parse(FAKE + "gateway: {traffic: {record: false, max_days: 2}}\n")
    traffic = fleet.gateway_config(database_url="", state_dir="home").traffic
    assert (traffic.record, traffic.max_days) == (False, 2.0)
    assert parse(FAKE).gateway_config(database_url="", state_dir="home").traffic.record
    with pytest.raises(ConfigError, match="max_mib"):
        parse(FAKE + "gateway: {traffic: {max_mib: 0}}\n")
