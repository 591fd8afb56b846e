"""The sampler against plain numpy on one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from replicas.engine.draw import uniform
from replicas.engine.sampler import Sampler, Typical
from replicas.engine.sequence import Sequence
from replicas.protocol import SamplingParams

VOCAB = 40


def sequence(
    output: tuple[int, ...] = (),
    prompt: tuple[int, ...] = (1,),
    seed: int = 0,
    drafts: Seq[int] = (),
    **params: Any,
) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 100, **params})
    return Sequence("r", 0, [*prompt, *output], len(prompt), sampling, seed, b"", drafts=list(drafts))


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, vocab)).astype(np.float32) * 3)


def draw_counts(seq_params: dict[str, Any], logits: torch.Tensor, draws: int = 4000) -> np.ndarray:
    rows = [sequence(seed=i, **seq_params) for i in range(draws)]
    tokens = [s.token_id for s in Sampler([])(logits.expand(draws, -1).clone(), rows)]
    return np.bincount(tokens, minlength=logits.shape[-1]) / draws


def expected_probs(
    logits: np.ndarray, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    p[p < min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    if top_p < 1:
        keep = np.searchsorted(np.cumsum(p[order]), top_p) + 1
        p[order[keep:]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    logits = logits_of(3)
    want = expected_probs(logits[0].numpy(), **params)
    got = draw_counts(params, logits)
    assert set(np.flatnonzero(got)) <= set(np.flatnonzero(want)), "a token outside the allowed set was drawn"
    # Total variation of n draws from k outcomes is about sqrt(k / n) / 2; twice that is a bug, not chance.
    assert np.abs(got - want).sum() / 2 < math.sqrt(np.count_nonzero(want) / 4000)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    rows = [sequence(temperature=0) for _ in range(2)]
    assert [sampled.token_id for sampled in Sampler([])(logits, rows)] == [1, 0]


def test_nucleus_wider_than_the_sorted_head_is_exact_too() -> None:
    logits = torch.zeros(1, 5000)
    tokens = {
        s.token_id
        for s in Sampler([])(logits.expand(500, -1).clone(), [sequence(seed=i, top_p=0.999) for i in range(500)])
    }
    assert len(tokens) > 400, "a flat distribution must not be cut to the likeliest thousand"
    assert max(tokens) > 1024


def any_params(data: st.DataObject) -> dict[str, Any]:
    return data.draw(
        st.fixed_dictionaries(
            {
                "temperature": st.sampled_from([0.0, 0.7, 1.0]),
                "top_k": st.sampled_from([0, 1, 7, VOCAB + 5]),
                "top_p": st.sampled_from([1.0, 0.9, 0.3]),
                "min_p": st.sampled_from([0.0, 0.1]),
                "frequency_penalty": st.sampled_from([0.0, 1.0]),
                "repetition_penalty": st.sampled_from([1.0, 1.3]),
                "min_tokens": st.sampled_from([0, 2]),
                "logit_bias": st.sampled_from([(), ((3, 5.0),)]),
                "logprobs": st.sampled_from([None, 0, 3]),
            }
        )
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_draws_the_same_token_whatever_shares_its_batch(data: st.DataObject) -> None:
    rows = [
        sequence(output=(3, 3, 5)[: i % 4], seed=i, **any_params(data)) for i in range(data.draw(st.integers(1, 6)))
    ]
    logits = logits_of(data.draw(st.integers(0, 99)), rows=len(rows))
    sampler = Sampler([0])
    together = sampler(logits.clone(), rows)
    for i, row in enumerate(rows):
        [alone] = sampler(logits[i : i + 1].clone(), [row])
        assert alone.token_id == together[i].token_id
        assert [t for t, _ in alone.top] == [t for t, _ in together[i].top]


def test_seed_choice_and_position_each_change_the_number() -> None:
    values = {uniform(s, i, p) for s in (0, 1, 2**62, -5) for i in range(4) for p in range(50)}
    assert len(values) == 4 * 4 * 50
    assert all(0 <= v < 1 for v in values)
    assert abs(np.mean([uniform(s, 0, p) for s in range(100) for p in range(100)]) - 0.5) < 0.01


def test_logprobs_are_raw_and_sorted() -> None:
    logits = logits_of(1)
    want = torch.log_softmax(logits[0], dim=-1)
    row = sequence(temperature=0, logprobs=3, logit_bias=((7, 100.0),), prompt=(2,), repetition_penalty=2.0)
    [got] = Sampler([])(logits.clone(), [row])
    assert got.token_id == 7
    assert got.logprob == pytest.approx(want[7].item(), abs=1e-6)
    assert [t for t, _ in got.top] == want.topk(3).indices.tolist()


def test_logprobs_are_those_of_log_softmax_whoever_asks() -> None:
    logits = logits_of(2, rows=4, vocab=3000)
    logits[1, 7], logits[2, :2990] = 40.0, float("-inf")
    rows = [sequence(temperature=0, logprobs=count) for count in (5, 0, 2)] + [sequence(temperature=0)]
    want = torch.log_softmax(logits.double(), dim=-1)
    for i, got in enumerate(Sampler([])(logits.clone(), rows)):
        count = rows[i].sampling.logprobs
        if count is None:
            assert got.logprob is None
            continue
        assert got.logprob == pytest.approx(want[i].max().item(), rel=1e-5, abs=1e-9)
        assert [t for t, _ in got.top] == want[i].topk(count).indices.tolist()
        assert [p for _, p in got.top] == pytest.approx(want[i].topk(count).values.tolist(), abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_guesses_stand_where_typical_acceptance_says_so(data: st.DataObject) -> None:
    rule = Typical(*data.draw(st.sampled_from([(0.3, 0.3), (0.09, 0.3), (1.0, 1.0), (1e-6, 1e-6)])))
    rows = [
        sequence(
            seed=i,
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
            drafts=data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=1)),
        )
        for i in range(data.draw(st.integers(1, 5)))
    ]
    logits = logits_of(data.draw(st.integers(0, 99)), rows=len(rows))
    logits[:, data.draw(st.lists(st.integers(0, VOCAB - 1), max_size=5))] = float("-inf")
    free = Sampler([])(logits.clone(), rows)
    for i, got in enumerate(Sampler([], rule)(logits.clone(), rows)):
        guess, temperature = rows[i].guess, rows[i].sampling.temperature
        stands = False
        if guess is not None and temperature > 0:
            probs = expected_probs(logits[i].numpy(), temperature=temperature)
            entropy = -sum(p * math.log(p) for p in probs if p)
            stands = probs[guess] > min(rule.epsilon, rule.delta * math.exp(-entropy))
        assert got.token_id == (guess if stands else free[i].token_id)


class Unasked(TorchDispatchMode):
    """Fails where the host would wait for a device: a number read, or a mask that says how many it chooses."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(at is None or at.dtype is not torch.bool for at in args[1]), f"{name} with a mask"
        return func(*args, **(kwargs or {}))


