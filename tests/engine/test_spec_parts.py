"""The parts of speculation alone: lookups, lengths, measured cost and acceptance, artefacts, training."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.engine.sequence import Sequence
from replicas.engine.spec.acceptance import Acceptance
from replicas.engine.spec.build import build_speculation
from replicas.engine.spec.config import Speculative
from replicas.engine.spec.cost import AskingCost, StepCost
from replicas.engine.spec.draft_layers import STATES, DraftCheckpoint, own_tensors
from replicas.engine.spec.lengths import can_pay, choose_depth, choose_lengths, margin
from replicas.engine.spec.lookup import Index, Ngram, Suffix
from replicas.engine.spec.make import Material, Progress, make_draft, make_heads, make_state_draft
from replicas.engine.spec.self_text import OwnQuestions, Prompts, Sample, make_prompts, read_self_text, write_self_text
from replicas.engine.spec.train import Vocabulary, measure_state_draft, split
from replicas.protocol import ConfigError, FinishReason
from tests.engine.drafts import write_heads, write_layers_draft, write_noised_copy


def sequence(tokens: list[int], root: bytes = b"") -> Sequence:
    return Sequence("r", 0, tokens, len(tokens), SamplingParams(), 0, root)


# -------------------------------------------------------------------- lookups


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 3), st.integers(1, 5))
def test_a_sequence_is_searched_as_a_naive_search_would(tokens: list[int], n: int, most: int) -> None:
    index = Index(n)
    index.extend(tokens)
    agree, follows = index.find(tokens, most, itself=True)
    ends = [e for e in range(n, len(tokens)) if tokens[e - n : e] == tokens[-n:]]
    assert bool(follows) == bool(ends)
    if ends:
        assert agree >= n
        assert len(follows) == most
        assert any(tokens[e : e + most] == follows[: len(tokens) - e][:most] for e in ends)


def test_a_loop_is_foretold_to_any_depth() -> None:
    [proposal] = Ngram(2).propose([sequence([9, 1, 2, 3, 1, 2, 3, 1, 2])], 7)
    assert list(proposal.tokens) == [3, 1, 2, 3, 1, 2, 3]


def ended(seq: Sequence) -> Sequence:
    seq.finish_reason = FinishReason.STOP
    return seq


def test_a_tenants_earlier_text_is_never_anothers() -> None:
    suffix = Suffix(2, 1000)
    suffix.forget(ended(sequence([1, 2, 3, 4, 5, 6], b"alice")))
    mine, theirs = suffix.propose([sequence([7, 1, 2, 3], b"alice"), sequence([7, 1, 2, 3], b"bob")], 3)
    assert list(mine.tokens) == [4, 5, 6]
    assert not theirs.tokens


def test_aborted_text_is_not_kept_and_memory_is_bounded() -> None:
    suffix = Suffix(2, 100)
    suffix.forget(sequence([1, 2, 3, 4], b"a"))
    assert suffix.num_tokens == 0
    for i in range(50):
        suffix.forget(ended(sequence([i, i + 1, i + 2] * 4, b"%d" % (i % 3))))
        suffix.check_integrity([])
    assert 0 < suffix.num_tokens <= 101


# -------------------------------------------------------------------- lengths, cost, acceptance


def test_guesses_that_cost_nothing_are_all_taken_and_dear_ones_are_not() -> None:
    free, dear = np.ones(9), 1.0 + np.arange(9.0)
    assert choose_lengths([[0.5, 0.5], [0.9]], free) == [2, 1]
    assert choose_lengths([[0.5, 0.5], [0.9]], dear) == [0, 0]


def test_a_step_up_in_cost_is_crossed_when_what_lies_behind_it_pays() -> None:
    """The first guess does not pay by itself, four of them do."""
    cost = np.array([1.0, 1.6, 1.6, 1.6, 1.6])
    assert choose_lengths([[0.9] * 4], cost) == [4]
    assert choose_lengths([[0.9]], cost[:2]) == [1]
    assert choose_lengths([[0.5]], cost[:2]) == [0]


@given(st.lists(st.lists(st.floats(0.01, 0.98), max_size=4), min_size=1, max_size=4), st.floats(0.0, 1.0))
def test_chosen_lengths_are_the_best_there_are(probabilities: list[list[float]], slope: float) -> None:
    cost = 1.0 + slope * np.arange(1 + sum(map(len, probabilities)))

    def speed(lengths: list[int]) -> float:
        gains = [float(np.prod(row[: j + 1])) for row, n in zip(probabilities, lengths, strict=True) for j in range(n)]
        return (len(probabilities) + sum(gains)) / cost[sum(lengths)]

    def every(rows: list[list[float]]) -> list[list[int]]:
        return [[n, *rest] for n in range(len(rows[0]) + 1) for rest in every(rows[1:])] if rows else [[]]

    best = max(map(speed, every(probabilities)))
    assert speed(choose_lengths(probabilities, cost)) >= best / margin(len(probabilities)) - 1e-9


def test_a_proposer_that_costs_more_than_it_brings_is_not_asked() -> None:
    flat, depths, usual = np.ones(40), np.arange(4), [[0.7, 0.6, 0.5]]
    assert choose_depth(usual, 0, flat, 0.05 * depths) == 3
    assert choose_depth(usual, 0, flat, 0.5 * depths) == 1
    assert choose_depth(usual, 15, flat, 0.5 * depths) == 0
    assert choose_depth(usual, 0, flat, np.array([0.0, 1.2, 1.3, 1.4])) == 0, "the first guess costs most"
    assert choose_depth(usual, 0, flat, np.array([0.0, 0.5, 0.5, 0.5])) == 3, "further ones cost nothing"


def test_what_the_first_guess_costs_is_told_from_what_further_ones_cost() -> None:
    cost, chance = AskingCost(), random.Random(3)
    for _ in range(600):
        depth = chance.randint(1, 5)
        cost.record((0.7 + 0.3 * (depth - 1)) * chance.uniform(0.9, 1.1), depth)
    assert cost.seconds(3).tolist() == pytest.approx([0.0, 0.7, 1.0, 1.3], rel=0.1)


def test_cost_never_falls_and_a_busy_machine_does_not_change_its_shape() -> None:
    cost = StepCost()
    cost.calibrate({1: 0.02, 2: 0.019, 4: 0.024, 8: 0.04})
    before = cost.relative(1, 30)
    assert (np.diff(before) >= 0).all()
    assert before[7] == pytest.approx(2.0)
    for _ in range(200):  # everything takes three times as long for a while
        cost.record(0.06, 1)
        cost.record(0.12, 8)
    assert cost.relative(8, 0)[0] / cost.relative(1, 0)[0] == pytest.approx(2.0, rel=0.1)
    assert cost.scale == pytest.approx(0.06, rel=0.05)


def test_rows_past_what_a_busy_machine_had_time_to_measure_are_not_thought_free() -> None:
    """8 rows measured faster than 4 made every further row free, and sixteen sequences guessed themselves slower."""
    cost = StepCost()
    cost.calibrate({1: 0.056, 2: 0.099, 4: 0.113, 8: 0.066})
    sixteen, thirty_two = cost.relative(16, 16)[[0, 16]]
    assert thirty_two > 1.8 * sixteen


def test_cost_learns_that_more_rows_are_dearer_than_thought() -> None:
    cost = StepCost()
    for _ in range(600):
        cost.record(0.02, 1)
        cost.record(0.08, 8)
    assert cost.relative(8, 0)[0] / cost.relative(1, 0)[0] == pytest.approx(4.0, rel=0.1)


def test_a_step_costs_more_with_more_rows_than_were_ever_seen() -> None:
    """Steps of 16 took longer than was measured at start: more rows than that then seemed to cost nothing."""
    cost = StepCost()
    cost.calibrate({1: 0.01, 16: 0.02, 32: 0.04})
    slope = float(np.diff(cost.relative(16, 1))[0])
    for _ in range(400):
        cost.record(0.01, 1)
        cost.record(0.03, 16)
    assert cost.relative(16, 0)[0] == pytest.approx(3.0, rel=0.1)
    assert np.diff(cost.relative(16, 8)).min() > 0.9 * slope


@pytest.mark.parametrize("seed", range(12))
def test_whatever_was_measured_at_start_costs_are_found_by_the_steps_that_run(seed: int) -> None:
    """One knot's correction pushed later ones below nothing, and from there they ran away."""
    chance, cost = random.Random(seed), StepCost()
    truth = {rows: 0.01 * (1 + 0.2 * (rows - 1)) for rows in range(1, 13)}
    probed = chance.sample([2, 4, 8, 16, 32], chance.randint(0, 5))
    cost.calibrate({1: 0.01, **{rows: chance.uniform(0.005, 0.1) for rows in probed}})
    for _ in range(4):
        phase = [chance.randint(1, 12) for _ in range(chance.randint(1, 4))]
        for _ in range(60):
            for rows in phase:
                cost.record(truth[rows], rows)
            assert (cost._shape > 0.3).all()
            assert (np.diff(cost.relative(1, 40)) >= 0).all()
    for _ in range(400):
        for rows in truth:
            cost.record(truth[rows], rows)
    assert cost.relative(8, 0)[0] == pytest.approx(truth[8] / truth[1], rel=0.1)


