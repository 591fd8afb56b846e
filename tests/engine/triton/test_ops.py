"""Norms, rotary embeddings and SiLU · up against torch's; rotary and the cache's write in one against both in turn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.kv_format import LayerCache, choose_kv_format
from replicas.engine.ops import TorchOps
from replicas.engine.triton.cache import rope_and_write
from replicas.engine.triton.ops import TritonOps

OPS, TORCH = TritonOps(torch.device("cpu"), torch.float32), TorchOps()
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# One rounding of the type: sums may be taken in another order.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    rounding = ROUNDING[expected.dtype]
    assert actual.dtype is expected.dtype
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2 * rounding, atol=rounding / 8)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 40), width=st.integers(1, 300) | st.just(1100), dtype=DTYPES, seed=st.integers(0, 9))
def test_norms(rows: int, width: int, dtype: torch.dtype, seed: int) -> None:
    x, residual, weight = (random(*shape, dtype=dtype, seed=seed) for shape in ((rows, width), (rows, width), (width,)))
    assert_close(OPS.rms_norm(x, weight, 1e-5), TORCH.rms_norm(x, weight, 1e-5))
    expected = TORCH.add_rms_norm(x, residual, weight, 1e-5)
    for actual, wanted in zip(OPS.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5), expected, strict=True):
        assert_close(actual, wanted)


def test_norm_of_heads_keeps_its_shape() -> None:
    x, weight = random(5, 3, 64), random(64)
    assert_close(OPS.rms_norm(x, weight, 1e-6), TORCH.rms_norm(x, weight, 1e-6))


@settings(max_examples=12, deadline=None)
@given(tokens=st.integers(0, 4), width=st.integers(1, 1300), dtype=DTYPES)
def test_silu_mul(tokens: int, width: int, dtype: torch.dtype) -> None:
    gate_up = random(tokens, 2 * width, dtype=dtype)
    assert_close(OPS.silu_mul(gate_up), TORCH.silu_mul(gate_up))


@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(1, 4),
    heads=st.sampled_from([(3, 1), (6, 2), (9, 3)]),
    dim=st.sampled_from([64, 80, 6, 128]),
    dtype=DTYPES,
    kv=st.sampled_from(["auto", "int8", "fp8_e4m3", "fp8_e4m3_head"]),
)
def test_rope_alone_and_with_the_caches_write(
    tokens: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, kv: str
) -> None:
    widths = [n * dim for n in (heads[0], heads[1], heads[1])]
    fused = random(tokens, sum(widths), dtype=dtype)
    q, k, v = (part.unflatten(1, (-1, dim)) for part in fused.split(widths, dim=1))  # strided views
    cos_sin = torch.cat([random(9, dim // 2, seed=1), random(9, dim // 2, seed=2)], dim=1)
    positions = torch.tensor([0, 8, 3, 3])[:tokens]
    want_q, want_k = TORCH.rope(q, k, cos_sin, positions)
    kept_q, kept_k = q.clone(), k.clone()
    kv_format = choose_kv_format(kv, dtype)
    mine, wanted = (_empty_cache(heads[1], dim, dtype, kv) for _ in range(2))
    slots = torch.tensor([7, 0, 17, 31])[:tokens]
    wanted.write(slots, want_k, v)
    rope_and_write(q, k, v, cos_sin, positions, slots, mine)
    assert_close(q, want_q)
    if not kv_format.scaled:
        assert_close(mine.keys, wanted.keys)
        assert torch.equal(mine.values, wanted.values)
    else:
        assert torch.equal(mine.values, wanted.values)
        for name in ("keys", "values"):
            step = getattr(wanted, name.removesuffix("s") + "_scales").max() * (1 if kv == "int8" else 32)
            got, want = (read(cache, name) for cache in (mine, wanted))
            assert (got - want).abs().max() <= 1.01 * step, "more than one step of the grid away"
    alone_q, alone_k = OPS.rope(kept_q, kept_k, cos_sin, positions)
    assert_close(alone_q, want_q)
    assert_close(alone_k, want_k)


def read(cache: LayerCache, name: str) -> torch.Tensor:
    assert cache.format is not None
    return cache.format.decode(getattr(cache, name), getattr(cache, name.removesuffix("s") + "_scales"))


def _empty_cache(kv_heads: int, dim: int, dtype: torch.dtype, kv: str) -> LayerCache:
    kv_format, shape = choose_kv_format(kv, dtype), (2, 16, kv_heads)
    if not kv_format.scaled:
        return LayerCache(torch.zeros(*shape, dim, dtype=dtype), torch.zeros(*shape, dim, dtype=dtype))
    codes = [torch.zeros(*shape, dim, dtype=torch.int8) for _ in range(2)]
    scales = [torch.ones(shape) for _ in range(2)]
    if kv_format.per_head:
        scales = [torch.full((kv_heads,), 0.01).expand(shape) for _ in range(2)]
    return LayerCache(codes[0], codes[1], kv_format, scales[0], scales[1])


def test_contiguity_is_asked_for() -> None:
    wide = random(4, 20)
    with pytest.raises(AssertionError, match="contiguous"):
        OPS.silu_mul(wide[:, ::2])
