"""Keys and values in 8 bits: the rounding to the bit, both attentions on it, and whole engines against the oracle."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine import Engine, SamplingParams
from replicas.engine.attention import Attention, LayerCache, TorchAttention
from replicas.engine.batch import StepBatch
from replicas.engine.bench import held_by
from replicas.engine.evaluation import agreement
from replicas.engine.kv_format import KVFormat, allocate_kv, choose_kv_format
from replicas.engine.native.paged import NativeAttention
from replicas.engine.offline import collect
from replicas.engine.reference import Reference
from replicas.protocol import ConfigError
from tests.engine.conftest import MakeEngine
from tests.engine.native_builds import kernels, needs_compiler

NAMES = ("int8", "fp8_e4m3")
HEAD = "fp8_e4m3_head"
E4M3 = np.array([m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1])


def eight_bits(name: str) -> KVFormat:
    return choose_kv_format(name, torch.float32)


def vectors(dim: int, seed: int = 0) -> torch.Tensor:
    """[40, 2, dim] of all magnitudes, with zeros, ties, an outlier and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 2, dim, generator=generator) * torch.logspace(-30, 30, 40).view(-1, 1, 1)
    x[0] = 0
    x[1, :, 0] = 1e5
    x[2] = 1e-42
    x[3] = torch.arange(dim) + 0.5
    x[3, :, 0] = 127
    x[4] = (torch.arange(dim) % 30) * 2.0**-10
    x[4, :, 0] = 448
    return x


@pytest.mark.parametrize("name", NAMES)
def test_every_number_becomes_the_nearest_of_the_grid(name: str) -> None:
    """Against a search of the whole grid in float64; of two as near, the one with the even code."""
    x = vectors(64)[3:30:4]
    kv = eight_bits(name)
    codes, scales = kv.encode(x)
    grid = np.arange(128.0) if name == "int8" else E4M3
    wanted = np.abs((x / scales.unsqueeze(-1)).numpy().astype(np.float64))
    distance = np.abs(wanted[..., None] - grid)
    nearest = distance.argmin(-1)
    tied = np.take_along_axis(distance, np.minimum(nearest + 1, len(grid) - 1)[..., None], -1)[..., 0]
    nearest += (tied == distance.min(-1)) & (nearest % 2 == 1) & (nearest + 1 < len(grid))
    sign = np.where(x.numpy() < 0, -1.0, 1.0)
    back = kv.decode(codes, scales)
    assert np.array_equal(back.numpy(), (sign * grid[nearest]).astype(np.float32) * scales.unsqueeze(-1).numpy())
    assert torch.equal(kv.decode(*kv.encode(back)), back) or name == "fp8_e4m3"


@pytest.mark.parametrize("name", NAMES)
def test_no_vector_becomes_nan_and_zeros_stay_zeros(name: str) -> None:
    kv = eight_bits(name)
    back = kv.decode(*kv.encode(vectors(16)))
    assert back.isfinite().all()
    assert not back[0].any()