def test_nobody_is_asked_where_no_guess_could_pay() -> None:
    assert can_pay(1, np.array([1.0, 1.05, 1.1]))
    assert not can_pay(16, np.linspace(1.0, 2.0, 17)), "a guess costs as much as it brings"
    assert can_pay(16, np.linspace(1.0, 1.5, 17))


def test_a_new_sequence_is_like_other_sequences_and_not_like_other_guesses() -> None:
    """Most guesses are those of the few that are guessed well: at batch 16 newcomers were overrated."""
    acceptance = Acceptance(8)
    for number in range(200):
        seq = sequence([number])
        if number % 4:  # one wrong guess, and nobody guesses for it again
            acceptance.record(seq, [8], 0)
        else:
            for _ in range(20):
                acceptance.record(seq, [8] * 4, 4)
        acceptance.forget(seq)
    [of_new] = acceptance.probabilities(sequence([1]), [8])
    assert of_new < 0.85, "95 of 100 guesses were right, but of 100 sequences 75 are guessed badly"


def test_acceptance_is_learnt_by_level_and_by_sequence_and_forgiven() -> None:
    acceptance, good, bad = Acceptance(4), sequence([1]), sequence([1])
    for _ in range(300):
        acceptance.record(good, [8, 8], 2)
        acceptance.record(bad, [8, 8], 0)
    [of_good], [of_bad], [of_new] = (acceptance.probabilities(s, [8]) for s in (good, bad, sequence([1])))
    assert of_bad < of_new < of_good
    for _ in range(200):
        acceptance.idle(bad)
    assert acceptance.probabilities(bad, [8]) == pytest.approx([of_new], rel=0.1)


