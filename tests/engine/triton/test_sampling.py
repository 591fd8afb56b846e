"""Drawing with noise: the kernels against the same noise in numpy, and what is drawn against the distributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from replicas.engine import draw, engine
from replicas.engine.draw import Inversion, choose_draw
from replicas.engine.sampler import Sampler, Typical
from replicas.engine.triton import accuracy, device, sampling
from replicas.engine.triton.accuracy import check_sampling
from replicas.engine.triton.kernels.sampling import gumbel as gumbel_kernel
from replicas.engine.triton.noise import gumbel, philox
from replicas.engine.triton.sampling import GumbelDraw, Lots, listed_argmax, noisy_argmax, row_key
from replicas.protocol import SamplingParams
from tests.engine.conftest import MakeEngine
from tests.engine.test_sampler import Unasked, any_params, expected_probs, logits_of, sequence

CPU = torch.device("cpu")

NEAR_TIE = 2e-5  # what float32 may confuse


def keys_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([row_key(seed, 0, row) for row in range(rows)])


def draw_all(logits: torch.Tensor, lots: Lots, parts: int) -> NDArray[np.int64]:
    """The column drawn for each of the lots."""
    out = torch.full((len(logits),), -1)
    noisy_argmax(logits, lots, out, parts)
    return out[lots.places].numpy()


def draw_listed(logits: torch.Tensor, ids: torch.Tensor, keys: torch.Tensor, parts: int) -> NDArray[np.int64]:
    out = torch.full((len(logits),), -1)
    listed_argmax(logits, ids, keys, out, parts)
    return out.numpy()


def assert_greatest(noisy: NDArray[np.float64], taken: NDArray[np.int64]) -> None:
    short = noisy.max(axis=1) - noisy[np.arange(len(noisy)), taken]
    assert (short <= NEAR_TIE).all(), f"columns {taken} lack {short} of the greatest"


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_its_authors_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert philox(np.array(counter, np.uint64), np.array(key, np.uint64)).tolist() == words


@triton.jit
def _gumbel_of(words, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(out + at, gumbel_kernel(tl.load(words + at).to(tl.uint32, bitcast=True)))


def test_noise_keeps_its_precision_at_both_ends_and_is_never_infinite() -> None:
    """Where x is nearly 1, x in float32 is 1: noise of -inf would let a row of one allowed token take another."""
    near = [0, 2**32 // 16, 2**31, 2**32 - 1, *(2**n for n in range(32)), *(2**32 - 2**n for n in range(32))]
    words = np.array([word + step for word in near for step in range(-3, 4) if 0 <= word + step < 2**32])
    words = np.concatenate([words, np.random.default_rng(1).integers(0, 2**32, 1024 - len(words))])
    out = torch.empty(1024)
    _gumbel_of[(1,)](torch.from_numpy(words.astype(np.uint32).view(np.int32)), out, BLOCK=1024)
    exact = -np.log(-np.log1p(-(words + 0.5) / 2.0**32))
    np.testing.assert_allclose(out.numpy(), exact, rtol=3e-7, atol=3e-7)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_draws_are_the_greatest_of_the_same_noisy_logits(data: st.DataObject) -> None:
    rows, width, parts = (data.draw(st.integers(*ends)) for ends in ((1, 4), (1, 2600), (1, 4)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    wide = torch.from_numpy(rng.normal(size=(rows, width + 5)).astype(np.float32)) * 4
    logits = wide[:, :width]  # rows lie apart
    logits[torch.from_numpy(rng.random((rows, width))) < data.draw(st.sampled_from([0.0, 0.3, 0.99]))] = -torch.inf
    sharpness = torch.tensor([data.draw(st.sampled_from([0.0, 0.5, 1.0, 30.0])) for _ in range(rows)])
    floors = torch.tensor([data.draw(st.sampled_from([-torch.inf, -2.0])) for _ in range(rows)])
    lots = Lots(torch.from_numpy(rng.permutation(rows)), keys_of(rows, seed=width), sharpness, floors)
    taken = draw_all(logits, lots, parts)
    exact = logits[lots.places].double().numpy()
    noisy = exact * sharpness.double().numpy()[:, None].clip(1e-30) + gumbel(lots.keys.numpy(), np.arange(width))
    noisy[exact < floors.numpy()[:, None]] = -np.inf
    noisy[sharpness.numpy() == 0] = exact[sharpness.numpy() == 0]
    drawable = np.isfinite(noisy.max(axis=1))
    assert_greatest(noisy[drawable], taken[drawable])
    assert (taken[~drawable] == 0).all(), "a row of nothing gives the first token, as argmax does"


def test_the_first_of_equals_is_taken_across_parts() -> None:
    logits = torch.zeros(2, 3000)
    logits[1, [2999, 1100, 1090]] = 1.0
    lots = Lots(torch.arange(2), keys_of(2), torch.zeros(2), torch.full((2,), -torch.inf))
    for parts in (1, 2, 3):
        assert draw_all(logits, lots, parts).tolist() == [0, 1090]


@pytest.mark.parametrize("together", [2, 128])
def test_no_part_of_a_row_is_left_out(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_PARTS", together)  # a row may have more parts than are compared at once
    best = torch.tensor([0, 1023, 1024, 2500, 4000, 4999])
    logits = torch.zeros(6, 5000).index_put((torch.arange(6), best), torch.ones(6))
    lots = Lots(torch.arange(6), keys_of(6), torch.zeros(6), torch.full((6,), -torch.inf))
    for parts in range(1, 6):
        assert draw_all(logits, lots, parts).tolist() == best.tolist()


@settings(max_examples=15, deadline=None)
@given(width=st.integers(1, 1500), kept=st.floats(0.01, 1), parts=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_restricted_draw_is_the_whole_draw_over_the_allowed_tokens(
    width: int, kept: float, parts: int, seed: int
) -> None:
    logits, keys = logits_of(seed, rows=2, vocab=width), keys_of(2, seed)
    values, ids = logits.topk(width)
    cut = torch.arange(width) >= max(int(width * kept), 1)
    listed = draw_listed(values.masked_fill(cut, -torch.inf), ids, keys, parts)
    noisy = logits.double().numpy() + gumbel(keys.numpy(), np.arange(width))
    for row, out in zip(noisy, ids[:, cut].numpy(), strict=True):
        row[out] = -np.inf
    assert_greatest(noisy, listed)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_a_row_draws_the_same_token_whatever_shares_its_batch(data: st.DataObject) -> None:
    rows = [
        sequence(output=(3, 3, 5)[: i % 4], seed=i, **any_params(data)) for i in range(data.draw(st.integers(2, 5)))
    ]
    logits = logits_of(data.draw(st.integers(0, 99)), rows=len(rows))
    sampler = Sampler([0], draw=GumbelDraw(CPU))
    together = sampler(logits.clone(), rows)
    for i, row in enumerate(rows):
        [alone] = sampler(logits[i : i + 1].clone(), [row])
        assert alone.token_id == together[i].token_id


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 99), head=st.sampled_from([1024, 2]))
def test_limits_leave_the_greatest_of_the_allowed_tokens_noise_as_it_is(
    data: st.DataObject, seed: int, head: int
) -> None:
    """head: tokens that are put in order; who needs more is drawn for by thresholds."""
    limits = {"temperature": [0.5, 1.0, 3.0], "top_k": [0, 3, 20], "top_p": [1.0, 0.9, 0.5], "min_p": [0.0, 0.05, 0.3]}
    asked = [{name: data.draw(st.sampled_from(some)) for name, some in limits.items()} for _ in range(4)]
    rows, logits = [sequence(seed=seed + i, **params) for i, params in enumerate(asked)], logits_of(seed, rows=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "_SORTED_FIRST", head)
        sampled = Sampler([], draw=GumbelDraw(CPU))(logits.clone(), rows)
    keys = np.array([row_key(row.seed, row.index, row.num_output) for row in rows])
    noisy = logits.double().numpy() / np.array([[params["temperature"]] for params in asked])
    noisy += gumbel(keys, np.arange(logits.shape[1]))
    for line, of_row, params in zip(noisy, logits.numpy(), asked, strict=True):
        line[expected_probs(of_row, **params) == 0] = -np.inf
    assert_greatest(noisy, np.array([one.token_id for one in sampled]))


def assert_follows(counts: NDArray[np.int64], probs: NDArray[np.float64]) -> None:
    """Pearson's chi-square, tokens expected less than 5 times taken together: less often than 1 in 10,000 by chance."""
    assert not counts[probs == 0].any(), "a token outside the allowed set was drawn"
    expected = probs * counts.sum()
    rare = expected < 5
    pairs = [*zip(counts[~rare], expected[~rare], strict=True), (counts[rare].sum(), expected[rare].sum())]
    found = sum((got - want) ** 2 / want for got, want in pairs if want > 0)
    degrees = len(pairs) - 1
    # Wilson and Hilferty 1931: the cube root of chi-square / degrees is nearly normal.
    spread = 2 / (9 * degrees)
    assert ((found / degrees) ** (1 / 3) - (1 - spread)) / spread**0.5 < 3.8


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.4},
        {"temperature": 1.6, "min_p": 0.1},
        {"top_k": 5},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "head": 2},
        {"temperature": 0.6, "top_p": 0.9, "head": 2},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    params, draws = dict(params), 80 if "head" in params else 250  # thresholds take an interpreter long
    monkeypatch.setattr(draw, "_SORTED_FIRST", params.pop("head", 1024))
    logits = logits_of(3)
    rows = [sequence(seed=seed, **params) for seed in range(draws)]
    sampled = Sampler([], draw=GumbelDraw(CPU))(logits.expand(draws, -1).clone(), rows)
    counts = np.bincount([one.token_id for one in sampled], minlength=logits.shape[1])
    assert_follows(counts, expected_probs(logits[0].numpy(), **params))


