"""Every row of the techniques table runs from end to end on a tiny model, and says what it was measured with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from replicas.engine import bench_techniques
from replicas.engine.bench_techniques import INT4, main
from replicas.engine.config import EngineConfig
from replicas.engine.technique_rows import ROWS, Inputs


@pytest.fixture(scope="module")
def long_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with room for a chat."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(small_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("The harbour of Lindesnes was built in 1843. " * 100)
    return tmp_path / "text.txt"


def measured(model: Path, folder: Path, row: str, *more: str) -> dict:  # type: ignore[type-arg]
    out = folder / "out.json"
    arguments = [row, "--model", str(model), "--work", str(folder / "weights"), "--turns", "2", "--quick"]
    assert main([*arguments, "--json", str(out), *more]) == 0
    found: dict = json.loads(out.read_text())  # type: ignore[type-arg]
    return found


@pytest.mark.parametrize("row", [*ROWS, INT4])
def test_a_row_is_measured_in_turns_with_the_settings_that_it_states(
    row: str, long_model: Path, text: Path, tmp_path: Path
) -> None:
    found = measured(long_model, tmp_path, row, "--text", str(text))
    assert found["row"] == row
    for case in found["cases"]:
        assert len(case["turns"]) == 2
        for turn in case["turns"]:
            for side in ("off", "on"):
                assert turn[side]["tokens_per_s"] > 0
                assert turn[side]["ttft_p95_s"] >= turn[side]["ttft_p50_s"] > 0
    for side in ("off", "on"):  # the line can be put into a fleet file
        settings = yaml.safe_load(found[side]["fleet"])["engine_settings"]
        EngineConfig(model="x", **settings)
    quality = found["quality"]
    if quality["what"] == "output":
        assert quality["same"] == quality["of"] > 0
    else:
        assert 0 < quality["same"] <= quality["of"]
        assert all(value > 1 for value in quality["perplexity"])


def test_only_the_prefix_cache_row_finds_prompts_computed(long_model: Path, tmp_path: Path) -> None:
    turns = measured(long_model, tmp_path, "prefix-cache")["cases"][0]["turns"]
    assert all("cached_share" not in turn["off"] for turn in turns)
    shares = [turn["on"]["cached_share"] for turn in turns]
    assert all(0.1 < share < 0.9 for share in shares)
    assert max(shares) - min(shares) < 0.05, "a turn found what another one computed"


def test_int4_without_a_text_rounds_to_the_nearest_and_finds_its_weights_again(
    long_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured(long_model, tmp_path, INT4)
    assert "rtn" in found["on"]["means"]
    assert "perplexity" not in found["quality"]
    monkeypatch.setattr(bench_techniques, "quantize", lambda *_, **__: pytest.fail("made twice"))
    measured(long_model, tmp_path, INT4)


def test_a_technique_that_changes_the_answer_is_seen(
    long_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS["prefix-cache"](Inputs(long_model, tmp_path, quick=True))
    [case] = row.cases
    engines = [bench_techniques._engine(side, Inputs(long_model, tmp_path)) for side in (row.off, row.on)]
    seeds = iter(range(100))
    lying = type(case)(case.workload, lambda engine, on, seed: case.run(engine, on, next(seeds)))
    found = bench_techniques._measure(lying, engines, 1)
    assert bench_techniques._same_output([found])["same"] < len(found["same"])


def test_output_lengths_come_from_the_trace(long_model: Path, tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023,1,48\n" * 20)
    found = measured(long_model, tmp_path, "continuous-batching", "--trace", str(trace))
    assert "azure.csv" in found["cases"][0]["workload"]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["no-such-row", "--model", "x"], 2, "no-such-row"),
        (["int8"], 2, "--model"),
        (["int8", "--model", "x", "--turns", "0"], 2, "--turns must be at least 1, got 0"),
        (["int8", "--model", "/no/such/model"], 1, "/no/such/model"),
        (["continuous-batching", "--model", "x", "--trace", "/no/trace.csv"], 1, "/no/trace.csv"),
    ],
)
def test_bad_options_are_refused_by_name(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        ended = main(arguments)
    except SystemExit as error:
        ended = int(str(error.code))
    assert ended == status
    assert said in capsys.readouterr().err


def test_a_results_fleet_line_names_a_draft_without_this_machines_folders(tmp_path: Path) -> None:
    row = ROWS["speculation"](Inputs(tmp_path / "model", tmp_path, draft=tmp_path / "a-draft"))
    assert "speculative: {method: [ngram, draft_model], model: a-draft}" in row.on.fleet
    assert row.on.settings["speculative"]["model"] == str(tmp_path / "a-draft")
