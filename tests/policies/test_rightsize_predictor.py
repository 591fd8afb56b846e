from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploy.rightsize_cli import app
from policies.rightsize.choose import Candidate, PricedModel, RightSizeRequest, RightSizeView, Trade, choose, right_size
from policies.rightsize.evaluate import main as evaluate
from policies.rightsize.features import BUCKETS, CUES, cues, hashed_counts, weigh
from policies.rightsize.frontier import area, areas, at_cost, expected_costs, pick, summarise, sweep
from policies.rightsize.knn import knn
from policies.rightsize.predictor import ArtefactError, Predictor, Settings
from policies.rightsize.table import Price, ScoreTable, TableError
from policies.rightsize.train import Trained, train
from policies.rightsize.trees import Forest, grow

MODELS = ("coder", "large", "small")
PRICES = [Price(0.2, 0.2), Price(0.9, 0.9), Price(0.1, 0.1)]
SMALL_GRID = (Settings(dimensions=8, leaf=5, trees=20), Settings(dimensions=8, leaf=15, trees=20))


def table(count: int = 160, seed: int = 0) -> ScoreTable:
    """Four kinds of prompt: the coder is as good as the large model at code, the small one at talk, neither at sums."""
    rng = np.random.default_rng(seed)
    kinds = {
        "code": ("Write a function def {}(x): that returns the {} of a list.", (0.9, 0.9, 0.2)),
        "talk": ("hello, tell me about your {} and the {}", (0.4, 0.9, 0.9)),
        "sums": ("What is {} * 17 + {} - 3 divided by 4?", (0.1, 0.8, 0.1)),
        "fact": ("Who discovered the {} near {}?", (0.3, 0.7, 0.6)),
    }
    prompts, scores, tasks = [], [], []
    for _ in range(count):
        kind = str(rng.choice(sorted(kinds)))
        pattern, chances = kinds[kind]
        words = rng.integers(10, 10**6, 2) if kind == "sums" else rng.choice(10**6, 2)
        prompts.append(pattern.format(*(f"{word}" if kind == "sums" else f"thing{word}" for word in words)))
        scores.append(rng.random(3) < chances)
        tasks.append(kind)
    return ScoreTable(tuple(prompts), MODELS, np.array(scores, float), tuple(tasks))


def fitted(rows: ScoreTable) -> Trained:
    return train(rows, expected_costs(rows.prompts, PRICES), candidates=SMALL_GRID)


@pytest.fixture(scope="module")
def trained() -> Trained:
    return fitted(table())


@pytest.fixture(scope="module")
def folder(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("predictor")
    trained.predictor.save(path, trained.report)
    return path


def test_a_trained_predictor_beats_every_single_model_at_its_cost_on_unseen_prompts(trained: Trained) -> None:
    unseen = table(seed=1)
    predicted = trained.predictor.predict_all(unseen.prompts)
    curve = sweep(predicted, unseen.scores, expected_costs(unseen.prompts, PRICES))
    assert at_cost(curve, 0.6)[1] > 0.95
    means = sweep(np.tile(table().scores.mean(axis=0), (len(unseen), 1)), unseen.scores, curve.costs)
    assert area(curve) > area(means) + 0.05


def test_a_prediction_is_the_mean_of_trees_and_of_nearest_neighbours_found_by_hand(trained: Trained) -> None:
    predictor = trained.predictor
    for text in table(seed=6).prompts[:20]:
        row = predictor.embed(*hashed_counts(text), cues(text))
        by_cosine = sorted(range(len(predictor.known)), key=lambda i: -float(predictor.known[i] @ row))
        near = predictor.known_scores[by_cosine[: predictor.settings.neighbours]].mean(axis=0)
        assert np.allclose(predictor.predict(text), (near + walk(predictor.forest, row)) / 2, atol=1e-5)


def test_the_same_seed_gives_the_same_predictor(trained: Trained) -> None:
    again = fitted(table())
    assert np.array_equal(again.predictor.predict("hello you"), trained.predictor.predict("hello you"))


def test_tasks_are_never_read(trained: Trained) -> None:
    rows = table()
    blind = fitted(ScoreTable(rows.prompts, rows.models, rows.scores, ("",) * len(rows)))
    assert np.array_equal(blind.predictor.predict("def f(x):"), trained.predictor.predict("def f(x):"))


def test_an_artefact_round_trips_exactly(trained: Trained, folder: Path) -> None:
    loaded = Predictor.load(folder)
    prompts = [*table(seed=2).prompts[:20], "", "\x00", "为什么", "word " * 5000, "\ud800"]
    assert np.array_equal(loaded.predict_all(prompts), trained.predictor.predict_all(prompts))
    assert loaded.models == MODELS
    assert loaded.overlap(table().prompts) == 160
    assert loaded.overlap(["never seen"]) == 0
    assert not list(folder.glob(".*"))


def test_predictions_lie_within_the_scores_range_for_any_text(trained: Trained) -> None:
    @settings(max_examples=40, deadline=None)
    @given(st.text(max_size=200))
    def check(text: str) -> None:
        quality = trained.predictor.predict(text)
        assert quality.shape == (3,)
        assert ((quality >= 0) & (quality <= 1)).all()

    check()


def copy_of(folder: Path, target: Path) -> Path:
    for name in ("predictor.json", "predictor.npz"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


def test_a_flipped_byte_is_refused_by_file_name(folder: Path, tmp_path: Path) -> None:
    path = copy_of(folder, tmp_path) / "predictor.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=r"predictor\.npz is damaged"):
        Predictor.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "no right-size predictor"),
        ({"cues": []}, "other features"),
        ({"models": ["one"]}, "shapes differ"),
        ({"settings": {"dimensions": "x"}}, "incomplete"),
        ({"depth": None}, "incomplete"),
    ],
)
def test_an_altered_document_is_refused_with_the_reason(
    folder: Path, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    path = copy_of(folder, tmp_path) / "predictor.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtefactError, match=complaint):
        Predictor.load(tmp_path)


def test_truncated_and_missing_files_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"predictor\.json"):
        Predictor.load(tmp_path / "nowhere")
    path = copy_of(folder, tmp_path) / "predictor.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ArtefactError, match=r"predictor\.json is damaged"):
        Predictor.load(tmp_path)