@settings(max_examples=25, deadline=None)
@given(exponents=st.lists(st.integers(-40, 40), min_size=2, max_size=2), seed=st.integers(0, 99))
def test_given_scales_round_to_the_nearest_and_numbers_beyond_them_saturate(exponents: list[int], seed: int) -> None:
    kv, x = eight_bits(HEAD), vectors(32, seed)
    scales = torch.tensor([1.3 * 2.0**exponent for exponent in exponents])
    codes, same = kv.encode(x, scales)
    assert same is scales
    back = kv.decode(codes, scales).double().numpy()
    quotients = (x / scales.view(2, 1)).double().numpy().clip(-448, 448)
    distance = np.abs(np.abs(quotients)[..., None] - E4M3).min(-1)
    units = back / scales.view(2, 1).double().numpy()
    np.testing.assert_allclose(np.abs(units - quotients), distance, atol=1e-4, rtol=1e-6)
    assert (np.sign(units) * np.sign(quotients) >= 0).all()


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 30), block_size=st.sampled_from([1, 4, 16]), seed=st.integers(0, 99))
def test_a_cache_with_a_scale_a_head_gives_back_what_was_written(tokens: int, block_size: int, seed: int) -> None:
    kv, generator = eight_bits(HEAD), torch.Generator().manual_seed(seed)
    scales = torch.rand(3, 2, 2, generator=generator) / 100 + 1e-4
    shape = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 8}
    made = allocate_kv(31 // block_size + 2, block_size, **shape, kv=kv, device=torch.device("cpu"), scales=scales)
    [data] = made.tensors
    assert data is made.data, "copies of blocks carry nothing but codes"
    k, v = torch.randn(2, tokens, 2, 8, generator=generator)
    blocks = torch.randperm(31 // block_size + 2, generator=generator)
    places = torch.arange(tokens)
    for layer, cache in enumerate(made.layers):
        cache.write(blocks[places // block_size] * block_size + places % block_size, k, v)
        read_k, read_v = cache.read(blocks[: -(-tokens // block_size)], tokens, torch.float32)
        assert torch.equal(read_k, kv.decode(*kv.encode(k, scales[layer, 0])))
        assert torch.equal(read_v, kv.decode(*kv.encode(v, scales[layer, 1])))


# ---------------------------------------------------------------- attention


def step(sequences: list[tuple[int, int]], block_size: int) -> StepBatch:
    """(new tokens, context length) each; blocks in order."""
    counts = [-(-context // block_size) for _, context in sequences]
    tables = torch.zeros(len(sequences), max(counts), dtype=torch.int32)
    slots, first = [], 0
    for i, (new, context) in enumerate(sequences):
        tables[i, : counts[i]] = torch.arange(first, first + counts[i])
        slots.append(first * block_size + torch.arange(context - new, context))
        first += counts[i]
    news = torch.tensor([0, *(new for new, _ in sequences)])
    return StepBatch(
        token_ids=torch.zeros(int(news.sum()), dtype=torch.int64),
        positions=torch.cat([torch.arange(context - new, context) for new, context in sequences]),
        slot_mapping=torch.cat(slots),
        query_start=news.cumsum(0).to(torch.int32),
        context_lens=torch.tensor([context for _, context in sequences], dtype=torch.int32),
        block_tables=tables,
        logits_rows=torch.arange(1),
        max_query_len=max(new for new, _ in sequences),
        max_context_len=max(context for _, context in sequences),
    )


def attend(
    attention: Attention, name: str, sequences: list[tuple[int, int]], dim: int, window: int | None = None
) -> tuple[torch.Tensor, LayerCache]:
    """The contexts are written first, by the same attention, in one step."""
    kv_heads, size = 2, 16
    [cache] = allocate_kv(
        sum(-(-c // size) for _, c in sequences) + 1,
        size,
        num_layers=1,
        num_kv_heads=kv_heads,
        head_dim=dim,
        kv=eight_bits(name),
        device=torch.device("cpu"),
    ).layers
    parts = []
    for i, (_, context) in enumerate(sequences):  # each with numbers of its own, whatever is beside it
        generator = torch.Generator().manual_seed(i)
        parts.append([torch.randn(context, heads, dim, generator=generator) for heads in (6, kv_heads, kv_heads)])
    q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
    whole = step([(context, context) for _, context in sequences], size)
    attention(q, k, v, cache, whole, scale=dim**-0.5, window=window)
    ends = np.cumsum([context for _, context in sequences])
    rows = torch.cat([torch.arange(end - new, end) for (new, _), end in zip(sequences, ends, strict=True)])
    out = attention(q[rows], k[rows], v[rows], cache, step(sequences, size), scale=dim**-0.5, window=window)
    return out, cache


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dim", "window"), [(64, None), (20, None), (64, 100)])
def test_the_kernels_write_the_same_bits_and_attend_to_the_same_numbers(
    name: str, dim: int, window: int | None
) -> None:
    sequences = [(1, 300), (70, 70), (5, 33), (1, 1)]
    plain, expected = attend(TorchAttention(), name, sequences, dim, window)
    fast, cache = attend(NativeAttention(kernels("native")), name, sequences, dim, window)
    for mine, theirs in zip(
        (cache.keys, cache.values, cache.key_scales, cache.value_scales),
        (expected.keys, expected.values, expected.key_scales, expected.value_scales),
        strict=True,
    ):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(fast, plain, atol=5e-6, rtol=1e-5)


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_round_extremes_as_torch_does(name: str) -> None:
    x = vectors(24)
    caches = []
    for attention in (TorchAttention(), NativeAttention(kernels("native"))):
        [cache] = allocate_kv(
            3, 16, num_layers=1, num_kv_heads=2, head_dim=24, kv=eight_bits(name), device=torch.device("cpu")
        ).layers
        attention(torch.zeros(40, 2, 24), x, x.flip(0), cache, step([(40, 40)], 16), scale=1.0, window=None)
        caches.append(cache)
    ours, theirs = caches
    assert ours.key_scales is not None
    assert theirs.key_scales is not None
    assert torch.equal(ours.key_scales, theirs.key_scales)
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)


@needs_compiler
@pytest.mark.parametrize("name", NAMES)
def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    attention = NativeAttention(kernels("native"))
    together, _ = attend(attention, name, [(1, 600), (40, 90)], 64)
    alone, _ = attend(attention, name, [(1, 600)], 64)
    assert torch.equal(together[0], alone[0])


# ---------------------------------------------------------------- engines


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    shared = [rng.randrange(256) for _ in range(20)]
    return [
        shared[: rng.choice([0, 8, 20])] + [rng.randrange(256) for _ in range(rng.randint(1, 40))] for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, "torch") for name in (*NAMES, HEAD)),
        *(pytest.param(name, "native", marks=needs_compiler) for name in NAMES),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"num_blocks": 24, "max_model_len": 90, "max_num_seqs": 8, "watermark": 0.0},
        {"enable_prefix_caching": False},
    ],
    ids=["batched", "chunked", "preempted", "uncached"],
)
def test_greedy_output_is_that_of_a_reference_that_rounds_its_cache(
    make_engine: MakeEngine, tiny_model: Path, name: str, changes: dict[str, int], attention: str
) -> None:
    engine: Engine = make_engine(kv_cache_dtype=name, attention=attention, **changes)
    reference = Reference.load(tiny_model, eight_bits(name), engine.loaded.kv_scales)
    asked = prompts(8)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    for _ in range(2):  # the second time from the cache
        answers = [list(one.outputs[0].token_ids) for one in collect(engine, asked, params)]
        assert answers == [reference.generate(prompt, 12, ignore_eos=True) for prompt in asked]
    stats = engine.stats()
    assert (stats.num_preemptions > 0) == ("num_blocks" in changes)
    assert (stats.prefix_cache_hits > 0) == ("enable_prefix_caching" not in changes)


def test_eight_bits_hold_more_blocks_in_the_same_memory(make_engine: MakeEngine) -> None:
    plain, small = (
        make_engine(kv_cache_dtype=name, num_blocks=None, kv_memory_gib=0.001, max_num_seqs=1000)
        for name in ("auto", "int8")
    )
    assert small.pool.num_blocks == pytest.approx(plain.pool.num_blocks * 4 * 12 / (12 + 4), rel=0.01)


def test_a_scale_a_head_holds_exactly_twice_the_tokens_of_16_bits(make_engine: MakeEngine) -> None:
    wanted = {"dtype": "bfloat16", "num_blocks": None, "max_num_seqs": 1000}
    bytes_of_100 = 100 * 4 * 2 * 2 * 2 * 12 * 2  # blocks of 4 tokens, layers, keys and values, KV heads, head size
    plain, small = (
        make_engine(kv_cache_dtype=name, kv_memory_gib=bytes_of_100 / 2**30, **wanted) for name in ("auto", HEAD)
    )
    assert (plain.pool.num_blocks, small.pool.num_blocks) == (100, 200)
    assert held_by(small.loaded).kv_bytes * 2 == held_by(plain.loaded).kv_bytes


def test_a_scale_a_head_stays_near_the_unrounded_model(make_engine: MakeEngine, oracle: Reference) -> None:
    """About as near as a scale a token does: both round to 3 bits of mantissa."""
    asked = prompts(24)
    texts = [([*prompt, *oracle.generate(prompt, 16, ignore_eos=True)], len(prompt)) for prompt in asked]
    same, judged = agreement(make_engine(kv_cache_dtype=HEAD).loaded, texts)
    by_token, _ = agreement(make_engine(kv_cache_dtype="fp8_e4m3").loaded, texts)
    assert same > 0.7 * judged
    assert same > by_token - 0.12 * judged


def test_the_kernels_of_a_cpu_refuse_a_scale_a_head_by_name(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"'native' cannot be used here: .*kv_cache_dtype fp8_e4m3_head has none"):
        make_engine(kv_cache_dtype=HEAD, attention="native", dtype="float32")
    assert make_engine(kv_cache_dtype=HEAD).loaded.attention == "torch"


def test_formats_do_not_share_prefixes_and_unknown_ones_are_refused_by_name(make_engine: MakeEngine) -> None:
    assert make_engine(kv_cache_dtype="int8").card.kv_format == "int8"
    assert make_engine(kv_cache_dtype=HEAD).card.kv_format == HEAD
    with pytest.raises(ConfigError, match="int4"):
        make_engine(kv_cache_dtype="int4")
