"""Both attention kernels, and the cache's write, against torch in float64: shapes, pages, formats, windows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.attention import TorchAttention
from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import KVFormat, LayerCache, choose_kv_format
from replicas.engine.triton import attention as launch
from replicas.engine.triton import attention_sizes
from replicas.engine.triton.attention import DECODE, PREFILL, TritonAttention, num_splits
from replicas.engine.triton.cache import write_cache
from replicas.engine.triton.kernels.attention import _spread_fp8
from tests.engine.triton.ptx import run_ptx

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
CPU = torch.device("cpu")


@dataclass
class Case:
    """Sequences (new tokens, context length) with normal q, k, v in shuffled pages; memory never written is NaN."""

    sequences: list[tuple[int, int]]
    q_heads: int = 6
    kv_heads: int = 2
    dim: int = 32
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    kv: str = "auto"
    seed: int = 0
    decode: str = ""
    prefill: str = ""
    format: KVFormat = field(init=False)

    def __post_init__(self) -> None:
        self.format = choose_kv_format(self.kv, self.dtype)
        generator = torch.Generator().manual_seed(self.seed)
        counts = [-(-context // self.block_size) for _, context in self.sequences]
        order = torch.randperm(sum(counts) + 2, generator=generator)
        self.num_blocks = len(order)
        self.tables = torch.zeros(len(counts), max(counts) + 1, dtype=torch.int32)
        for row, blocks in zip(self.tables, order[: sum(counts)].split(counts), strict=True):
            row[: len(blocks)] = blocks
        total = sum(new for new, _ in self.sequences)
        widths = [heads * self.dim for heads in (self.q_heads, self.kv_heads, self.kv_heads)]
        fused = torch.randn(total, sum(widths), generator=generator).to(self.dtype)
        self.q, self.k, self.v = (part.unflatten(1, (-1, self.dim)) for part in fused.split(widths, dim=1))
        self.past = [
            torch.randn(2, context - new, self.kv_heads, self.dim, generator=generator).to(self.dtype)
            for new, context in self.sequences
        ]

    def slots(self, index: int) -> torch.Tensor:
        positions = torch.arange(self.sequences[index][1])
        return self.tables[index][positions // self.block_size].long() * self.block_size + positions % self.block_size

    def batch(self) -> StepBatch:
        news, contexts = zip(*self.sequences, strict=True)
        return StepBatch(
            token_ids=torch.zeros(sum(news), dtype=torch.int64),
            positions=torch.cat([torch.arange(context - new, context) for new, context in self.sequences]),
            slot_mapping=torch.cat([self.slots(i)[context - new :] for i, (new, context) in enumerate(self.sequences)]),
            query_start=torch.tensor([0, *news]).cumsum(0).to(torch.int32),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_tables=self.tables,
            logits_rows=torch.zeros(0, dtype=torch.int64),
            max_query_len=max(news),
            max_context_len=max(contexts),
        )

    def cache(self) -> LayerCache:
        """With every sequence's past in it."""
        shape = (self.num_blocks, self.block_size, self.kv_heads)
        if self.format.per_head:  # some scales are so small that numbers saturate
            codes = [torch.full((*shape, self.dim), 127, dtype=torch.int8) for _ in range(2)]
            fixed = torch.rand(2, self.kv_heads, generator=torch.Generator().manual_seed(self.seed)) * 0.02 + 0.002
            cache = LayerCache(codes[0], codes[1], self.format, *(each.expand(shape) for each in fixed))
        elif self.format.scaled:
            codes = [torch.full((*shape, self.dim), 127, dtype=torch.int8) for _ in range(2)]
            scales = [torch.full(shape, math.nan) for _ in range(2)]
            cache = LayerCache(codes[0], codes[1], self.format, scales[0], scales[1])
        else:
            keys, values = (torch.full((*shape, self.dim), math.nan, dtype=self.dtype) for _ in range(2))
            cache = LayerCache(keys, values)
        for index, past in enumerate(self.past):
            cache.write(self.slots(index)[: past.shape[1]], past[0], past[1])
        return cache

    def exact(self, cache: LayerCache) -> torch.Tensor:
        """Attention in float64 over what is stored."""
        keys, values = cache.keys.double(), cache.values.double()
        if cache.key_scales is not None and cache.value_scales is not None:
            keys = self.format.decode(cache.keys, cache.key_scales).double()
            values = self.format.decode(cache.values, cache.value_scales).double()
        batch = self.batch()
        cache = LayerCache(keys, values)
        new_k, new_v = (keys.flatten(0, 1)[batch.slot_mapping], values.flatten(0, 1)[batch.slot_mapping])
        return TorchAttention()(self.q.double(), new_k, new_v, cache, batch, scale=self.dim**-0.5, window=self.window)

    def check(self) -> None:
        cache, wanted = self.cache(), self.cache()
        batch = self.batch()
        attention = TritonAttention(CPU, self.decode, self.prefill)
        out = attention(self.q, self.k, self.v, cache, batch, scale=self.dim**-0.5, window=self.window)
        wanted.write(batch.slot_mapping, self.k, self.v)
        for actual, expected in ((cache.keys, wanted.keys), (cache.values, wanted.values)):
            assert torch.equal(actual.nan_to_num(), expected.nan_to_num()), "what is written are other bits"
        if cache.key_scales is not None and wanted.key_scales is not None:
            assert torch.equal(cache.key_scales.nan_to_num(), wanted.key_scales.nan_to_num())
        error = (out.double() - self.exact(cache)).abs().max().item()
        assert error < TOLERANCE[self.dtype], f"error {error:.2g}"


