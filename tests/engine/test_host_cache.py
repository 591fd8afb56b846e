"""Engines whose evicted prefixes come back from host memory: the oracle's output, the same bits, the same counts."""

from __future__ import annotations

import logging
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicas.engine import Engine, SamplingParams, bench_host_cache
from replicas.engine.config import EngineConfig
from replicas.engine.host_cache import build_host_cache
from replicas.engine.host_movers import DirectMover, StagedMover
from replicas.engine.host_store import FetchRule
from replicas.engine.kv_format import KVTensors, allocate_kv, choose_kv_format
from replicas.engine.reference import Reference
from replicas.engine.spec.config import Speculative
from replicas.protocol import Chunk, ConfigError, block_hash, prefix_root
from tests.engine.conftest import MakeEngine
from tests.engine.drafts import settings_of
from tests.engine.host_fakes import OrderedStreams, fetch_always, store_of
from tests.engine.test_engine import GREEDY, drain, outputs, request

CPU = torch.device("cpu")
BLOCK_BYTES = 4 * 2 * 2 * 2 * 12 * 4  # tokens, layers, keys and values, KV heads, head size, float32
TINY = {"num_blocks": 24, "max_model_len": 92, "watermark": 0.0, "fair_reserve": 0.0}
FORMATS = ("auto", "int8", "fp8_e4m3", "fp8_e4m3_head")


def gib(blocks: int) -> float:
    return (blocks * BLOCK_BYTES + 1) / (1 << 30)


def conversations(seed: int, count: int, length: int = 56) -> list[list[int]]:
    """Prompts that share nothing: a pool of 24 blocks of 4 holds one and a half of them."""
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(length)] for _ in range(count)]


MODES: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_num_batched_tokens": 7},
    "graphs": {"step_graphs": "eager"},
    "preempting": {"num_blocks": 32},
    "ahead": {"async_scheduling": True},
    "drafts": {"method": "draft_model"},
    "n-gram": {"method": "ngram"},
    "hydra": {"method": "hydra"},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mode", MODES)
def test_greedy_output_is_the_oracles_when_prefixes_go_and_come_back(
    mode: str, name: str, make_engine: MakeEngine, tiny_model: Path, tmp_path: Path
) -> None:
    given = {**TINY, **MODES[mode]}
    method = given.pop("method", None)
    if method is not None:
        proposer = {"draft_model": "layers"}.get(method, method)
        given["speculative"] = Speculative(
            **settings_of(proposer, tmp_path, tiny_model), max_draft_tokens=3, adaptive=False
        )
        given["num_blocks"] = 28
    engine = fetch_always(make_engine(kv_cache_dtype=name, host_cache_gib=gib(200), **given))
    kv, prompts = engine.loaded.kv, conversations(1, 5)
    reference = Reference.load(tiny_model, kv if kv.scaled else None, engine.loaded.kv_scales)
    wanted = [reference.generate(prompt, 12, ignore_eos=True) for prompt in prompts]
    for _ in range(3):
        chunks = drain(engine, [request(str(i), prompt) for i, prompt in enumerate(prompts)], every=3)
        assert [outputs(chunks)[str(i), 0] for i in range(5)] == wanted
    stats = engine.stats()
    assert stats.host_cache_fetched_blocks > 20
    assert stats.host_cache_offloaded_blocks > 40
    assert stats.prefix_cache_hits >= stats.host_cache_hits > 80
    assert stats.num_preemptions > 0 or mode != "preempting"


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(19, 40),
    slots=st.integers(1, 60),
    budget=st.integers(1, 40),
    choices=st.lists(st.integers(1, 3), min_size=2, max_size=6),
    abort_at=st.integers(0, 40),
)
def test_any_schedule_with_forks_aborts_and_fetches_gives_the_oracles_output(
    seed: int,
    blocks: int,
    slots: int,
    budget: int,
    choices: list[int],
    abort_at: int,
    make_engine: MakeEngine,
    oracle: Reference,
) -> None:
    engine = make_engine(
        num_blocks=blocks, max_model_len=72, max_num_batched_tokens=budget, max_num_seqs=4, host_cache_gib=gib(slots)
    )
    rng = random.Random(seed)
    store_of(engine).rule.pays = lambda blocks, tokens: rng.random() < 0.8  # type: ignore[method-assign]
    some = conversations(seed, 3, length=44)
    prompts = [some[i % 3][: rng.choice([20, 44])] for i in range(len(choices))]
    for turn in range(2):
        arrivals = [request(str(i), prompts[i], replace(GREEDY, n=n, max_tokens=6)) for i, n in enumerate(choices)]
        chunks: list[Chunk] = []
        gone = None
        for step in range(10_000):
            if arrivals and step % 2 == 0:
                engine.add(arrivals.pop(0))
            elif not arrivals and not engine.has_work():
                break
            if step == abort_at and turn == 0:
                gone = "0" if engine.abort("0") else None
            chunks += engine.step()
            engine.check_integrity()
            assert len(store_of(engine)) <= slots
        for (name, _), tokens in outputs(chunks).items():
            if name != gone:
                assert tokens == oracle.generate(prompts[int(name)], 6, ignore_eos=True)