# -------------------------------------------------------------------- settings and artefacts


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"method": "eagle"}, "eagle"),
        ({"method": ()}, "method"),
        ({"method": ("ngram", "suffix")}, "suffix"),
        ({"method": "medusa"}, "speculative.heads"),
        ({"method": "ngram", "model": "x"}, "speculative.model"),
        ({"method": "ngram", "max_draft_tokens": 0}, "max_draft_tokens"),
        ({"method": "ngram", "acceptance": "lax"}, "acceptance"),
        ({"method": "ngram", "typical_delta": 0.0}, "typical_delta"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(given: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Speculative(**given)


def start(target: Path, **speculative: Any) -> Engine:
    return Engine(EngineConfig(model=str(target), num_blocks=16, speculative=Speculative(**speculative)))


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _spoil(file: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, file)


def _infinite(tensor: torch.Tensor) -> torch.Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] = torch.inf
    return changed


_Q = "model.layers.0.self_attn.q_proj.weight"
_NORM = "model.layers.0.input_layernorm.weight"


def _edit(file: Path, **changed: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


HEADS: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: _edit(folder / "heads.json", hidden_size=64), "heads.json: hidden_size is 64, the model's is 48"),
    (lambda folder: _edit(folder / "heads.json", vocab_size=99), "heads.json: vocab_size is 99, the model's is 257"),
    (lambda folder: _edit(folder / "heads.json", base_revision="ab"), "heads.json: .* trained for weights ab"),
    (lambda folder: _edit(folder / "heads.json", num_heads=4), r"heads.safetensors: tensor 'heads.3.*' is missing"),
    (lambda folder: _edit(folder / "heads.json", format="x"), "heads.json: format 'x'"),
    (lambda folder: _truncate(folder / "heads.safetensors"), "heads.safetensors is missing, truncated or corrupt"),
    (lambda folder: _spoil(folder / "heads.safetensors", "targets", lambda t: t[:0]), "'targets' must hold different"),
    (lambda folder: _spoil(folder / "heads.safetensors", "targets", lambda t: t[0]), "'targets' must hold different"),
    (
        lambda folder: _spoil(folder / "heads.safetensors", "heads.1.state.bias", _infinite),
        "heads.safetensors: tensor 'heads.1.state.bias' holds numbers that are not finite",
    ),
    (lambda folder: (folder / "heads.json").unlink(), "holds no heads.json"),
]