def test_a_pickle_in_the_archive_is_not_loaded(folder: Path, tmp_path: Path) -> None:
    import hashlib

    copy_of(folder, tmp_path)
    buffer = io.BytesIO()
    np.savez(buffer, idf=np.array([{"a": 1}], dtype=object))
    (tmp_path / "predictor.npz").write_bytes(buffer.getvalue())
    document = json.loads((tmp_path / "predictor.json").read_text())
    document["sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    (tmp_path / "predictor.json").write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match="plain arrays"):
        Predictor.load(tmp_path)


def test_right_size_uses_the_trained_table_and_names_models_it_does_not_know(trained: Trained, folder: Path) -> None:
    models = [
        PricedModel(name=name, input_price=price.input, output_price=price.output)
        for name, price in zip(MODELS, PRICES, strict=True)
    ]
    stranger = PricedModel(name="stranger", input_price=0, output_price=0)
    view = RightSizeView(models=[stranger, *models], trade=Trade(quality_floor=0.6), predictor=Predictor.load(folder))
    choice = right_size(RightSizeRequest(text=table(seed=3).prompts[0], prompt_tokens=20), view)
    assert choice.skipped == ("stranger",)
    assert choice.source == Predictor.load(folder).name
    assert {one.model for one in choice.candidates} == set(MODELS)
    chosen = [right_size(RightSizeRequest(text=text, prompt_tokens=20), view).model for text in table(seed=3).prompts]
    assert set(chosen) == set(MODELS)


def test_prediction_takes_less_than_two_milliseconds_for_the_median_long_prompt(trained: Trained) -> None:
    samples = []
    for prompt in ["What about this? It is 12 + 3 words (long). " * 120] * 40:
        started = time.perf_counter()
        trained.predictor.predict(prompt)
        samples.append(time.perf_counter() - started)
    assert sorted(samples)[len(samples) // 4] < 0.01, "five times the promise, for busy test machines"


def test_predicting_loads_neither_torch_nor_scikit_learn_nor_matplotlib(folder: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import policies.rightsize.choose;"
        "from policies.rightsize.predictor import Predictor;"
        f"Predictor.load(Path({str(folder)!r})).predict('hi');"
        "print([n for n in ('torch', 'sklearn', 'scipy', 'matplotlib', 'ray', 'fastapi') if n in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "[]", run.stderr


@settings(deadline=None)
@given(st.text(max_size=400))
def test_features_are_finite_sorted_and_of_unit_length_for_any_text(text: str) -> None:
    ids, counts = hashed_counts(text)
    assert (np.diff(ids) > 0).all()
    assert len(ids) == 0 or (0 <= ids[0] and ids[-1] < 2 * BUCKETS)
    assert cues(text).shape == (len(CUES),)
    assert np.isfinite(cues(text)).all()
    weights = weigh(ids, counts, np.ones(2 * BUCKETS, np.float32))
    for part in (weights[ids < BUCKETS], weights[ids >= BUCKETS]):
        assert len(part) == 0 or np.linalg.norm(part) == pytest.approx(1, abs=1e-5)


def walk(forest: Forest, row: np.ndarray) -> np.ndarray:
    """The oracle: one row, one tree, one node at a time."""
    leaves = []
    for root in forest.roots:
        node = int(root)
        while forest.left[node] != node:
            side = forest.left if row[forest.feature[node]] <= forest.threshold[node] else forest.right
            node = int(side[node])
        leaves.append(forest.value[node])
    return np.mean(leaves, axis=0)


def test_a_forest_predicts_as_a_walk_by_hand_and_every_leaf_holds_enough_rows() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((200, 6)).astype(np.float32)
    targets = np.stack((rows[:, 0] > 0, rows[:, 1] > 0.5), axis=1).astype(np.float32)
    forest = grow(rows, targets, trees=12, leaf=7, rng=rng)
    assert np.allclose(forest.predict(rows), [walk(forest, row) for row in rows], atol=1e-6)
    one = grow(rows, targets, trees=1, leaf=7, rng=rng)
    leaf_means, filled = np.unique(one.predict(rows), axis=0, return_counts=True)
    assert len(leaf_means) > 1
    assert filled.min() >= 7
    assert ((forest.predict(rows) > 0.5) == targets).mean() > 0.9


def test_nearest_neighbours_weigh_and_rank_as_tf_idf_does() -> None:
    """By hand: 'red apple' shares its rarer word with the first, 'blue' only with the third prompt."""
    known = ["red apple", "red car red", "blue car", "the"]
    scores = np.array([[1.0], [0.5], [0.2], [0.0]])
    assert knn(known, scores, ["apple", "blue blue", "red"], k=1).ravel().tolist() == [1.0, 0.2, 0.5]
    assert knn(known, scores, ["unknown"], k=4).ravel() == pytest.approx([0.425])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1e4, allow_subnormal=False))
def test_the_table_wide_choice_is_the_single_choice(seed: int, weight: float) -> None:
    rng = np.random.default_rng(seed)
    quality, costs = rng.random((5, 4)), rng.random((5, 4)) / 1000
    many = pick(quality, costs, weight)
    for row in range(5):
        fleet = [Candidate(str(j), float(quality[row, j]), float(costs[row, j])) for j in range(4)]
        assert choose(fleet, Trade(cost_weight=weight)).model == str(many[row])


def test_a_curve_runs_from_best_to_cheapest_and_the_oracle_bounds_it(trained: Trained) -> None:
    unseen = table(seed=4)
    costs = expected_costs(unseen.prompts, PRICES)
    ours, ideal = (
        sweep(p, unseen.scores, costs) for p in (trained.predictor.predict_all(unseen.prompts), unseen.scores)
    )
    cost, _ = ours.points()
    assert (np.diff(cost) <= 1e-12).all()
    assert cost[-1] == pytest.approx(1 / 9)
    assert area(ours) < area(ideal)
    summary = summarise(ours, MODELS)
    assert summary["best_single_model"] == "large"
    assert summary["always_one_model"]["large"] == pytest.approx(
        {"quality": 1, "relative_cost": 1, "mean_score": unseen.scores[:, 1].mean()}
    )


def test_a_bootstrap_sample_of_everything_once_is_the_table_itself(trained: Trained) -> None:
    unseen = table(seed=5)
    predicted = trained.predictor.predict_all(unseen.prompts)
    curve = sweep(predicted, unseen.scores, expected_costs(unseen.prompts, PRICES))
    assert areas(curve, np.ones((1, len(unseen))))[0] == area(curve)
    half = np.r_[np.ones(80), np.zeros(80)]
    part = sweep(predicted[:80], unseen.scores[:80], expected_costs(unseen.prompts[:80], PRICES))
    if part.reference == curve.reference:
        assert areas(curve, half[None])[0] == pytest.approx(area(part), abs=0.01)


def test_expected_cost_is_price_times_tokens() -> None:
    assert expected_costs(["x" * 400], [Price(2.0, 5.0)])[0, 0] == pytest.approx((100 * 2 + 256 * 5) / 1e6)


def test_too_small_a_table_is_refused() -> None:
    with pytest.raises(TableError, match="too few"):
        fitted(table(19))


def write_table(rows: ScoreTable, path: Path) -> Path:
    lines = (
        json.dumps({"prompt": p, "task": t, "scores": dict(zip(MODELS, s.tolist(), strict=True))})
        for p, t, s in zip(rows.prompts, rows.tasks, rows.scores, strict=True)
    )
    path.write_text("\n".join(lines))
    return path


def write_prices(path: Path) -> Path:
    path.write_text(
        json.dumps({m: {"input_price": p.input, "output_price": p.output} for m, p in zip(MODELS, PRICES, strict=True)})
    )
    return path


def test_train_then_frontier_from_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run, prices = CliRunner(), write_prices(tmp_path / "prices.json")
    known, unseen = (
        write_table(table(100), tmp_path / "known.jsonl"),
        write_table(table(60, 9), tmp_path / "unseen.jsonl"),
    )
    out = tmp_path / "predictor"
    done = run.invoke(app, ["train", "--scores", str(known), "--prices", str(prices), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "p99" in done.output
    assert (out / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    command = ["frontier", "--prices", str(prices), "--model", str(out), "--json", str(tmp_path / "f.json")]
    done = run.invoke(app, [*command, "--scores", str(unseen), "--png", str(tmp_path / "f.png")])
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "f.json").read_text())
    assert set(document["points"][0]) >= {"quality", "relative_cost", "setting"}
    assert document["best_single_model"] == "large"
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    refused = run.invoke(app, [*command, "--scores", str(known)])
    assert refused.exit_code == 2
    assert "100 of 100 prompts were in the training table" in refused.output


def test_frontier_leaves_known_prompts_out_when_told_to_and_says_so(folder: Path, tmp_path: Path) -> None:
    mixed, fresh = table(), table(50, 9)
    both = ScoreTable(
        mixed.prompts[:30] + fresh.prompts, MODELS, np.vstack((mixed.scores[:30], fresh.scores)), ("",) * 80
    )
    path, prices = write_table(both, tmp_path / "both.jsonl"), write_prices(tmp_path / "prices.json")
    command = ["frontier", "--scores", str(path), "--prices", str(prices), "--model", str(folder)]
    assert CliRunner().invoke(app, command).exit_code == 2
    done = CliRunner().invoke(app, [*command, "--allow-overlap", "--json", str(tmp_path / "f.json")])
    assert done.exit_code == 0, done.output
    assert "WARNING: 30 of 80" in done.output
    assert json.loads((tmp_path / "f.json").read_text())["prompts"] == 50


def test_frontier_without_a_model_evaluates_the_untrained_default_and_says_so(tmp_path: Path) -> None:
    path, prices = write_table(table(60), tmp_path / "t.jsonl"), write_prices(tmp_path / "prices.json")
    done = CliRunner().invoke(app, ["frontier", "--scores", str(path), "--prices", str(prices)])
    assert done.exit_code == 0, done.output
    assert "untrained default" in done.output


def test_a_bad_line_ends_the_command_with_its_number_and_no_artefact(tmp_path: Path) -> None:
    path, prices = write_table(table(30), tmp_path / "t.jsonl"), write_prices(tmp_path / "prices.json")
    path.write_text(path.read_text() + "\n{oops")
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["train", "--scores", str(path), "--prices", str(prices), "--out", str(out)])
    assert done.exit_code == 2
    assert "t.jsonl, line 31" in done.output
    assert not out.exists()


def test_leaving_tasks_out_needs_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = table(60)
    path = write_table(ScoreTable(rows.prompts, MODELS, rows.scores, ("one",) * 60), tmp_path / "t.jsonl")
    prices = write_prices(tmp_path / "prices.json")
    assert evaluate(["--scores", str(path), "--prices", str(prices), "--seeds", "1"]) == 2
    assert "tasks" in capsys.readouterr().err


def test_the_real_table_can_be_read() -> None:
    data = os.environ.get("SIGNALBOX_DATA")
    if not data or not (Path(data) / "routing" / "llmrouter_scores.jsonl").exists():
        pytest.skip("SIGNALBOX_DATA names no folder with routing/llmrouter_scores.jsonl")
    from policies.rightsize.table import prices_for, read_prices, read_scores

    routing = Path(data) / "routing"
    rows = read_scores(routing / "llmrouter_scores.jsonl")
    prices_for(rows.models, read_prices(routing / "llmrouter_prices.json"))
    assert rows.scores.shape == (5091, 9)