def test_what_is_fetched_counts_as_cached_and_what_is_not_worth_it_does_not(make_engine: MakeEngine) -> None:
    engine = make_engine(**TINY, host_cache_gib=gib(200))
    store = store_of(engine)
    first, other = conversations(2, 2)
    asked: list[tuple[int, int]] = []

    def cached(prompt: list[int], pays: bool) -> int:
        def rule(blocks: int, tokens: int) -> bool:
            asked.append((blocks, tokens))
            return pays

        store.rule.pays = rule  # type: ignore[method-assign]
        [usage] = [chunk.usage for chunk in drain(engine, [request("a", prompt)]) if chunk.usage]
        return usage.cached_tokens

    assert cached(first, pays=True) == 0
    assert cached(other, pays=True) == 0
    left = len([block for block in engine.scheduler.pool.match(*chain_of(engine, first)) if block is not None])
    assert left < 13
    assert cached(first, pays=False) == left * 4
    assert asked[-1] == (13 - left, (13 - left) * 4), "the rule was asked about all that could be spared"
    assert cached(other, pays=True) == 13 * 4, "all full blocks before the last token"
    stats = engine.stats()
    assert stats.host_cache_hits == stats.host_cache_fetched_blocks * 4
    assert stats.host_cache_hits + left * 4 <= stats.prefix_cache_hits


