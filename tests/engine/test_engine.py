"""The engine against the oracle on a tiny model: whatever shares the batch, greedy output is the oracle's."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicas.engine import Engine, SamplingParams
from replicas.engine.reference import Reference
from replicas.protocol import (
    Chunk,
    ConfigError,
    ContextLengthExceeded,
    EngineFault,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    QueueFull,
)
from tests.engine.conftest import MakeEngine
from tests.small_model import EOS

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)


def request(name: str, prompt: list[int], params: SamplingParams = GREEDY, tenant: str = "") -> GenerateRequest:
    return GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=params, tenant=tenant)


def prompts_of(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(256) for _ in range(longest)]
    return [
        shared[: rng.randrange(longest)] + [rng.randrange(256) for _ in range(rng.randrange(1, 12))]
        for _ in range(count)
    ]


def drain(engine: Engine, arrivals: list[GenerateRequest] | None = None, every: int = 1) -> list[Chunk]:
    """Run to the end, adding one arrival every few steps and recounting the pool after each step."""
    chunks: list[Chunk] = []
    queue = list(arrivals or [])
    steps = 0
    while queue or engine.has_work():
        if queue and (steps % every == 0 or not engine.has_work()):
            engine.add(queue.pop(0))
        chunks += engine.step()
        engine.check_integrity()
        steps += 1
    return chunks


def outputs(chunks: list[Chunk]) -> dict[tuple[str, int], list[int]]:
    result: dict[tuple[str, int], list[int]] = {}
    for chunk in chunks:
        result.setdefault((chunk.request_id, chunk.index), []).extend(chunk.token_ids)
    return result


def assert_greedy_is_the_oracles(oracle: Reference, prompt: list[int], output: list[int]) -> None:
    logits = oracle.logits(prompt + output[:-1])[len(prompt) - 1 :]
    assert output == logits.argmax(dim=-1).tolist()


SETTINGS: dict[str, dict[str, Any]] = {
    "roomy": {},
    "chunked prefill": {"max_num_batched_tokens": 5},
    "tiny pool": {"num_blocks": 20, "max_model_len": 80, "watermark": 0.0},
    "tiny pool, chunked": {"num_blocks": 20, "max_model_len": 80, "max_num_batched_tokens": 7, "watermark": 0.0},
    "no cache": {"enable_prefix_caching": False},
    "few rows": {"max_num_seqs": 3},
    "big blocks": {"block_size": 16, "num_blocks": 16},
    "blocks of one": {"block_size": 1, "num_blocks": 400},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_output_is_the_oracles(name: str, make_engine: MakeEngine, oracle: Reference) -> None:
    engine = make_engine(**SETTINGS[name])
    prompts = prompts_of(1, 14)
    for order in (list(range(14)), random.Random(2).sample(range(14), 14)):  # the second round hits the cache
        chunks = drain(engine, [request(str(i), prompts[i]) for i in order], every=2)
        for (request_id, _), tokens in outputs(chunks).items():
            assert len(tokens) == GREEDY.max_tokens
            assert_greedy_is_the_oracles(oracle, prompts[int(request_id)], tokens)
    stats = engine.stats()
    if "tiny pool" in name:
        assert stats.num_preemptions > 0, "the pool was meant to be too small"
    if engine.config.enable_prefix_caching:
        assert stats.prefix_cache_hits > 0
    else:
        assert stats.prefix_cache_hits == 0


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(18, 60),
    budget=st.integers(1, 40),
    rows=st.integers(1, 8),
    every=st.integers(1, 6),
    choices=st.lists(st.integers(1, 4), min_size=1, max_size=8),
    abort_at=st.integers(0, 30),
)
def test_any_schedule_with_forks_and_aborts_gives_the_oracles_output(
    seed: int,
    blocks: int,
    budget: int,
    rows: int,
    every: int,
    choices: list[int],
    abort_at: int,
    make_engine: MakeEngine,
    oracle: Reference,
) -> None:
    engine = make_engine(
        num_blocks=blocks, max_model_len=72, max_num_batched_tokens=budget, max_num_seqs=rows, watermark=0.05
    )
    prompts = prompts_of(seed, len(choices))
    params = [replace(GREEDY, n=n, max_tokens=6) for n in choices]
    arrivals = [request(str(i), prompts[i], params[i]) for i in range(len(choices))]
    chunks: list[Chunk] = []
    victim = str(seed % len(choices))
    aborted = False
    for step in range(10_000):
        if arrivals and (step % every == 0 or not engine.has_work()):
            engine.add(arrivals.pop(0))
        elif not arrivals and not engine.has_work():
            break
        if step == abort_at:
            aborted = engine.abort(victim)
        new = engine.step()
        assert not (aborted and any(c.request_id == victim for c in new)), "an aborted request still spoke"
        chunks += new
        engine.check_integrity()
    for (request_id, _), tokens in outputs(chunks).items():
        if aborted and request_id == victim:
            continue
        assert len(tokens) == 6
        assert_greedy_is_the_oracles(oracle, prompts[int(request_id)], tokens)
    terminal = [c.request_id for c in chunks if c.terminal]
    assert sorted(terminal) == sorted(str(i) for i in range(len(choices)) if not (aborted and str(i) == victim))


def test_seeded_sampling_is_the_same_alone_and_in_any_company(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=40, max_model_len=100)
    prompts = prompts_of(3, 8)
    params = SamplingParams(max_tokens=20, temperature=0.9, top_p=0.95, seed=7, n=2, ignore_eos=True)
    alone = [outputs(drain(engine, [request("x", prompt, params)])) for prompt in prompts]
    together = outputs(drain(engine, [request(str(i), prompt, params) for i, prompt in enumerate(prompts)], every=3))
    assert engine.stats().num_preemptions > 0
    for i, single in enumerate(alone):
        assert single["x", 0] != single["x", 1], "two choices of one request draw differently"
        for index in (0, 1):
            assert together[str(i), index] == single["x", index]


def test_choices_share_the_prompt_and_copy_on_write(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = prompts_of(4, 1)[0][:10] + [1] * 15  # 25 tokens: 7 blocks of 4, the last with one token
    engine.add(request("a", prompt[:25], replace(GREEDY, n=4)))
    engine.step()
    assert engine.pool.num_blocks - engine.pool.num_free == 7
    engine.step()
    used = engine.pool.num_blocks - engine.pool.num_free
    assert used == 6 + 4, "six full blocks shared by all, the seventh copied for each but its last holder"
    drain(engine)


def test_terminal_chunk_carries_the_usage_of_all_choices(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = [5] * 21
    chunks = drain(engine, [request("a", prompt, replace(GREEDY, n=3, max_tokens=4))])
    [last] = [c for c in chunks if c.terminal]
    assert last is chunks[-1]
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (21, 12, 0)
    [again] = [c for c in drain(engine, [request("b", prompt)]) if c.terminal]
    assert again.usage is not None
    assert again.usage.cached_tokens == 20


def test_prefix_is_shared_within_one_tenant_only(make_engine: MakeEngine) -> None:
    engine = make_engine()
    cached = []
    for name, tenant in (("a", "x"), ("b", "y"), ("c", "x")):
        [last] = [c for c in drain(engine, [request(name, [9] * 30, tenant=tenant)]) if c.terminal]
        assert last.usage is not None
        cached.append(last.usage.cached_tokens)
    assert cached == [0, 0, 28]


def test_a_burst_with_one_prefix_computes_it_once(make_engine: MakeEngine, oracle: Reference) -> None:
    """Blocks are shared within the very step that fills them: attention writes before it reads."""
    engine = make_engine(max_num_batched_tokens=512)
    prefix = prompts_of(6, 1, longest=60)[0] + [7] * 40
    prompts = [[*prefix, i] for i in range(5)]
    for i, prompt in enumerate(prompts):
        engine.add(request(str(i), prompt))
    chunks = engine.step()
    assert len(chunks) == 5
    assert engine.stats().prefix_cache_hits == 4 * (len(prefix) // 4 * 4)
    for (request_id, _), tokens in outputs(chunks + drain(engine)).items():
        assert_greedy_is_the_oracles(oracle, prompts[int(request_id)], tokens)


def test_events_tell_a_listener_exactly_what_is_cached(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=24, max_model_len=90)
    cached: set[bytes] = set()
    for i, prompt in enumerate(prompts_of(8, 12)):
        drain(engine, [request(str(i), prompt)])
        for event in engine.take_events():
            cached = cached | set(event.hashes) if event.kind == "stored" else cached - set(event.hashes)
        assert cached == set(engine.pool._cached)


def text_of(engine: Engine, prompt: list[int], params: SamplingParams) -> tuple[str, FinishReason | None, list[int]]:
    [completion] = engine.generate([prompt], params)
    [output] = completion.outputs
    return output.text, output.finish_reason, output.token_ids


def test_stop_strings_ids_and_lengths_end_a_choice(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = [ord(c) for c in "abc"]
    whole, reason, tokens = text_of(engine, prompt, replace(GREEDY, max_tokens=30))
    assert (reason, len(tokens)) == (FinishReason.LENGTH, 30)
    readable = [i for i in range(4, 20) if tokens[i] < 128 and tokens[i] not in tokens[:i]]
    assert readable, "the tiny model was chosen so that it writes some ASCII"
    at = readable[0]
    text, reason, got = text_of(engine, prompt, replace(GREEDY, max_tokens=30, stop=(chr(tokens[at]),)))
    assert (text, reason, len(got)) == (whole.split(chr(tokens[at]))[0], FinishReason.STOP, at + 1)
    text, reason, got = text_of(engine, prompt, replace(GREEDY, max_tokens=30, stop_token_ids=(tokens[at],)))
    assert (text, reason, len(got)) == (whole.split(chr(tokens[at]))[0], FinishReason.STOP, at + 1)
    banned = replace(GREEDY, max_tokens=30, stop_token_ids=(tokens[at],), min_tokens=at + 5)
    assert len(text_of(engine, prompt, banned)[2]) >= at + 5


def test_eos_ends_a_choice_unless_ignored_and_leaves_no_text(make_engine: MakeEngine) -> None:
    engine = make_engine()
    to_eos = replace(GREEDY, ignore_eos=False, logit_bias=((EOS, 100.0),))
    assert text_of(engine, [1, 2], to_eos) == ("", FinishReason.STOP, [EOS])
    assert text_of(engine, [1, 2], replace(to_eos, ignore_eos=True))[1:] == (FinishReason.LENGTH, [EOS] * 12)
    assert text_of(engine, [1, 2], replace(to_eos, min_tokens=3))[2][3:] == [EOS]


def test_logprobs_are_the_oracles(make_engine: MakeEngine, oracle: Reference) -> None:
    engine = make_engine(max_num_batched_tokens=6)
    prompt = prompts_of(9, 1)[0]
    [completion] = engine.generate([prompt], replace(GREEDY, logprobs=3))
    [output] = completion.outputs
    want = torch.log_softmax(oracle.logits(prompt + output.token_ids)[len(prompt) - 1 :], dim=-1)
    for i, (token, got) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        assert got.token_id == token
        assert got.logprob == pytest.approx(want[i, token].item(), abs=1e-4)
        assert [t.token_id for t in got.top] == want[i].topk(3).indices.tolist()
        assert got.token == bytes([token])


def test_abort_frees_every_block_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_batched_tokens=8)
    for steps in (0, 1, 3, 6):
        engine.add(request("a", [3] * 20, replace(GREEDY, n=3)))
        for _ in range(steps):
            engine.step()
        assert engine.abort("a")
        assert not engine.abort("a")
        assert engine.pool.num_free == engine.pool.num_blocks
        assert not engine.has_work()


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(
    make_engine: MakeEngine, oracle: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_seqs=2)
    prompts = prompts_of(10, 4)
    for i, prompt in enumerate(prompts):
        engine.add(request(str(i), prompt, replace(GREEDY, n=2)))
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "hidden", lambda *_: 1 / 0)
        errors = [c for c in engine.step() if c.error is not None]
    assert errors
    assert all(isinstance(c.error, EngineFault) for c in errors)
    engine.check_integrity()
    lost = {c.request_id for c in errors}
    chunks = drain(engine)
    assert {c.request_id for c in chunks if c.terminal} == {str(i) for i in range(4)} - lost
    [completion] = engine.generate([prompts[0]], GREEDY)
    assert_greedy_is_the_oracles(oracle, prompts[0], completion.outputs[0].token_ids)


@pytest.mark.parametrize(
    ("prompt", "params", "error", "param"),
    [
        ([], GREEDY, InvalidRequest, "prompt"),
        ([257], GREEDY, InvalidRequest, "prompt"),
        ([-1], GREEDY, InvalidRequest, "prompt"),
        ([1], replace(GREEDY, stop_token_ids=(999,)), InvalidRequest, "stop_token_ids"),
        ([1], replace(GREEDY, logit_bias=((999, 1.0),)), InvalidRequest, "logit_bias"),
        ([1], replace(GREEDY, temperature=-1), InvalidRequest, "temperature"),
        ([1], replace(GREEDY, temperature=float("nan")), InvalidRequest, "temperature"),
        ([1], replace(GREEDY, max_tokens=0), InvalidRequest, "max_tokens"),
        ([1], replace(GREEDY, top_p=0.0), InvalidRequest, "top_p"),
        ([1], replace(GREEDY, min_tokens=13), InvalidRequest, "min_tokens"),
        ([1], replace(GREEDY, stop=("",)), InvalidRequest, "stop"),
        ([1], replace(GREEDY, stop_token_ids=(1,) * 257), InvalidRequest, "stop_token_ids"),
        ([1], replace(GREEDY, logit_bias=((1, 1.0),) * 1025), InvalidRequest, "logit_bias"),
        ([1], replace(GREEDY, repetition_penalty=1e-40), InvalidRequest, "repetition_penalty"),
        ([1] * 250, GREEDY, ContextLengthExceeded, "messages"),
    ],
)
def test_bad_requests_are_refused_by_name_and_leave_nothing(
    prompt: list[int], params: SamplingParams, error: type[Exception], param: str, make_engine: MakeEngine
) -> None:
    engine = make_engine()
    with pytest.raises(error) as caught:
        engine.add(request("a", prompt, params))
    assert caught.value.param == param  # type: ignore[attr-defined]
    assert not engine.has_work()


def test_over_long_prompt_is_refused_with_both_counts(make_engine: MakeEngine) -> None:
    with pytest.raises(
        ContextLengthExceeded, match=r"256 tokens.*262 tokens \(250 in the prompt, 12 in the completion"
    ):
        make_engine().add(request("a", [1] * 250))


def test_full_queue_refuses_at_once_and_says_when_to_come_back(make_engine: MakeEngine) -> None:
    engine = make_engine(max_waiting=2)
    for i in range(2):
        engine.add(request(str(i), [1]))
    with pytest.raises(QueueFull) as caught:
        engine.add(request("2", [1]))
    assert caught.value.retry_after_s is not None
    drain(engine)


def test_a_running_id_cannot_be_used_again(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.add(request("a", [1]))
    with pytest.raises(InvalidRequest, match="already running"):
        engine.add(request("a", [1]))
    drain(engine)


def test_two_engines_in_one_process_do_not_meet(make_engine: MakeEngine, oracle: Reference) -> None:
    engines = [make_engine(block_size=4), make_engine(block_size=8, num_blocks=64)]
    prompts = prompts_of(11, 2)
    for engine, prompt in zip(engines, prompts, strict=True):
        engine.add(request("same id", prompt))
    chunks: list[list[Chunk]] = [[], []]
    while any(engine.has_work() for engine in engines):
        for engine, seen in zip(engines, chunks, strict=True):
            seen += engine.step() if engine.has_work() else []
    for prompt, seen in zip(prompts, chunks, strict=True):
        assert_greedy_is_the_oracles(oracle, prompt, outputs(seen)["same id", 0])


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ({"num_blocks": 4, "max_model_len": 100}, "max_model_len"),
        ({"block_size": 0}, "block_size"),
        ({"dtype": "int3"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "device"),
        ({"watermark": 1.5}, "watermark"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"attention": "nonsense"}, "nonsense"),
    ],
)
def test_impossible_settings_are_refused_at_start_by_name(
    bad: dict[str, Any], word: str, make_engine: MakeEngine
) -> None:
    with pytest.raises(ConfigError, match=word):
        make_engine(**bad)


def test_pool_smaller_than_the_model_lowers_max_model_len(make_engine: MakeEngine) -> None:
    engine = make_engine(num_blocks=10)
    assert engine.card.max_model_len == engine.max_model_len == 40
    [completion] = engine.generate([[1] * 28], GREEDY)
    assert len(completion.outputs[0].token_ids) == 12
