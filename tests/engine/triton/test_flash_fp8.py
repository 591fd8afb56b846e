"""FlashAttention 3 in FP8: how queries are rounded for it, and what a stand-in computes of what it is given."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replicas.engine import rounded_queries
from replicas.engine.attention import TorchAttention
from replicas.engine.batch import StepBatch
from replicas.engine.flash import Flash, FlashAttention
from replicas.engine.kv_format import LayerCache
from replicas.engine.triton import cache as triton_cache
from tests.engine.triton.test_attention import Case, sequences

CPU, FP8 = torch.device("cpu"), torch.float8_e4m3fn
ROUNDERS = (rounded_queries.round_queries, triton_cache.round_queries)


def attend_in_float64(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **given: Any) -> torch.Tensor:
    """`flash_attn_interface.flash_attn_with_kvcache` as the engine calls it: FP8 in, bfloat16 out."""
    assert q.dtype is k_cache.dtype is v_cache.dtype is FP8
    assert given["causal"]
    starts, lengths = given["cu_seqlens_q"].tolist(), given["cache_seqlens"].tolist()
    kv_heads, group = k_cache.shape[2], q.shape[1] // k_cache.shape[2]
    for name in ("q_descale", "k_descale", "v_descale"):
        assert given[name].shape == (len(lengths), kv_heads)
        assert given[name].dtype is torch.float32
    left, right = given["window_size"]
    assert (left, right) == (-1, -1) or right == 0
    out = torch.full(q.shape, math.nan, dtype=torch.float64)
    for i, length in enumerate(lengths):
        begin, end = starts[i], starts[i + 1]
        assert end - begin <= given["max_seqlen_q"]
        pages = given["page_table"][i].long()
        rows = torch.arange(length - (end - begin), length).unsqueeze(1)
        cols = torch.arange(length).unsqueeze(0)
        seen = (cols <= rows) & ((cols >= rows - left) if left >= 0 else True)
        for head in range(q.shape[1]):
            kv = head // group
            query, keys, values = (
                codes.double() * given[name][i, kv].double()
                for codes, name in (
                    (q[begin:end, head], "q_descale"),
                    (k_cache[pages].flatten(0, 1)[:length, kv], "k_descale"),
                    (v_cache[pages].flatten(0, 1)[:length, kv], "v_descale"),
                )
            )
            scores = (query @ keys.T * given["softmax_scale"]).masked_fill(~seen, -math.inf)
            out[begin:end, head] = scores.softmax(dim=1) @ values
    return out.to(torch.bfloat16)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> FlashAttention:
    module = ModuleType("flash_attn_interface")
    module.flash_attn_with_kvcache = attend_in_float64  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return FlashAttention(Flash(3, "3.0.0"), CPU, torch.bfloat16)


def rounded(case: Case) -> torch.Tensor:
    """The numbers that queries become, sequence by sequence and head by head, without the code that is tested."""
    wide, group = case.q.float().clone(), case.q_heads // case.kv_heads
    starts = case.batch().query_start.tolist()
    for begin, end in pairwise(starts):
        for head in range(case.kv_heads):
            part = wide[begin:end, head * group : (head + 1) * group]
            scale = part.abs().max() / 448
            part.copy_((part / scale).clamp(-448, 448).to(FP8).float() * scale)
    return wide


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(sequences, min_size=1, max_size=3),
    heads=st.sampled_from([(6, 2), (9, 3), (4, 4), (8, 1)]),
    dim=st.sampled_from([16, 32, 80]),
    block_size=st.sampled_from([16, 1, 4]),
    window=st.none() | st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_it_attends_to_what_the_codes_stand_for(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    window: int | None,
    seed: int,
    backend: FlashAttention,
) -> None:
    case = Case(lengths, *heads, dim, block_size, window, torch.bfloat16, "fp8_e4m3_head", seed)
    cache, wanted, batch = case.cache(), case.cache(), case.batch()
    out = backend(case.q, case.k, case.v, cache, batch, scale=dim**-0.5, window=window)
    wanted.write(batch.slot_mapping, case.k, case.v)
    assert torch.equal(cache.keys, wanted.keys)
    assert torch.equal(cache.values, wanted.values)
    assert out.dtype is torch.bfloat16
    unrounded = case.exact(cache)
    case.q = rounded(case)
    exact = case.exact(cache)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5)
    assert (exact - unrounded).abs().mean() < 0.05, "queries lose 3 % of a number each"


def test_the_stand_in_and_torch_agree_on_a_cache(backend: FlashAttention) -> None:
    case = Case([(3, 40), (1, 20)], dtype=torch.bfloat16, kv="fp8_e4m3_head")
    out = backend(case.q, case.k, case.v, case.cache(), case.batch(), scale=0.2, window=None)
    torch_out = TorchAttention()(case.q, case.k, case.v, case.cache(), case.batch(), scale=0.2, window=None)
    assert (out - torch_out).abs().mean() < 0.03


# ---------------------------------------------------------------- queries


@settings(max_examples=25, deadline=None)
@given(
    news=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    heads=st.sampled_from([(6, 2), (4, 4), (8, 1)]),
    dim=st.sampled_from([16, 32, 80]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    magnitude=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_the_kernel_rounds_queries_to_the_same_bits(
    news: list[int], heads: tuple[int, int], dim: int, dtype: torch.dtype, magnitude: float, seed: int
) -> None:
    case = Case([(new, new) for new in news], *heads, dim, dtype=dtype, seed=seed)
    q, batch = (case.q.float() * magnitude).to(dtype), case.batch()
    (codes, scales), (kernel_codes, kernel_scales) = (each(q, batch, heads[1]) for each in ROUNDERS)
    assert codes.shape == q.shape
    assert scales.shape == (len(news), heads[1])
    assert torch.equal(codes.view(torch.int8), kernel_codes.view(torch.int8))
    assert torch.equal(scales, kernel_scales)
    largest = codes.float().abs().unflatten(1, (heads[1], -1)).amax(dim=(2, 3))
    assert [part.max().item() for part in largest.split(news)] == [448.0] * len(news)


@pytest.mark.parametrize("round_queries", ROUNDERS)
def test_a_sequence_does_not_depend_on_its_neighbours(round_queries: Any) -> None:
    case = Case([(2, 2), (3, 3), (2, 2)], dtype=torch.bfloat16)
    q, batch = case.q.clone(), case.batch()
    codes, scales = round_queries(q, batch, 2)
    q[:2] *= 1000
    q[5:] = 0
    other_codes, other_scales = round_queries(q, batch, 2)
    assert torch.equal(codes[2:5].view(torch.int8), other_codes[2:5].view(torch.int8))
    assert torch.equal(scales[1], other_scales[1])
    alone = Case([(3, 3)]).batch()
    alone_codes, alone_scales = round_queries(case.q[2:5], alone, 2)
    assert torch.equal(alone_codes.view(torch.int8), codes[2:5].view(torch.int8))
    assert torch.equal(alone_scales[0], scales[1])


def padded(batch: StepBatch) -> StepBatch:
    """As a recorded step has it: sequences without tokens, and rows that belong to nobody."""
    ends = batch.query_start[-1:]
    return replace(
        batch,
        query_start=torch.cat([batch.query_start, ends, ends]),
        context_lens=torch.nn.functional.pad(batch.context_lens, (0, 2)),
        block_tables=torch.nn.functional.pad(batch.block_tables, (0, 0, 0, 2)),
    )


@pytest.mark.parametrize("round_queries", ROUNDERS)
def test_padding_is_no_number_of_anybodys(round_queries: Any) -> None:
    case = Case([(2, 2), (1, 1)], dtype=torch.bfloat16)
    codes, scales = round_queries(case.q, case.batch(), 2)
    more = torch.cat([case.q, torch.full((4, 6, 32), 1e4, dtype=torch.bfloat16)])
    padded_codes, padded_scales = round_queries(more, padded(case.batch()), 2)
    assert torch.equal(padded_codes[:3].view(torch.int8), codes.view(torch.int8))
    assert torch.equal(padded_scales, torch.cat([scales, torch.ones(2, 2)]))
    assert padded_codes.float().isfinite().all()


def test_padding_sequences_reach_flash_attention_with_factors_of_their_own(backend: FlashAttention) -> None:
    case = Case([(2, 20), (1, 9)], dtype=torch.bfloat16, kv="fp8_e4m3_head")
    cache: LayerCache = case.cache()
    out = backend(case.q, case.k, case.v, cache, case.batch(), scale=0.2, window=None)
    again = backend.attend(case.q, cache, padded(case.batch()), scale=0.2, window=None)
    assert torch.equal(out, again)
    assert out.isfinite().all()


def test_rounding_asks_the_device_for_nothing() -> None:
    """On tensors without numbers whatever waits for one fails; and so a graph can be recorded."""
    case = Case([(2, 20), (1, 9)], dtype=torch.bfloat16)
    batch = case.batch()
    nowhere = replace(batch, query_start=batch.query_start.to("meta"), context_lens=batch.context_lens.to("meta"))
    codes, scales = rounded_queries.round_queries(case.q.to("meta"), nowhere, 2)
    assert (codes.shape, scales.shape) == (case.q.shape, (2, 2))
