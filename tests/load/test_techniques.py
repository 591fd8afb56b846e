"""The techniques table: figures, Markdown and page, what it keeps and refuses; both fleet rows on a real gateway."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from load.techniques import affinity, measure, right_size, show
from load.techniques.__main__ import main
from load.techniques.catalogue import NOT_BUILT, TECHNIQUES
from load.techniques.figures import broken, change, cost, latency, priced, quality, throughput
from load.units import BadOption, LoadError
from replicas.fake import FakeSettings
from tests.gateway.conftest import Gateway, ServedModel, make_config, make_key, running

Json = dict[str, Any]


def turn(off: float, on: float, **more: float) -> Json:
    return {"off": {"tokens_per_s": off, **more}, "on": {"tokens_per_s": on, **more}}


def row(name: str = "prefix-cache", **changes: Any) -> Json:
    return {
        "row": name,
        "where": "here",
        "off": {"means": "without", "fleet": "engine_settings: {enable_prefix_caching: false}"},
        "on": {"means": "with", "fleet": "engine_settings: {enable_prefix_caching: true}"},
        "cases": [{"workload": "3 chats | <b>", "turns": [turn(100, 200), turn(100, 250), turn(110, 198)]}],
        "quality": {"what": "output", "same": 3, "of": 3},
        "seconds": 60.0,
        **changes,
    }


def document(*rows: Json) -> Json:
    machine = {"cores": 2, "processor": "P", "system": "S", "python": "3", "signalbox": "0"}
    inputs = {"model": "m", "turns": 3, "quick": False}
    return {"schema": measure.SCHEMA, "machine": machine, "inputs": inputs, "usd_per_hour": 0.36, "rows": list(rows)}


# ------------------------------------------------------------------------------------------------------------ figures


def test_a_ratio_is_of_one_turn_never_of_medians() -> None:
    found = change([turn(100, 200), turn(50, 200), turn(400, 400)], "tokens_per_s")
    assert found is not None
    assert (found.off, found.on) == (100, 200)
    assert (found.ratio, found.low, found.high) == (2.0, 1.0, 4.0)


def test_a_figure_that_one_side_lacks_has_no_ratio() -> None:
    assert change([{"off": {}, "on": {"x": 1.0}}], "x") is None
    assert change([turn(1, 2, x=1.0), turn(1, 2)], "x") is None


def test_cost_is_an_hour_over_its_tokens_unless_the_row_has_prices() -> None:
    case = {"turns": [turn(100, 200)]}
    assert cost(priced(case, 0.36)) == "1.00 → 0.50, -50%"
    case = {"turns": [turn(100, 200, usd_per_million=3.0)]}
    assert cost(priced(case, 0.36)) == "3.00 → 3.00, +0%"


def test_cells_say_both_sides_and_the_spread() -> None:
    turns = [turn(100, 200, ttft_p50_s=0.5), turn(100, 250, ttft_p50_s=0.5), turn(110, 198, ttft_p50_s=0.5)]
    assert throughput(turns) == "100 → 200, 2.00x (1.80 to 2.50)"
    assert latency(turns, "ttft") == "p50 500 ms → 500 ms"
    assert latency(turns, "itl") == ""


def test_quality_in_words() -> None:
    assert quality({"what": "output", "same": 4, "of": 4}) == "same tokens in all 4 answers"
    assert quality({"what": "output", "same": 3, "of": 4}) == "TOKENS DIFFER in 1 of 4 answers"
    weights = {"what": "weights", "same": 97, "of": 100, "layers_smaller_than_16_bits": 1.9, "perplexity": [20.0, 20.2]}
    assert quality(weights) == (
        "first choice as float32's: 97.0% of 100 tokens; perplexity 20.00 → 20.20, +1.0%; "
        "layers 1.9x smaller than in 16 bits"
    )
    scores = {"what": "scores", "scores": [0.65, 0.66], "change": [-0.01, 0.01, 0.03]}
    assert quality(scores) == "mean score 0.650 → 0.660, +0.010 (-0.010 to +0.030)"


def test_other_tokens_and_rows_without_figures_break_the_run() -> None:
    assert broken(row()) == ""
    assert broken(row(quality={"what": "output", "same": 2, "of": 3})).startswith("TOKENS DIFFER in 1")
    assert broken({"row": "int8", "failed": "no memory"}) == "no memory"


# ---------------------------------------------------------------------------------------------------- Markdown, HTML


def readme(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(f"before\n\n{show.BEGIN}\nold\n{show.END}\n\nafter\n")
    return tmp_path / "README.md"


def test_the_readme_has_the_table_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    path = readme(tmp_path)
    show.into(path, document(row(), {"row": "disaggregated-prefill", "not_built": True}))
    once = path.read_text()
    assert once.startswith("before\n\n")
    assert once.endswith(f"{show.END}\n\nafter\n")
    assert "old" not in once
    assert "| prefix cache | 3 chats \\| <b> | 100 → 200, 2.00x (1.80 to 2.50) |" in once
    assert "| disaggregated prefill | not built |" in once
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in once.splitlines() if line.startswith("|")}
    assert widths == {len(show.COLUMNS) + 1}
    show.into(path, document(row(), {"row": "disaggregated-prefill", "not_built": True}))
    assert path.read_text() == once


def test_a_readme_without_marks_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{show.END} {show.BEGIN}")
    with pytest.raises(LoadError, match="no place for the table"):
        show.into(tmp_path / "README.md", document(row()))
    assert (tmp_path / "README.md").read_text() == f"{show.END} {show.BEGIN}"


def test_the_readme_of_the_repository_has_the_table_of_its_file(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "README.md").write_text((root / "README.md").read_text())
    show.into(tmp_path / "README.md", measure.read(root / "docs" / "techniques.json"))
    assert (tmp_path / "README.md").read_text() == (root / "README.md").read_text()


def test_a_machine_that_others_used_is_told() -> None:
    assert "OTHER PROGRAMS" not in show.caption(document(row(load_before=2.4)))
    assert "OTHER PROGRAMS WERE RUNNING (load average up to 9)" in show.caption(document(row(load_before=9.1), row()))


def test_every_kind_of_traffic_has_a_line_and_quality_stands_once() -> None:
    cases = [{"workload": name, "turns": [turn(1, 2)]} for name in ("code", "chat")]
    lines = list(show.lines(document(row("speculation", cases=cases))))
    lines = [cells for cells in lines if cells[1] in ("code", "chat")]
    assert [cells[0] for cells in lines] == ["speculation", ""]
    assert [bool(cells[-2]) for cells in lines] == [True, False]


def test_what_was_not_measured_has_its_line_too() -> None:
    lines = {cells[0]: cells[1] for cells in show.lines(document(row()))}
    assert len(lines) == len(TECHNIQUES)
    assert (lines["INT8 weights"], lines["disaggregated prefill"]) == ("not measured", "not built")


def test_the_page_is_self_contained_and_escapes_what_it_shows() -> None:
    page = show.page(document(row(), {"row": "int8", "failed": "<no> memory"}))
    assert "enable_prefix_caching: true" in page
    assert "3 chats | &lt;b&gt;" in page
    assert "&lt;no&gt; memory" in page
    assert "<svg" in page
    assert not re.search(r"<script|<link|src=|https?://", page)


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of engine rows that were measured, none of which takes an engine."""
    names: list[str] = []

    def engine_row(name: str, options: measure.Options) -> Json:
        if name in names and name == "int8":
            raise LoadError("no memory")
        names.append(name)
        return row(name)

    monkeypatch.setattr(measure, "_engine_row", engine_row)
    return names


