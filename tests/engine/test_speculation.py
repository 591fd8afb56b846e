"""Whatever guesses, and however well: the output is the target's own, and nothing is left behind."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.engine.reference import Reference
from replicas.engine.spec.config import Speculative
from replicas.protocol import Chunk, FinishReason
from tests.engine.conftest import MakeEngine
from tests.engine.drafts import PROPOSERS, settings_of
from tests.engine.test_engine import GREEDY, assert_greedy_is_the_oracles, drain, outputs, prompts_of, request
from tests.small_model import write_byte_tokenizer

LONG = replace(GREEDY, max_tokens=16)


@pytest.fixture(scope="session")
def speculative(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Speculative]:
    """By name of the proposer; four guesses for every sequence in every step."""
    folder = tmp_path_factory.mktemp("drafts")
    return {
        name: Speculative(**settings_of(name, folder, tiny_model), max_draft_tokens=4, adaptive=False)
        for name in PROPOSERS
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked prefill": {"max_num_batched_tokens": 9},
    "tiny pool": {"num_blocks": 24, "max_model_len": 92, "watermark": 0.0, "max_num_batched_tokens": 40},
    "no cache": {"enable_prefix_caching": False, "max_num_seqs": 3},
    "big blocks": {"block_size": 16, "num_blocks": 24},
    "8-bit KV": {"kv_cache_dtype": "int8"},
}


DISTINCT = ("ngram", "suffix", "hydra", "layers", "noised copy")  # the others are variants of these


def accepted(engine: Engine) -> int:
    stats = engine.stats()
    assert sum(stats.spec_decode_num_accepted_tokens_per_pos) == stats.spec_decode_num_accepted_tokens
    assert stats.spec_decode_num_accepted_tokens <= stats.spec_decode_num_draft_tokens
    return stats.spec_decode_num_accepted_tokens


COMBINATIONS = [(setting, name) for setting in SETTINGS for name in PROPOSERS if setting == "roomy" or name in DISTINCT]


@pytest.mark.parametrize(("setting", "name"), COMBINATIONS)
def test_greedy_output_is_the_targets_own(
    setting: str, name: str, speculative: dict[str, Speculative], make_engine: MakeEngine, oracle: Reference
) -> None:
    """Prefix cache, chunked prefill, preemption and forks beside it; the second round hits the cache."""
    engine = make_engine(**SETTINGS[setting], speculative=speculative[name])
    plain = make_engine(**SETTINGS[setting]) if setting == "8-bit KV" else None
    prompts = prompts_of(1, 6)
    params = [replace(LONG, n=1 + i % 2) for i in range(6)]
    for order in (list(range(6)), random.Random(2).sample(range(6), 6)):
        chunks = drain(engine, [request(str(i), prompts[i], params[i]) for i in order], every=2)
        for (request_id, _), tokens in outputs(chunks).items():
            if plain is None:
                assert_greedy_is_the_oracles(oracle, prompts[int(request_id)], tokens)
            else:
                assert tokens == plain.generate([prompts[int(request_id)]], LONG)[0].outputs[0].token_ids
    if name not in ("ngram", "suffix"):  # the tiny model hardly repeats itself
        assert accepted(engine) > 0, "the guesses were meant to be right now and then"
    if setting == "tiny pool":
        assert engine.stats().num_preemptions > 0, "the pool was meant to be too small"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(PROPOSERS),
    seed=st.integers(0, 10**6),
    blocks=st.integers(20, 60),
    budget=st.integers(1, 40),
    rows=st.integers(1, 6),
    most=st.integers(1, 9),
    adaptive=st.booleans(),
    choices=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    abort_at=st.integers(0, 20),
)
def test_any_schedule_with_forks_aborts_and_guesses_gives_the_oracles_output(
    name: str,
    seed: int,
    blocks: int,
    budget: int,
    rows: int,
    most: int,
    adaptive: bool,
    choices: list[int],
    abort_at: int,
    speculative: dict[str, Speculative],
    make_engine: MakeEngine,
    oracle: Reference,
) -> None:
    engine = make_engine(
        num_blocks=blocks,
        max_model_len=72,
        max_num_batched_tokens=budget,
        max_num_seqs=rows,
        speculative=replace(speculative[name], max_draft_tokens=most, adaptive=adaptive, draft_kv_tokens=80),
    )
    prompts = prompts_of(seed, len(choices))
    for i, n in enumerate(choices):
        engine.add(request(str(i), prompts[i], replace(GREEDY, n=n, max_tokens=9)))
    victim, chunks, steps = str(seed % len(choices)), list[Chunk](), 0
    while engine.has_work():
        if steps == abort_at:
            engine.abort(victim)
        chunks += engine.step()
        engine.check_integrity()
        steps += 1
    for (request_id, _), tokens in outputs(chunks).items():
        if request_id != victim:
            assert len(tokens) == 9
            assert_greedy_is_the_oracles(oracle, prompts[int(request_id)], tokens)


@pytest.mark.parametrize("name", PROPOSERS)
def test_everything_a_request_may_ask_for_is_as_without_guesses(
    name: str, speculative: dict[str, Speculative], make_engine: MakeEngine
) -> None:
    """Same seed, same text, same logprobs, penalties, stops and usage: guesses change when tokens come, not which."""
    plain, guessing = make_engine(), make_engine(speculative=speculative[name])
    base = SamplingParams(max_tokens=24, temperature=0.8, seed=11, ignore_eos=True)
    asked = [
        base,
        replace(base, temperature=0.3, top_p=0.9),
        replace(base, top_k=3, min_p=0.05, n=3),
        replace(base, temperature=0.5, logprobs=3),
        replace(base, temperature=0.2, repetition_penalty=1.3, logprobs=0),
        replace(base, temperature=0.0, presence_penalty=1.5, frequency_penalty=0.7),
        replace(base, temperature=0.1, logit_bias=((65, 6.0), (66, 6.0)), stop=("AAAB", "BA")),
        replace(base, temperature=0.1, logit_bias=((65, 9.0), (66, 9.0)), stop=("BA",), min_tokens=12),
        replace(base, temperature=0.1, logit_bias=((65, 9.0),), stop_token_ids=(66,), ignore_eos=False),
        replace(base, temperature=0.9, logit_bias=((256, 7.0),), ignore_eos=False, min_tokens=5),
    ]
    prompt = list(b"abcabcabcab")
    for params in asked:
        [want], [got] = plain.generate([prompt], params), guessing.generate([prompt], params)
        assert got.usage == want.usage
        for one, other in zip(got.outputs, want.outputs, strict=True):
            assert (one.text, one.token_ids, one.finish_reason) == (other.text, other.token_ids, other.finish_reason)
            for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
                assert (mine.token_id, mine.token) == (theirs.token_id, theirs.token)
                assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
                assert [t.token_id for t in mine.top] == [t.token_id for t in theirs.top]
    assert accepted(guessing) > 0


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 tokens, so that any proposer is right now and then at temperature 1."""
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, eos_token_id=15, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    write_byte_tokenizer(folder, eos=15)
    return folder


