from __future__ import annotations

from pathlib import Path

import pytest

from deploy import app
from deploy.fleet import parse
from replicas.protocol import ConfigError


def test_the_builder_refuses_arguments_it_does_not_know() -> None:
    for args in ({"fleet": "x", "databse": "y"}, {}):
        with pytest.raises(ConfigError, match="fleet, database and state_dir"):
            app.build(args)


def test_a_local_environment_shares_nothing_with_another_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = parse("models: [{name: a, engine: fake, drain_s: 7.5}]")
    found = []
    for name in ("one", "two"):
        monkeypatch.setenv("SIGNALBOX_HOME", str(tmp_path / name))
        run_dir = tmp_path / f"run-{name}"
        run_dir.mkdir()
        found.append(app.environment(fleet, run_dir, "127.0.0.1"))
    own = {key for key, value in found[0].items() if value != found[1][key]}
    shared_places = {key for key in found[0] if key.endswith(("_PATH", "_LOC", "_BASE", "_FILE"))}
    assert shared_places - {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"} <= own
    assert found[0]["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"] == "9"


def test_cpus_are_summed_over_all_processes() -> None:
    fleet = parse(
        "gateway: {replicas: 2, num_cpus: 0.5}\n"
        "models: [{name: a, engine: fake, num_cpus: 1.5, replicas: {min: 2, max: 2}}, {name: b, engine: fake}]"
    )
    assert app.cpus_needed(fleet) == 5.0