def command(tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "model").mkdir(exist_ok=True)
    return ["--model", str(tmp_path / "model"), "--dir", str(tmp_path / "out"), *more]


def kept(tmp_path: Path) -> list[str]:
    return [one["row"] for one in measure.read(tmp_path / "out" / "techniques.json")["rows"]]


def test_rows_that_are_done_are_not_measured_again(tmp_path: Path, measured: list[str]) -> None:
    assert main(command(tmp_path, "--only", "int8")) == 0
    assert main(command(tmp_path, "--only", "int8", "--only", "prefix-cache")) == 0
    assert measured == ["int8", "prefix-cache"]
    assert kept(tmp_path) == ["prefix-cache", "int8", "disaggregated-prefill"]  # in the table's order
    assert main(command(tmp_path, "--only", "prefix-cache", "--again")) == 0
    assert measured[2:] == ["prefix-cache"]
    assert (tmp_path / "out" / "techniques.html").exists()


def test_rows_of_other_inputs_are_measured_again(tmp_path: Path, measured: list[str]) -> None:
    main(command(tmp_path, "--only", "prefix-cache"))
    main(command(tmp_path, "--only", "prefix-cache", "--turns", "2"))
    assert measured == ["prefix-cache", "prefix-cache"]


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = measure._engine_row

    def interrupted(name: str, options: measure.Options) -> Json:
        if name == "chunked-prefill":
            raise KeyboardInterrupt
        return done(name, options)

    three = ["--only", "prefix-cache", "--only", "chunked-prefill", "--only", "speculation"]
    monkeypatch.setattr(measure, "_engine_row", interrupted)
    assert main(command(tmp_path, *three)) == 130
    assert kept(tmp_path) == ["prefix-cache", "disaggregated-prefill"]
    monkeypatch.setattr(measure, "_engine_row", done)
    assert main(command(tmp_path, *three)) == 0
    assert measured == ["prefix-cache", "chunked-prefill", "speculation"]