def test_drawing_asks_the_device_nothing() -> None:
    everything = {"logprobs": 3, "logit_bias": ((3, 5.0),), "min_tokens": 5, "repetition_penalty": 1.3}
    limits = [{}, {"temperature": 0}, {"min_p": 0.1}, {"top_k": 7}, {"top_p": 0.9}, {"top_p": 0.9, "top_k": 3}]
    rows = [sequence((3,), seed=i, drafts=[i], **everything, **limit) for i, limit in enumerate(limits)]
    logits = logits_of(1, rows=len(rows))
    with Unasked():
        drawn = Sampler([0], Typical(0.3, 0.3)).draw(logits, rows)
    assert len(drawn.read()) == len(rows)


def test_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([[4.0, 3.9, -1.0, 0.0]])
    assert Sampler([])(logits.clone(), [sequence((0,), (3,), temperature=0, presence_penalty=0.2)])[0].token_id == 1
    assert Sampler([])(logits.clone(), [sequence((0,), (3,), temperature=0, presence_penalty=0.05)])[0].token_id == 0
    assert Sampler([])(logits.clone(), [sequence((0, 0), (3,), temperature=0, frequency_penalty=0.06)])[0].token_id == 1
    # presence and frequency see output only, repetition sees the prompt too
    assert Sampler([])(logits.clone(), [sequence((), (0,), temperature=0, presence_penalty=2.0)])[0].token_id == 0
    assert Sampler([])(logits.clone(), [sequence((), (0,), temperature=0, repetition_penalty=1.1)])[0].token_id == 1
    # dividing a negative logit would make it likelier: it is multiplied
    low = torch.tensor([[-2.0, -2.1]])
    assert Sampler([])(low, [sequence((), (0,), temperature=0, repetition_penalty=1.5)])[0].token_id == 1


def test_min_tokens_forbids_eos_and_stop_ids_until_reached() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0]])
    params = {"temperature": 0, "min_tokens": 2, "stop_token_ids": (1,)}
    assert Sampler([0])(logits.clone(), [sequence((2,), **params)])[0].token_id == 2
    assert Sampler([0])(logits.clone(), [sequence((2, 2), **params)])[0].token_id == 0
    assert Sampler([0])(logits.clone(), [sequence((2,), ignore_eos=True, **params)])[0].token_id == 0


@pytest.mark.parametrize("temperature", [1e-50, 1e-39, 1e-6, 1e-4])
def test_tiny_temperatures_pick_the_likeliest_token(temperature: float) -> None:
    """Logits over 1e-39 overflowed to infinity, and the answer was the vocabulary's last token for ever."""
    logits = logits_of(4, rows=3)
    rows = [sequence(seed=i, temperature=temperature, top_p=0.9) for i in range(3)]
    assert [s.token_id for s in Sampler([])(logits.clone(), rows)] == logits.argmax(dim=-1).tolist()