DRAWN = 5  # tokens of each choice; all but the first may have been guessed


def draw(model: Path, first_seed: int, speculative: Speculative | None) -> tuple[list[Counter[int]], Engine]:
    """20,480 tokens that follow one prompt at temperature 1, counted by place."""
    engine = Engine(EngineConfig(model=str(model), block_size=4, num_blocks=300, speculative=speculative))
    counters = [Counter[int]() for _ in range(DRAWN - 1)]
    for seed in range(first_seed, first_seed + 80):
        params = SamplingParams(max_tokens=DRAWN, temperature=1.0, n=64, ignore_eos=True, seed=seed)
        [completion] = engine.generate([[1, 2, 1, 2, 3]], params)
        for output in completion.outputs:
            for place, token in enumerate(output.token_ids[1:]):
                counters[place][token] += 1
    engine.check_integrity()
    return counters, engine


@pytest.fixture(scope="session")
def drawn_plainly(small_model: Path) -> list[Counter[int]]:
    return draw(small_model, 0, None)[0]


@pytest.mark.parametrize("name", ["ngram", "suffix", "medusa", "hydra", "layers", "states", "noised copy"])
def test_twenty_thousand_sampled_tokens_differ_by_no_more_than_chance(
    name: str, small_model: Path, drawn_plainly: list[Counter[int]], tmp_path: Path
) -> None:
    """Two samples of the same next tokens, with and without guesses. Their seeds differ: with the same ones they would
    not be two samples but the same text (see above)."""
    settings = settings_of(name, tmp_path, small_model)
    counters, engine = draw(small_model, 10**6, Speculative(**settings, max_draft_tokens=3, adaptive=False))
    assert sum(counter.total() for counter in counters) == 20_480
    assert accepted(engine) > 300, "a test of acceptance needs accepted tokens"
    for mine, plain in zip(counters, drawn_plainly, strict=True):
        assert chi_square_p(mine, plain) > 1e-4