sequences = st.integers(1, 70).flatmap(
    lambda c: st.tuples(st.integers(1, min(c, 40)) | st.integers(1, min(c, 5)), st.just(c))
)
formats = st.sampled_from(["auto", "auto", "int8", "fp8_e4m3", "fp8_e4m3_head", "fp8_e4m3_head"])
dtypes = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=10, deadline=None)
@given(
    lengths=st.lists(sequences, min_size=1, max_size=3),
    heads=st.sampled_from([(6, 2), (9, 3), (4, 4), (8, 1), (1, 1), (10, 2)]),
    dim=st.sampled_from([16, 32, 64, 80, 20, 6]),
    block_size=st.sampled_from([16, 16, 1, 4, 32]),
    window=st.none() | st.integers(1, 70),
    dtype=dtypes,
    kv=formats,
    seed=st.integers(0, 99),
)
def test_any_batch_matches_float64(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    block_size: int,
    window: int | None,
    dtype: torch.dtype,
    kv: str,
    seed: int,
) -> None:
    Case(lengths, *heads, dim, block_size, window, dtype, kv, seed).check()


@settings(max_examples=6, deadline=None)
@given(
    contexts=st.lists(st.integers(6, 200), min_size=1, max_size=3),
    tokens=st.integers(1, 6),
    heads=st.sampled_from([(6, 2), (3, 1), (8, 1)]),
    window=st.none() | st.integers(1, 200),
    kv=formats,
    seed=st.integers(0, 99),
)
def test_decodes_and_drafts_to_verify_match_float64_whatever_the_splits(
    contexts: list[int], tokens: int, heads: tuple[int, int], window: int | None, kv: str, seed: int
) -> None:
    Case([(tokens, context) for context in contexts], *heads, 32, 16, window, torch.float32, kv, seed).check()


@pytest.mark.parametrize("lengths", [[(1, 1)], [(1, 64), (1, 65)], [(33, 33), (1, 128)], [(32, 64)]])
@pytest.mark.parametrize("window", [None, 1, 33])
def test_tile_borders(lengths: list[tuple[int, int]], window: int | None) -> None:
    Case(lengths, window=window).check()


def test_the_split_kernels_grid_does_not_know_lengths() -> None:
    """A captured graph must stay right while contexts grow: only shapes may enter a launch."""
    assert num_splits(1 * 8, 132, 512) == num_splits(1 * 8, 132, 512)
    assert [num_splits(programs, 132, 512) for programs in (1, 8, 64, 132, 264, 2048)] == [64, 32, 4, 2, 1, 1]
    assert num_splits(1, 132, 3) == 2


def test_a_padding_row_with_an_empty_context_is_zero_and_disturbs_nobody() -> None:
    """Rows that fill a graph's bucket have no tokens of their own."""
    case = Case([(1, 40), (1, 1)])
    cache, batch = case.cache(), case.batch()
    cache.write(batch.slot_mapping, case.k, case.v)
    batch.context_lens[1] = 0
    out = TritonAttention(CPU).attend(case.q, cache, batch, scale=1.0, window=None)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert torch.isfinite(out[0]).all()


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3"])
def test_codes_and_scales_are_the_formats_own(name: str) -> None:
    """Bit for bit, over all magnitudes: denormals, ties, zeros and the largest numbers."""
    kv = choose_kv_format(name, torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, 32, generator=generator) * 10.0 ** torch.randint(-9, 5, (40, 3, 32), generator=generator)
    x[0], x[1], x[2, :, 1:] = 0.0, 1e-40, 0.0
    x[3] = torch.arange(96).view(3, 32) * 4.6875  # ties of either grid
    shape = (4, 16, 3)
    mine, wanted = (
        LayerCache(
            *(torch.zeros(*shape, 32, dtype=torch.int8) for _ in range(2)), kv, *(torch.zeros(shape) for _ in range(2))
        )
        for _ in range(2)
    )
    slots = torch.randperm(64, generator=generator)[:40]
    write_cache(mine, slots, x, -x)
    wanted.write(slots, x, -x)
    for field_name in ("keys", "values", "key_scales", "value_scales"):
        assert torch.equal(getattr(mine, field_name), getattr(wanted, field_name)), field_name