def test_a_row_that_fails_says_so_is_tried_again_and_stops_no_other(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    measured.append("int8")  # from now on it fails
    both = command(tmp_path, "--only", "int8", "--only", "speculation")
    assert main(both) == 3
    assert "no memory" in capsys.readouterr().out
    assert kept(tmp_path) == ["speculation", "int8", "disaggregated-prefill"]
    measured.remove("int8")
    assert main(both) == 0


def test_the_table_of_a_file_is_shown_without_measuring(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "given.json"
    source.write_text(json.dumps(document(row())))
    assert main(["--show", "--from", str(source), "--readme", str(readme(tmp_path))]) == 0
    assert measured == []
    assert "2.00x (1.80 to 2.50)" in capsys.readouterr().out
    assert "2.00x (1.80 to 2.50)" in (tmp_path / "README.md").read_text()


def test_other_tokens_end_with_status_1(tmp_path: Path) -> None:
    source = tmp_path / "given.json"
    source.write_text(json.dumps(document(row(quality={"what": "output", "same": 2, "of": 3}))))
    assert main(["--show", "--from", str(source)]) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--turns", "0"], "--turns must be at least 1"),
        (["--usd-per-hour", "0"], "--usd-per-hour must be greater than 0"),
        (["--scores", __file__], "--scores and --prices go together"),
        (["--from", "x.json"], "--from goes with --show"),
        (["--azure", "/no/trace.csv"], "--azure /no/trace.csv does not exist"),
        (["--mooncake", __file__], "--mooncake"),
        (["--scores", __file__, "--prices", __file__], "no score table"),
        (["--show", "--from", __file__], "is not JSON"),
        (["--show", "--dir", "/no/such/folder"], "cannot read"),
    ],
)
def test_bad_options_are_refused_by_name(
    arguments: list[str], said: str, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err
    assert measured == []


def test_a_file_of_another_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text('{"schema": "signalbox.load/1"}')
    assert main(["--show", "--from", str(tmp_path / "other.json")]) == 2
    assert "signalbox.load/1" in capsys.readouterr().err


def test_an_engines_worker_that_fails_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, "--only", "int8")) == 3
    assert str(tmp_path / "model") in capfd.readouterr().err
    [failed] = [one for one in measure.read(tmp_path / "out" / "techniques.json")["rows"] if "failed" in one]
    assert re.search(r"worker ended with 1: error: .*model", failed["failed"])


# ------------------------------------------------------------------------------------------------------- fleet's rows


def fake_instance(tmp_path: Path, fleets: list[str]) -> Any:
    """In place of an instance with Ray: the same gateway in a thread, the same fake engines."""

    class Stub:
        def __init__(self, gateway: Gateway) -> None:
            self.base_url, self.home, self._gateway = gateway.base_url, Path(gateway.config.state_dir), gateway

        def key(self, name: str) -> str:
            return self._gateway.key

        def admin_token(self) -> str:
            return self._gateway.admin_token()

        def command(self, *arguments: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "deploy.cli", *arguments],
                env={**os.environ, "SIGNALBOX_HOME": str(self.home)},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

    @contextmanager
    def start(fleet: str) -> Iterator[Stub]:
        fleets.append(fleet)
        models = yaml.safe_load(fleet)["models"]
        served = tuple(ServedModel(name=one["name"], price=one.get("price", {})) for one in models)
        config = make_config(tmp_path, models=served)
        with running(config, make_key(config, "test")) as gateway:
            for one in models:
                for _ in range(one.get("replicas", {"min": 1})["min"]):
                    gateway.add(FakeSettings(**one["engine_settings"]), model=one["name"])
            gateway.wait_ready(len(gateway.replicas))
            yield Stub(gateway)

    return start


def silent(text: str) -> None:
    assert text