def chain_of(engine: Engine, prompt: list[int]) -> tuple[bytes, list[bytes], list[int]]:
    root = parent = prefix_root("", engine.card.revision, engine.card.kv_format)
    hashes = []
    for start in range(0, (len(prompt) - 1) // 4 * 4, 4):
        parent = block_hash(parent, prompt[start : start + 4])
        hashes.append(parent)
    return root, hashes, prompt


def test_tenants_do_not_fetch_each_others_blocks(make_engine: MakeEngine) -> None:
    engine = fetch_always(make_engine(**TINY, host_cache_gib=gib(200)))
    mine, other = conversations(3, 2)
    for tenant, prompt in (("a", mine), ("a", other), ("b", mine), ("b", other)):
        [usage] = [c.usage for c in drain(engine, [request("r", prompt, tenant=tenant)]) if c.usage]
        assert usage.cached_tokens == 0, tenant
    [usage] = [c.usage for c in drain(engine, [request("r", mine, tenant="a")]) if c.usage]
    assert usage.cached_tokens == 52


def test_rates_are_measured_from_the_copies_and_steps_of_the_engine_itself(make_engine: MakeEngine) -> None:
    engine = make_engine(**TINY, host_cache_gib=gib(64))
    rule = store_of(engine).rule
    measured = rule.copy_rate
    assert measured > 0, "measured at start"
    assert rule.prefill_rate == 0
    assert not rule.pays(1, 4), "how fast prompts are computed is not known before one was"
    drain(engine, [request(str(i), prompt) for i, prompt in enumerate(conversations(4, 4))], every=20)
    assert rule.prefill_rate == engine.stats().prefill_rate > 0
    assert rule.copy_rate != measured
    assert engine.stats().host_cache_blocks_used <= 64


def test_a_failed_step_forgets_both_places(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = fetch_always(make_engine(**TINY, host_cache_gib=gib(200)))
    first, other = conversations(5, 2)
    drain(engine, [request("a", first), request("b", other)], every=50)
    assert len(store_of(engine)) > 0
    assert engine.host_cache is not None
    move = engine.host_cache.move
    monkeypatch.setattr(engine.host_cache, "move", lambda *_: 1 / 0)
    engine.add(request("c", first))
    [chunk] = engine.step()
    assert chunk.error is not None
    engine.check_integrity()
    assert engine.cached_hashes() == []
    monkeypatch.setattr(engine.host_cache, "move", move)
    drain(engine, [request("d", first)])


def test_it_is_off_unless_asked_for_and_says_what_it_reserved(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    off = make_engine()
    assert off.host_cache is None
    assert "host cache" not in off.card.backends
    assert off.stats().host_cache_blocks_total == 0
    with caplog.at_level(logging.INFO):
        engine = make_engine(host_cache_gib=gib(64))
    assert engine.stats().host_cache_blocks_total == 64
    assert engine.stats().host_cache_block_bytes == BLOCK_BYTES
    assert engine.card.backends.endswith("host cache 64 blocks (0.00 GiB)")
    assert any("host cache 64 blocks" in message and "GB/s" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"host_cache_gib": -1}, "0 or more"),
        ({"host_cache_gib": float("nan")}, "0 or more"),
        ({"host_cache_gib": float("inf")}, "0 or more"),
        ({"host_cache_gib": 1e-9}, "does not hold one block"),
        ({"host_cache_gib": 1e6}, "free host memory"),
        ({"host_cache_gib": 1, "enable_prefix_caching": False}, "enable_prefix_caching"),
    ],
)
def test_impossible_sizes_are_refused_by_name(bad: dict[str, Any], why: str, make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        make_engine(**bad)
    assert caught.value.param == "host_cache_gib"


# ---------------------------------------------------------------- the bits


def filled(name: str, blocks: int, *, strided: bool) -> KVTensors:
    """Random bits; `strided`: each layer contiguous, as on a GPU."""
    form = choose_kv_format(name, torch.float32)
    scales = torch.ones(3, 2, 2) if form.per_head else None
    kv = allocate_kv(blocks, 4, num_layers=3, num_kv_heads=2, head_dim=8, kv=form, device=CPU, scales=scales)
    if strided:
        kv = replace(kv, data=relaid(kv.data), scales=None if kv.scales is None else relaid(kv.scales))
    generator = torch.Generator().manual_seed(blocks)
    for tensor in kv.tensors:
        tensor.copy_(torch.randint(-127, 127, tensor.shape, generator=generator))
    return kv


def relaid(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(*tensor.shape[1:3], len(tensor), *tensor.shape[3:], dtype=tensor.dtype).movedim(2, 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["direct", "staged"])
def test_blocks_come_back_bit_by_bit_and_nothing_else_is_touched(kind: str, name: str) -> None:
    kv = filled(name, 12, strided=kind == "staged")
    before = [tensor.clone() for tensor in kv.tensors]
    host = [torch.zeros(9, *tensor.shape[1:], dtype=tensor.dtype) for tensor in kv.tensors]
    streams = OrderedStreams()
    mover = DirectMover(kv.tensors, host) if kind == "direct" else StagedMover(kv.tensors, host, 2, streams)
    there = [(11, 0), (3, 8), (5, 2), (0, 1), (7, 6)]
    mover.offload(there)
    for tensor in kv.tensors:
        tensor[[11, 3, 5, 0, 7]] = 0
    back = [(0, 3), (8, 11), (2, 5), (1, 7), (6, 0)]
    mover.fetch(back)
    moved = {11: 3, 3: 11, 5: 5, 0: 7, 7: 0}
    for tensor, was in zip(kv.tensors, before, strict=True):
        for block in range(12):
            source = next((old for old, new in moved.items() if new == block), block)
            assert torch.equal(tensor[block], was[source]), block
    assert sum(blocks for blocks, _, _ in mover.finished()) == 10
    assert list(mover.finished()) == []
    if kind == "staged":
        assert {stream for stream, _ in streams.waits} == {"side", "compute"}


def test_computing_waits_for_what_is_fetched_and_a_buffer_for_its_last_user() -> None:
    kv = filled("auto", 8, strided=True)
    streams = OrderedStreams()
    mover = StagedMover(kv.tensors, [torch.zeros_like(tensor) for tensor in kv.tensors], 1, streams)
    mover.offload([(0, 0), (1, 1)])
    assert [(stream, mark.stream) for stream, mark in streams.waits] == [("side", "compute")] * 2, "never the step"
    streams.waits.clear()
    mover.fetch([(0, 2), (1, 3), (0, 4)])
    one = [("side", "side"), ("compute", "side")]  # the buffer's offload, then the step for the fetch
    assert [(stream, mark.stream) for stream, mark in streams.waits] == [*one, *one, ("side", "compute"), one[1]]
    assert [held_up for _, _, held_up in mover.finished()] == [False] * 2 + [True] * 3


def test_the_first_copies_are_measured_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock: what is told to the rule are the least seconds of one and of many."""
    told: list[tuple[float, int, float]] = []
    monkeypatch.setattr(FetchRule, "calibrate", lambda _, *measured: told.append(measured))
    kv = filled("int8", 30, strided=False)
    config = EngineConfig(model="", host_cache_gib=gib(40))
    assert build_host_cache(config, kv, 30, BLOCK_BYTES) is not None
    [(one_s, blocks, blocks_s)] = told
    assert blocks == 16
    assert 0 < one_s
    assert 0 < blocks_s
    assert build_host_cache(replace(config, host_cache_gib=0.0), kv, 30, BLOCK_BYTES) is None


def test_generate_with_sampling_is_the_same_with_and_without_the_tier(make_engine: MakeEngine) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.0, seed=7, ignore_eos=True)
    prompts = conversations(6, 4)
    plain, tiered = make_engine(**TINY), fetch_always(make_engine(**TINY, host_cache_gib=gib(100)))
    for _ in range(2):
        for prompt in prompts:
            [one], [two] = (engine.generate([prompt], params)[0].outputs for engine in (plain, tiered))
            assert one.token_ids == two.token_ids
    assert tiered.stats().host_cache_fetched_blocks > 0


def test_the_bench_compares_two_engines_that_answer_alike(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = "bench --conversations 4 --turns 3 --prompt 40 --say 8 --output 4 --pool-tokens 96 --host-cache-gib 0.001"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--model", str(tiny_model)])
    assert bench_host_cache.main() == 0
    shown = capsys.readouterr().out
    assert "4 conversations of 68 tokens, a pool of 96 tokens" in shown
    assert re.search(r"median of 8 pairs", shown)
    assert shown.endswith("conversations whose answers differ: 0\n")
    cached = [float(line.split()[-1].rstrip("%")) for line in shown.splitlines() if line.endswith("%")]
    assert cached[0] < 50
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "/no/such/model"])
    assert bench_host_cache.main() == 1