@pytest.mark.parametrize(("spoil", "message"), HEADS)
def test_heads_for_another_model_are_refused_naming_file_and_tensor(
    spoil: Callable[[Path], None], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = write_heads(tmp_path, tiny_model, sequential=True)
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as refused:
        start(tiny_model, method="medusa", heads=str(folder))
    assert refused.value.param == "speculative.heads"


def test_heads_of_another_revision_are_taken_when_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_heads(tmp_path, tiny_model, sequential=False, base_revision="other")
    start(tiny_model, method="medusa", heads=str(folder), any_revision=True)


DRAFTS: list[tuple[Callable[[Path], None], str]] = [
    (lambda folder: _edit(folder / "draft.json", hidden_size=64), "draft.json: hidden_size is 64, the model's is 48"),
    (lambda folder: _edit(folder / "draft.json", base_revision="ab"), "draft.json: .* made from weights ab"),
    (lambda folder: _edit(folder / "draft.json", layers=[7]), r"draft.json: layers \[7\]"),
    (lambda folder: _edit(folder / "draft.json", fed_with="both"), "draft.json: fed_with 'both'"),
    (
        lambda folder: _edit(folder / "draft.json", fed_with="states"),
        "draft.safetensors: tensor 'fuse.weight' is missing",
    ),
    (
        lambda folder: _edit(folder / "draft.json", layers=[0, 1]),
        "draft.safetensors: tensor 'model.layers.1.*' is missing",
    ),
    (lambda folder: _truncate(folder / "draft.safetensors"), "draft.safetensors is missing, truncated or corrupt"),
    (lambda folder: _spoil(folder / "draft.safetensors", "targets", lambda t: t[:0]), "'targets' must hold different"),
    (
        lambda folder: _spoil(folder / "draft.safetensors", _Q, lambda t: t.bool()),
        f"draft.safetensors: tensor '{_Q}' is of torch.bool",
    ),
    (
        lambda folder: _spoil(folder / "draft.safetensors", f"{_Q}.scale", _infinite),
        f"draft.safetensors: tensor '{_Q}.scale' holds numbers that are not finite",
    ),
    (
        lambda folder: _spoil(folder / "draft.safetensors", _NORM, lambda t: t.to(torch.int8)),
        f"draft.safetensors: tensor '{_NORM}' is of torch.int8",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), DRAFTS)
def test_a_draft_of_another_models_layers_is_refused_naming_file_and_tensor(
    spoil: Callable[[Path], None], message: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = write_layers_draft(tmp_path, tiny_model)
    assert len({file.stat().st_mode for file in folder.glob("draft.*")}) == 1, "who may read one may read the other"
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as refused:
        start(tiny_model, method="draft_model", model=str(folder))
    assert refused.value.param == "speculative.model"


def test_a_draft_with_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_noised_copy(tmp_path / "copy", tiny_model)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"speculative.model .* vocabulary"):
        start(tiny_model, method="draft_model", model=str(folder))


# -------------------------------------------------------------------- training


def nothing(*_: Any) -> None:
    pass


def loss_recorder() -> tuple[list[float], Progress]:
    losses: list[float] = []

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "training":
            losses.append(float(note.removeprefix("loss ")))

    return losses, progress


def material(model: Path, tmp_path: Path) -> Material:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"prompt": f"prompt {i % 5} "}) + "\n" for i in range(60)))
    return Material(
        model=str(model), texts=(text,), frame=("", ""), ask=False, out=tmp_path / "out", tokens=3000, targets=200
    )