def chi_square_p(first: Counter[Any], second: Counter[Any]) -> float:
    """P of a difference at least so large between two samples of one distribution; rare outcomes are put together."""
    keys = [key for key in first | second if first[key] + second[key] >= 20]
    table = torch.tensor([[c[key] for key in keys] for c in (first, second)], dtype=torch.float64)
    rest = torch.tensor([[c.total()] for c in (first, second)]) - table.sum(dim=1, keepdim=True)
    table = torch.cat((table, rest), dim=1) if rest.sum() >= 20 else table
    expected = table.sum(dim=1, keepdim=True) * table.sum(dim=0, keepdim=True) / table.sum()
    statistic = ((table - expected) ** 2 / expected).sum()
    freedom = torch.tensor((table.shape[1] - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def test_a_chunk_brings_all_tokens_of_its_step_and_the_last_one_ends_it(
    speculative: dict[str, Speculative], make_engine: MakeEngine
) -> None:
    engine = make_engine(speculative=speculative["ngram"])
    loop = replace(GREEDY, max_tokens=21, logit_bias=((65, 100.0),))
    engine.add(request("a", [65] * 12, loop))
    sizes = []
    while engine.has_work():
        [chunk] = engine.step()
        sizes.append(len(chunk.token_ids))
        assert chunk.text == "A" * sizes[-1]
    assert sizes == [1, 5, 5, 5, 5]
    assert chunk.finish_reason is FinishReason.LENGTH
    assert chunk.usage is not None
    assert chunk.usage.completion_tokens == 21
    engine.add(request("b", [65] * 12, replace(loop, stop=("AAAAAAAA",))))
    text = "".join(chunk.text for chunk in drain(engine))
    assert text == ""


def test_no_block_of_rejected_guesses_is_ever_offered_to_the_cache(
    speculative: dict[str, Speculative], make_engine: MakeEngine, oracle: Reference
) -> None:
    engine = make_engine(speculative=speculative["noised copy"], block_size=2)
    prompts = prompts_of(5, 6)
    chunks = drain(engine, [request(str(i), prompt, LONG) for i, prompt in enumerate(prompts)])
    followed = {i: prompts[int(i)] + tokens for (i, _), tokens in outputs(chunks).items()}
    again = drain(engine, [request(i, tokens[: len(tokens) - 3], LONG) for i, tokens in followed.items()])
    for (i, _), tokens in outputs(again).items():
        assert_greedy_is_the_oracles(oracle, followed[i][: len(followed[i]) - 3], tokens)
    known = [tuple(tokens) for tokens in followed.values()]
    for block in engine.pool._blocks:
        if block.hash is not None:
            assert any(block.token_ids == t[i : i + 2] for t in known for i in range(0, len(t), 2)) or again


def test_guesses_preempt_nobody(speculative: dict[str, Speculative], make_engine: MakeEngine) -> None:
    """With room for every sequence but not for its guesses, guesses give way."""
    engine = make_engine(num_blocks=10, block_size=4, max_model_len=20, watermark=0.0, speculative=speculative["ngram"])
    for i in range(2):
        engine.add(request(str(i), [65, 66, 65, 66], replace(GREEDY, max_tokens=16)))
    drain(engine)
    assert engine.stats().num_preemptions == 0


def test_guesses_leave_a_token_of_the_budget_to_everyone_behind(
    speculative: dict[str, Speculative], make_engine: MakeEngine
) -> None:
    engine = make_engine(max_num_batched_tokens=6, speculative=speculative["ngram"])
    for i in range(4):
        engine.add(request(str(i), [65, 66], replace(GREEDY, max_tokens=12)))
    while engine.stats().num_requests_waiting:
        engine.step()
    moved = {chunk.request_id for chunk in engine.step()}
    assert moved == {"0", "1", "2", "3"}
    drain(engine)


def test_a_proposer_that_fails_costs_no_request(
    speculative: dict[str, Speculative], make_engine: MakeEngine, oracle: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(speculative["noised copy"], method=("ngram", "draft_model"), min_match=1)
    engine = make_engine(speculative=settings)
    prompt = prompts_of(7, 1)[0]
    engine.add(request("a", prompt, LONG))
    chunks = engine.step() + engine.step()
    proposer: Any = engine.speculation._sources[1].proposer
    monkeypatch.setattr(proposer, "propose", lambda *_: 1 / 0)
    chunks += drain(engine)
    assert [source.proposer.name for source in engine.speculation._sources] == ["ngram"], "the other one goes on"
    assert_greedy_is_the_oracles(oracle, prompt, outputs(chunks)["a", 0])
    assert proposer.pool.num_free == proposer.pool.num_blocks


def test_a_draft_pool_that_is_full_or_too_short_only_guesses_less(
    speculative: dict[str, Speculative], make_engine: MakeEngine, oracle: Reference
) -> None:
    engine = make_engine(speculative=replace(speculative["noised copy"], draft_kv_tokens=40))
    prompts = [[1] * 60, *prompts_of(8, 5)]
    chunks = drain(engine, [request(str(i), prompt, LONG) for i, prompt in enumerate(prompts)])
    for (i, _), tokens in outputs(chunks).items():
        assert_greedy_is_the_oracles(oracle, prompts[int(i)], tokens)


@pytest.mark.parametrize("name", ["noised copy", "suffix", "hydra"])
def test_aborts_and_deadlines_in_the_middle_leak_nothing(
    name: str, speculative: dict[str, Speculative], make_engine: MakeEngine
) -> None:
    engine = make_engine(speculative=speculative[name])
    now = [0.0]
    engine.scheduler.clock = lambda: now[0]
    engine.add(request("a", [1, 2, 3], replace(LONG, n=2)))
    engine.add(replace(request("b", [1, 2, 3], LONG), deadline_s=5.0))
    for _ in range(4):
        engine.step()
    assert engine.abort("a")
    engine.check_integrity()
    now[0] = 6.0
    [chunk] = engine.step()
    assert chunk.error is not None
    engine.check_integrity()
    for source in engine.speculation._sources:
        source.proposer.check_integrity([])


def test_typical_acceptance_is_exact_only_where_greedy(
    speculative: dict[str, Speculative], make_engine: MakeEngine, oracle: Reference
) -> None:
    typical = replace(speculative["ngram"], acceptance="typical", typical_epsilon=1e-6, typical_delta=1e-6)
    engine = make_engine(speculative=typical)
    prompt = prompts_of(9, 1)[0]
    [completion] = engine.generate([prompt], LONG)
    assert_greedy_is_the_oracles(oracle, prompt, completion.outputs[0].token_ids)
    before, lax = accepted(engine), SamplingParams(max_tokens=40, temperature=1.0, seed=1, ignore_eos=True)
    engine.generate([[65] * 8], lax)
    strict = make_engine(speculative=speculative["ngram"])
    strict.generate([[65] * 8], lax)
    assert accepted(engine) - before > accepted(strict), "almost every guess is plausible by that rule"