def test_given_scales_are_used_and_left_as_they_are() -> None:
    """Bit for bit, as the format rounds, beyond the range of the scales and far below it."""
    kv = choose_kv_format("fp8_e4m3_head", torch.float32)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, 32, generator=generator) * 10.0 ** torch.randint(-9, 5, (40, 3, 32), generator=generator)
    x[0], x[1] = 0.0, 1e-40
    x[2] = torch.arange(96).view(3, 32) * 0.046875
    scales = torch.tensor([[1e-3, 0.01, 7.0], [2.0**-10, 1.0, 1e-30]])
    mine, wanted = (
        LayerCache(
            *(torch.zeros(4, 16, 3, 32, dtype=torch.int8) for _ in range(2)),
            kv,
            *(each.clone().expand(4, 16, 3) for each in scales),
        )
        for _ in range(2)
    )
    slots = torch.randperm(64, generator=generator)[:40]
    write_cache(mine, slots, x, -x)
    wanted.write(slots, x, -x)
    assert torch.equal(mine.keys, wanted.keys)
    assert torch.equal(mine.values, wanted.values)
    assert torch.equal(mine.key_scales, scales[0].expand(4, 16, 3))  # type: ignore[arg-type]
    assert (mine.keys.view(torch.float8_e4m3fn).float().abs() == 448).any(), "nothing saturated"


def test_a_block_size_that_is_no_power_of_two_is_an_obstacle() -> None:
    assert launch.obstacle(16) == ""
    assert "power of two, got 24" in launch.obstacle(24)


@pytest.mark.parametrize("size", [*DECODE, *PREFILL])
@pytest.mark.parametrize("kv", ["auto", "fp8_e4m3"])
def test_no_size_of_a_kernels_parts_changes_what_it_computes(size: str, kv: str) -> None:
    sequences = [(1, 70), (1, 133), (2, 9)] if size in DECODE else [(40, 70), (1, 30)]
    kind = "decode" if size in DECODE else "prefill"
    Case(sequences, dtype=torch.float16, kv=kv, **{kind: size}).check()


class Taking:
    """In place of measured times: what is asked for, and the last of what could be had."""

    def __init__(self) -> None:
        self.asked: dict[str, list[str]] = {}

    def choose(
        self, key: str, candidates: Callable[[int], list[str]], run: Callable[..., Any], buckets: tuple[int, ...]
    ) -> dict[int, str]:
        self.asked[key] = candidates(1)
        run(candidates(1)[0], 1)()  # what would be timed can be called
        return {1: candidates(1)[-1]}


def test_sizes_are_measured_for_a_models_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_sizes, "_DECODES", ((1, 20),) * 2)
    monkeypatch.setattr(attention_sizes, "_PROMPTS", ((30, 30),))
    taking: Any = Taking()
    kv = choose_kv_format("fp8_e4m3", torch.float16)
    made = attention_sizes.measured_attention(CPU, torch.float16, (4, 2), 32, kv, 16, taking)
    assert made._decode_size.name == list(DECODE)[-1]
    assert made._prefill_size.name == list(PREFILL)[-1]
    told = "float16, 4 and 2 heads of 32, cache fp8_e4m3, pages of 16"
    assert taking.asked == {
        f"cpu, decode, {told}": list(DECODE),
        f"cpu, prefill, {told}": [n for n in PREFILL if "x128w" not in n],
    }
    attention_sizes.measured_attention(CPU, torch.float32, (4, 2), 32, None, 16, taking)
    assert len(taking.asked) == 2, "there is one size for float32"


@settings(max_examples=60, deadline=None)
@given(codes=st.lists(st.integers(0, 255).filter(lambda code: code & 127 != 127), min_size=4, max_size=4))
def test_the_instructions_for_fp8_codes_give_their_numbers(codes: list[int]) -> None:
    wanted = torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn).float() / 256
    word = sum(code << 8 * i for i, code in enumerate(codes))
    for shift, dtype, factor in ((4, torch.bfloat16, 2.0**112), (1, torch.float16, 1.0)):
        pairs = run_ptx(_spread_fp8(shift), word)
        bits = torch.tensor([part for pair in pairs for part in (pair & 0xFFFF, pair >> 16)], dtype=torch.int32)
        assert torch.equal(bits.to(torch.int16).view(dtype).float() * factor, wanted)
