"""Both attention backends against a float64 computation without pages, over mixed batches of decodes and chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.attention import Attention, LayerCache, TorchAttention, choose_attention
from replicas.engine.batch import StepBatch
from replicas.engine.native.paged import NativeAttention
from replicas.protocol import ConfigError
from tests.engine.native_builds import MARCHES, kernels, needs_compiler

pytestmark = needs_compiler
ABSOLUTE = 5e-6  # outputs are averages of standard normal values: errors are a few float32 roundings of 1


@dataclass
class Case:
    """Sequences (new tokens, context length) with standard normal q, k, v laid into shuffled pages."""

    sequences: list[tuple[int, int]]
    q_heads: int = 6
    kv_heads: int = 2
    dim: int = 64
    block_size: int = 16
    window: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.q, self.k, self.v = (
            [torch.randn(context, heads, self.dim, generator=generator) for _, context in self.sequences]
            for heads in (self.q_heads, self.kv_heads, self.kv_heads)
        )
        counts = [-(-context // self.block_size) for _, context in self.sequences]
        order = torch.randperm(sum(counts) + 2, generator=generator)
        self.blocks = list(order[: sum(counts)].split(counts))
        self.num_blocks = len(order)

    def slots(self, index: int) -> torch.Tensor:
        positions = torch.arange(self.sequences[index][1])
        return self.blocks[index][positions // self.block_size] * self.block_size + positions % self.block_size

    def run(self, attention: Attention, parts: list[slice] | None = None) -> list[torch.Tensor]:
        """Output of the new tokens of each sequence (or of `parts` of its positions); memory never written is NaN."""
        shape = (self.num_blocks, self.block_size, self.kv_heads, self.dim)
        cache = LayerCache(torch.full(shape, math.nan), torch.full(shape, math.nan))
        parts = parts or [slice(context - new, context) for new, context in self.sequences]
        for index, part in enumerate(parts):
            old = self.slots(index)[: part.start]
            cache.keys.flatten(0, 1)[old] = self.k[index][: part.start]
            cache.values.flatten(0, 1)[old] = self.v[index][: part.start]
        fused = torch.cat(
            [
                torch.cat([tensor[index][part].flatten(1) for tensor in (self.q, self.k, self.v)], dim=1)
                for index, part in enumerate(parts)
            ]
        )
        widths = [heads * self.dim for heads in (self.q_heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.unflatten(1, (-1, self.dim)) for part in fused.split(widths, dim=1))  # strided views
        out = attention(q, k, v, cache, self.batch(parts), scale=self.dim**-0.5, window=self.window)
        for index, part in enumerate(parts):
            slots = self.slots(index)[: part.stop]
            assert torch.equal(cache.keys.flatten(0, 1)[slots], self.k[index][: part.stop])
            assert torch.equal(cache.values.flatten(0, 1)[slots], self.v[index][: part.stop])
        return list(out.split([part.stop - part.start for part in parts]))

    def batch(self, parts: list[slice]) -> StepBatch:
        lengths = [part.stop - part.start for part in parts]
        tables = torch.zeros(len(parts), max(map(len, self.blocks)), dtype=torch.int32)
        for index, blocks in enumerate(self.blocks):
            tables[index, : len(blocks)] = blocks
        return StepBatch(
            token_ids=torch.zeros(sum(lengths), dtype=torch.int64),
            positions=torch.cat([torch.arange(part.start, part.stop) for part in parts]),
            slot_mapping=torch.cat([self.slots(i)[part] for i, part in enumerate(parts)]),
            query_start=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
            context_lens=torch.tensor([part.stop for part in parts], dtype=torch.int32),
            block_tables=tables,
            logits_rows=torch.zeros(0, dtype=torch.int64),
            max_query_len=max(lengths),
            max_context_len=max(part.stop for part in parts),
        )

    def exact(self) -> list[torch.Tensor]:
        results = []
        for (new, context), q, k, v in zip(self.sequences, self.q, self.k, self.v, strict=True):
            group = self.q_heads // self.kv_heads
            wide_k, wide_v = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[context - new :].double(), wide_k) * self.dim**-0.5
            rows, cols = torch.arange(context - new, context)[:, None], torch.arange(context)
            hidden = (cols > rows) | (cols <= rows - (self.window or context))
            weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
            results.append(torch.einsum("hqk,khd->qhd", weights, wide_v))
        return results

    def check(self, attention: Attention) -> None:
        for actual, exact in zip(self.run(attention), self.exact(), strict=True):
            assert (actual - exact).abs().max() < ABSOLUTE


@pytest.fixture(params=[*MARCHES, "torch"])
def attention(request: pytest.FixtureRequest) -> Attention:
    return TorchAttention() if request.param == "torch" else NativeAttention(kernels(request.param))


@pytest.fixture(params=MARCHES)
def native(request: pytest.FixtureRequest) -> NativeAttention:
    return NativeAttention(kernels(request.param))


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


sequences = st.integers(1, 400).flatmap(lambda c: st.tuples(st.integers(1, c) | st.just(1), st.just(c)))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(sequences, min_size=1, max_size=5),
    heads=st.sampled_from([(9, 3), (4, 4), (8, 1), (6, 2), (1, 1), (40, 1)]),
    dim=st.sampled_from([32, 64, 80, 96, 128, 20, 6]),
    block_size=st.sampled_from([16, 1, 7, 32]),
    window=st.none() | st.integers(1, 300),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("march", MARCHES)
def test_native_matches_float64(
    march: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    window: int | None,
    threads: int,
    seed: int,
) -> None:
    torch.set_num_threads(threads)
    Case(lengths, *heads, dim, block_size, window, seed).check(NativeAttention(kernels(march)))


@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(16, 16)],
        [(1, 64), (1, 65), (1, 63)],
        [(1, 256), (1, 257)],
        [(1, 1500)],  # few sequences: split over the context
        [(130, 130), (1, 700), (33, 300)],
        [(700, 700)],
    ],
)
@pytest.mark.parametrize("window", [None, 1, 100])
def test_every_backend_matches_float64_at_tile_borders(
    attention: Attention, lengths: list[tuple[int, int]], window: int | None
) -> None:
    Case(lengths, window=window).check(attention)


def test_long_prompt_of_thousands_of_tokens(native: NativeAttention) -> None:
    Case([(3000, 3000)], q_heads=2, kv_heads=1).check(native)


@pytest.mark.parametrize("window", [None, 70])
def test_a_token_is_the_same_bits_decoded_prefilled_or_batched(native: NativeAttention, window: int | None) -> None:
    """Prefix cache, chunking, preemption and batching must not change a greedy choice, not even between near ties."""
    case = Case([(600, 600), (1, 900)], window=window)
    torch.set_num_threads(2)
    whole = case.run(native)[0]
    torch.set_num_threads(1)
    alone = Case([(600, 600)], window=window)
    alone.q, alone.k, alone.v = ([tensors[0]] for tensors in (case.q, case.k, case.v))
    for start, stop in ((0, 1), (0, 255), (255, 257), (257, 258), (300, 600), (599, 600)):
        assert torch.equal(alone.run(native, [slice(start, stop)])[0], whole[start:stop])


def test_large_scores_do_not_overflow(attention: Attention) -> None:
    case = Case([(5, 200)])
    case.q = [q * 50 for q in case.q]
    for actual, exact in zip(case.run(attention), case.exact(), strict=True):
        assert (actual - exact).abs().max() < 2e-3  # scores of 400 have float32 steps of 3e-5, an exponent's error


def test_the_same_object_serves_models_of_different_shape(native: NativeAttention) -> None:
    for case in (Case([(3, 40)]), Case([(3, 40)], dim=32, window=8), Case([(1, 9), (2, 2)], q_heads=4, kv_heads=1)):
        case.check(native)


def test_native_refuses_a_cache_it_cannot_address(native: NativeAttention) -> None:
    case = Case([(1, 4)])
    cache = LayerCache(torch.zeros(3, 16, 2, 64).half(), torch.zeros(3, 16, 2, 64).half())
    q, k = torch.zeros(1, 6, 64), torch.zeros(1, 2, 64)
    with pytest.raises(AssertionError, match="float32"):
        native(q, k, k, cache, case.batch([slice(3, 4)]), scale=1.0, window=None)


def test_choice_by_name() -> None:
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.float32, 64).name == "native"
    assert choose_attention("auto", cpu, torch.bfloat16, 64).name == "torch"
    assert choose_attention("torch", cpu, torch.float32, 64).name == "torch"
    with pytest.raises(ConfigError, match="unknown name"):
        choose_attention("flashier", cpu, torch.float32, 64)