def test_prompts_are_framed_and_every_source_is_one_list(tmp_path: Path) -> None:
    """A line separator inside a JSON string once ended the line."""
    lines, text = tmp_path / "asked.jsonl", tmp_path / "text.txt"
    lines.write_text(json.dumps({"prompt": "one\u2028two"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    text.write_text("\n\n".join(f"Paragraph {i}. " + "It says something. " * 9 for i in range(4)))
    asked, *own, given, made = make_prompts([lines, text], ("<", ">"), ask=True)
    assert own == [OwnQuestions("<", ">")] * 2
    assert isinstance(asked, list)
    assert isinstance(made, list)
    assert given == ["<one\u2028two>"]
    assert len(set(asked)) == len(asked) > 500
    assert made[0].startswith("<Summarize the following text:\n\nParagraph 0.")
    assert made[3].startswith("Paragraph 3.")
    with pytest.raises(ConfigError, match="nothing to ask"):
        make_prompts([], ("", ""), ask=False)
    (tmp_path / "wrong.jsonl").write_text('{"text": "x"}')
    with pytest.raises(ConfigError, match=r'wrong.jsonl: every line must be a JSON object with "prompt"'):
        make_prompts([tmp_path / "wrong.jsonl"], ("", ""), ask=False)


def test_heads_are_trained_saved_and_taken_up_where_they_were(tiny_model: Path, tmp_path: Path) -> None:
    made = material(tiny_model, tmp_path)
    options: dict[str, Any] = {"num_heads": 2, "sequential": True, "batch": 64, "progress": nothing}
    losses, progress = loss_recorder()
    [after, both] = make_heads(made, steps=120, **{**options, "progress": progress})
    assert losses[-1] < losses[0]
    assert both <= after
    written = (made.out / "work" / "text" / "shard-00000.npz").stat().st_mtime_ns
    stages: list[tuple[str, int]] = []
    again = make_heads(made, steps=120, **{**options, "progress": lambda *p: stages.append((p[0], p[1]))})
    assert again == [after, both], "a finished training is taken up at its end"
    assert (made.out / "work" / "text" / "shard-00000.npz").stat().st_mtime_ns == written
    assert not [s for s in stages if s[0] == "training"]
    make_heads(made, steps=150, **{**options, "progress": lambda *p: stages.append((p[0], p[1]))})
    assert [s[1] for s in stages if s[0] == "training"] == [125, 150], "more steps begin where the others ended"
    start(tiny_model, method="medusa", heads=str(made.out))


def test_a_text_that_is_taken_up_has_no_turn_twice_and_no_prompt_on_both_sides(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Answers that ended early were written again by the next run, and then stood on both sides of the split."""
    prompts: list[Prompts] = [[f"prompt {i}" for i in range(7)], OwnQuestions("ask: ", " answer: ")]
    for tokens in (4000, 8000, 12000):
        write_self_text(str(tiny_model), prompts, tmp_path, tokens=tokens)
    turns = np.concatenate([np.load(shard)["turns"] for shard in tmp_path.glob("shard-*.npz")])
    assert len(turns) == len(set(turns)) > 7
    learn, measure = split(list(read_self_text(tmp_path)))
    sides = [{sample.prompt.tobytes() for sample in side} for side in (learn, measure)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_states_of_the_models_own_text_are_those_its_tokens_came_from(tiny_model: Path, tmp_path: Path) -> None:
    made = material(tiny_model, tmp_path)
    make_heads(made, num_heads=1, sequential=False, steps=1, batch=8, progress=nothing)
    engine = start(tiny_model, method="ngram")
    greedy = 0
    for sample in list(read_self_text(made.out / "work" / "text"))[:10]:
        states = torch.from_numpy(sample.states).float()
        greedy += bool((engine.loaded.decoder.logits(states).argmax(-1).numpy() == sample.output[:-1]).mean() > 0.97)
    assert greedy >= 5, "three of five are written greedily"


def test_a_draft_is_distilled_and_taken(tiny_model: Path, tmp_path: Path) -> None:
    made = material(tiny_model, tmp_path)
    losses, progress = loss_recorder()
    assert 0 < make_draft(made, layers=(0,), steps=75, batch=4, progress=progress) < 1
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3
    start(tiny_model, method="draft_model", model=str(made.out))


def test_a_draft_on_states_is_distilled_and_taken(tiny_model: Path, tmp_path: Path) -> None:
    made = material(tiny_model, tmp_path)
    losses, progress = loss_recorder()
    shares = make_state_draft(made, layers=(1,), depth=2, steps=75, batch=8, progress=progress)
    assert losses[-1] < losses[0]
    assert 0 <= shares[1] <= shares[0] < 1
    start(tiny_model, method="draft_model", model=str(made.out))


def test_a_draft_on_states_guesses_in_the_engine_what_it_guessed_when_it_was_measured(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Training unrolls guesses over whole samples; the engine computes them place by place, on a paged cache."""
    made = material(tiny_model, tmp_path)
    make_state_draft(made, layers=(1,), depth=3, steps=150, batch=8, progress=nothing)
    engine = start(tiny_model, method="draft_model", model=str(made.out), max_draft_tokens=3)
    decoder = engine.loaded.decoder
    config = EngineConfig(
        model=str(tiny_model), speculative=Speculative(method="draft_model", model=str(made.out), max_draft_tokens=3)
    )
    draft = DraftCheckpoint(made.out, decoder.config, decoder.revision, any_revision=False)
    weights = {name: draft.tensor(name) for name in own_tensors(decoder.config, 1, STATES)}
    embed = decoder.embed(torch.arange(decoder.config.vocab_size)).clone()
    vocabulary = Vocabulary(embed, decoder.head_rows(draft.targets).clone(), draft.targets)
    sample = max(read_self_text(made.out / "work" / "text"), key=lambda sample: len(sample.states))
    guessed = _asked_every_other_time(config, engine, sample, 0) | _asked_every_other_time(config, engine, sample, 1)
    right = np.zeros(3)
    for place, guesses in guessed.items():
        right += np.cumprod(np.array(guesses) == sample.output[place + 1 : place + 4])
    measured = measure_state_draft(weights, [sample], draft.config, vocabulary, 3)
    assert right / len(guessed) == pytest.approx(measured, abs=0.02), "8-bit codes and float16 states round a little"
    assert right[0] > 0


def _asked_every_other_time(config: EngineConfig, engine: Engine, sample: Sample, first: int) -> dict[int, list[int]]:
    """By place what the proposer guesses after the token there, at most three tokens; told one token at a time."""
    [source] = build_speculation(config, engine.loaded, engine.max_model_len)._sources
    proposer = source.proposer
    seq = Sequence("0", 0, sample.prompt.tolist(), len(sample.prompt), SamplingParams(max_tokens=500), 0, b"")
    states = torch.from_numpy(sample.states).float()
    found = {}
    for place in range(len(sample.states) - 3):
        seq.tokens.append(int(sample.output[place]))
        proposer.observe(seq, states[place : place + 1])
        if place % 2 == first:
            [proposal] = proposer.propose([seq], 3)
            found[place] = list(proposal.tokens)
            proposer.check_integrity([seq])
    proposer.forget(seq)
    proposer.check_integrity([])
    return found