def test_affinity_finds_more_in_the_caches_than_round_robin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "Instance", fake_instance(tmp_path, []))
    found = affinity.measure(None, turns=2, quick=True, say=silent)
    assert [len(one["turns"]) for one in found["cases"]] == [2]
    for both in found["cases"][0]["turns"]:
        assert both["on"]["cached_share"] > both["off"]["cached_share"]
        assert both["on"]["ttft_p95_s"] > 0
        assert both["on"]["tokens_per_s"] > 0
    assert found["on"]["fleet"] == "affinity: {policy: affinity}"


def test_built_in_sessions_share_their_prefixes_as_a_conversation_does() -> None:
    requests, _ = affinity.traffic(None, 300)
    seen: set[tuple[int, ...]] = set()
    following = 0
    for request in requests:
        following += request.prefix_ids[:-5] in seen
        seen.add(request.prefix_ids)
        assert request.prompt_tokens == len(request.prefix_ids) * request.block_tokens
    assert following > 200


def write_table(folder: Path, count: int = 200) -> tuple[Path, Path]:
    """The cheap model can do sums only; the dear one everything; a third is as dear and worse."""
    scores, prices = folder / "scores.jsonl", folder / "prices.json"
    with scores.open("w") as file:
        for number in range(count):
            sums = number % 2 == 0
            prompt = f"What is {number} + {number}?" if sums else f"Write a poem about the colour of river {number}."
            marks = {"cheap": 1.0 if sums else 0.0, "dear": 1.0, "worse": 0.5}
            file.write(json.dumps({"prompt": f"{prompt}\u2028", "scores": marks}, ensure_ascii=False) + "\n")
    costs = {name: {"input_price": price, "output_price": price} for name, price in PRICES.items()}
    prices.write_text(json.dumps(costs))
    return scores, prices


PRICES = {"cheap": 0.1, "dear": 1.0, "worse": 1.0}


def test_the_best_model_at_each_price_is_taken_the_dearest_last(tmp_path: Path) -> None:
    table = right_size.read_table(*write_table(tmp_path))
    assert list(table.prices) == ["cheap", "dear"]
    assert table.large == "dear"
    parts = right_size._parts(table.rows)
    assert [len(part) for part in parts] == [120, 40, 40]
    assert len({one.prompt for part in parts for one in part}) == 200


def test_a_table_without_a_choice_is_refused(tmp_path: Path) -> None:
    scores, prices = write_table(tmp_path)
    same = {name: {"input_price": 1, "output_price": 1} for name in PRICES}
    prices.write_text(json.dumps(same))
    with pytest.raises(BadOption, match="nothing to choose"):
        right_size.read_table(scores, prices)


def test_right_size_costs_less_and_answers_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleets: list[str] = []
    monkeypatch.setattr(right_size, "Instance", fake_instance(tmp_path, fleets))
    monkeypatch.setattr(right_size, "ANSWER", 8)
    found = right_size.measure(*write_table(tmp_path), turns=2, quick=True, say=silent)
    assert [model["name"] for model in yaml.safe_load(fleets[0])["models"]] == ["cheap", "dear"]
    for both in found["cases"][0]["turns"]:
        assert both["on"]["usd_per_million"] < 0.9 * both["off"]["usd_per_million"]
        assert both["off"]["usd_per_million"] == pytest.approx(1.0)
    assert found["quality"]["scores"] == [1.0, 1.0]
    assert found["quality"]["answered_by"]["cheap"] > 0
    assert yaml.safe_load(found["on"]["fleet"])["groups"]["auto"]["models"] == ["cheap", "dear"]


def test_right_size_without_a_table_says_that_quality_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(right_size, "Instance", fake_instance(tmp_path, []))
    monkeypatch.setattr(right_size, "ANSWER", 4)
    found = right_size.measure(None, None, turns=1, quick=True, say=silent)
    assert quality(found["quality"]) == "not measured: give it --scores"
    [both] = [one["turns"][0] for one in found["cases"]]
    assert both["on"]["usd_per_million"] < both["off"]["usd_per_million"]


def test_every_technique_that_is_built_has_somebody_who_measures_it(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for fleet_row in (affinity, right_size):
        monkeypatch.setattr(fleet_row, "measure", lambda *_: row())
    options = measure.Options(tmp_path, tmp_path / "out")
    *_, last = measure.run(options, Console(quiet=True))
    assert [one["row"] for one in last["rows"]] == [one.name for one in TECHNIQUES]
    assert [one["row"] for one in last["rows"] if "not_built" in one] == [
        one.name for one in TECHNIQUES if one.kind == NOT_BUILT
    ]