@pytest.mark.parametrize("what", ["seed", "position"])
def test_noise_of_many_rows_follows_the_distribution(what: str) -> None:
    """What the kernels are held to above, with more rows than an interpreter can draw: neighbouring keys are unlike."""
    logits, draws = logits_of(5)[0].double().numpy(), 40000
    keys = np.array([row_key(i, 0, 0) if what == "seed" else row_key(0, 1, i) for i in range(draws)])
    drawn = (logits + gumbel(keys, np.arange(len(logits)))).argmax(axis=1)
    assert_follows(np.bincount(drawn, minlength=len(logits)), expected_probs(logits))


def test_a_nucleus_wider_than_the_sorted_head_is_drawn_from_whole() -> None:
    rows = [sequence(seed=i, top_p=0.999) for i in range(5)]
    tokens = {one.token_id for one in Sampler([], draw=GumbelDraw(CPU))(torch.zeros(5, 5000), rows)}
    assert len(tokens) > 3
    assert max(tokens) > 1024


@settings(max_examples=25, deadline=None)
@given(
    width=st.integers(1, 150),
    steps=st.sampled_from([2, 9, 1000]),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(1, 90),
    top_p=st.sampled_from([0.0, 0.2, 0.7, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.4]),
    seed=st.integers(0, 99),
)
def test_thresholds_let_equals_in_or_out_together(
    width: int, steps: int, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """Against sums over what is likelier, token by token; few different logits, so that many are equal."""
    chance = np.random.default_rng(seed)
    logits = (chance.integers(-steps, steps, (3, width)) * (6 / steps)).astype(np.float32)
    logits[0, 1:] = np.where(chance.random(width - 1) < 0.2, -np.inf, logits[0, 1:])
    keys, done = keys_of(3, seed), torch.tensor([False, True, False])
    limits = torch.tensor([temperature, min_p, float(min(top_k, width)), top_p]).double().view(4, 1, 1).expand(4, 3, 1)
    chosen = torch.full((3,), -7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_REST_TILE", 64)  # rows of several tiles
        sampling.draw_rest(torch.from_numpy(logits), limits, keys, done, chosen)
    assert chosen[1] == -7, "a row that had enough was drawn for again"
    noise = gumbel(keys.numpy(), np.arange(width))
    for row in (0, 2):
        line = logits[row].astype(np.float64) / temperature
        mass = np.exp(line - line.max())
        kept = mass >= min_p * (1 - 1e-6)
        likelier = line[None, :] > line[:, None]
        kept &= (likelier & kept).sum(axis=1) < top_k
        before = (likelier * np.where(kept, mass, 0.0)).sum(axis=1) / mass[kept].sum()
        if (np.abs(before - top_p) < 1e-5).any() or (np.abs(mass - min_p) < 1e-5).any():
            continue  # float32 may find either
        if top_p < 1:
            kept &= (before < top_p) | (line == line.max())
        noisy = np.where(kept, line + noise[row], -np.inf)
        assert noisy.max() - noisy[chosen[row]] <= NEAR_TIE


def test_guesses_change_nothing_where_noise_draws(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every guess is compared with the token drawn at its place, whose noise depends on that place only."""
    monkeypatch.setattr(engine, "choose_draw", lambda _: GumbelDraw(CPU))
    limits = [(0.0, 1.0), (0.4, 1.0), (0.4, 0.9)]
    asked = [SamplingParams(max_tokens=16, temperature=t, top_p=p, seed=11, ignore_eos=True) for t, p in limits]
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2], [65] * 8, [9] * 4]
    plain, guessing = make_engine(), make_engine(speculative={"method": "ngram", "adaptive": False})
    for prompt, sampling_params in zip(prompts, asked, strict=True):
        tokens = [one.generate([prompt], sampling_params)[0].outputs[0].token_ids for one in (plain, guessing)]
        assert tokens[0] == tokens[1]
    stats = guessing.stats()
    assert 0 < stats.spec_decode_num_accepted_tokens < stats.spec_decode_num_draft_tokens


def test_drawing_asks_the_device_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [{}, {"temperature": 0}, {"min_p": 0.1}, {"top_k": 7}, {"top_p": 0.9, "logprobs": 3}, {"top_p": 0.99}]
    rows = [sequence((3,), seed=i, drafts=[i], **limit) for i, limit in enumerate(limits)]
    monkeypatch.setattr(draw, "_SORTED_FIRST", 2)  # the last nucleus is wider
    with Unasked():
        drawn = Sampler([0], Typical(0.3, 0.3), GumbelDraw(CPU)).draw(logits_of(1, rows=len(rows)), rows)
    assert len(drawn.read()) == len(rows)


def test_who_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(choose_draw(CPU), Inversion), "an interpreter is for tests"
    cuda = torch.device("cuda")
    monkeypatch.setattr(sampling, "multiprocessors", lambda _: 132)
    assert isinstance(choose_draw(cuda), GumbelDraw)
    monkeypatch.setattr(device, "obstacle", lambda *_: "too old")
    assert isinstance(choose_draw(cuda), Inversion)


def test_the_device_check_of_sampling_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ((3, 700), (2, 1100))
    assert all(found.good for found in check_sampling(CPU, 4, sizes))
    monkeypatch.setattr(accuracy, "gumbel", lambda keys, ids: gumbel(keys + 1, ids))
    assert not all(found.good for found in check_sampling(CPU, 4, sizes))


def test_keys_differ_by_seed_choice_and_position_and_are_of_the_same_mix() -> None:
    asked = [(seed, index, at) for seed in (0, 1, -5, 2**62) for index in range(3) for at in range(20)]
    keys = {row_key(*one) for one in asked}
    assert len(keys) == len(asked)
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert {draw.uniform(*one) for one in asked} == {((key & (2**64 - 1)) >> 11) * 2.0**-53 for key in keys}
