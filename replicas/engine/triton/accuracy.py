"""Every kernel against float64 on fresh random inputs, on whatever device it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from replicas.engine.attention import Attention, TorchAttention
from replicas.engine.kv_format import LayerCache
from replicas.engine.ops import TorchOps
from replicas.engine.triton import linear as triton_linear
from replicas.engine.triton.attention import DECODE, PREFILL, TritonAttention
from replicas.engine.triton.cache import rope_and_write, write_cache
from replicas.engine.triton.cases import ATTENTION, LINEAR, AttentionCase, LinearCase
from replicas.engine.triton.noise import gumbel
from replicas.engine.triton.ops import TritonOps
from replicas.engine.triton.quant import VARIANTS, TritonQuantizedLinear
from replicas.engine.triton.sampling import Lots, draw_rest, listed_argmax, noisy_argmax, row_key

CHOICE = "choice of "
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True, slots=True)
class Measured:
    """error: the largest difference over the largest exact number. limit: what it may be."""

    name: str
    error: float
    limit: float

    @property
    def good(self) -> bool:
        return self.error <= self.limit  # and NaN is not


def relative(actual: Tensor, exact: Tensor) -> float:
    if not torch.isfinite(actual).all():
        return float("nan")
    return ((actual.double() - exact).abs().max() / exact.abs().max()).item()


def wide(cache: LayerCache) -> LayerCache:
    """The numbers that a cache stands for, in float64."""
    if cache.format is None or cache.key_scales is None or cache.value_scales is None:
        return LayerCache(cache.keys.double(), cache.values.double())
    decode = cache.format.decode
    return LayerCache(decode(cache.keys, cache.key_scales).double(), decode(cache.values, cache.value_scales).double())


def check_attention(case: AttentionCase, attention: Attention, device: torch.device, seed: int) -> Measured:
    q, k, v = case.make(device, seed)
    cache, batch, scale = case.cache(device, seed + 1), case.batch(device), case.dim**-0.5
    out = attention(q, k, v, cache, batch, scale=scale, window=case.window)
    exact_cache = wide(cache)
    new_k, new_v = (t.flatten(0, 1)[batch.slot_mapping] for t in (exact_cache.keys, exact_cache.values))
    exact = TorchAttention()(q.double(), new_k, new_v, exact_cache, batch, scale=scale, window=case.window)
    return Measured(f"{attention.name}: {case.name}", relative(out, exact), LIMITS[case.dtype])


def check_linear(case: LinearCase, kernel: str, rows: int, device: torch.device, seed: int) -> Measured:
    weight, x = case.weight(device, seed), case.inputs(rows, device, seed + 1)
    linear = TritonQuantizedLinear(weight, None, device, case.dtype)
    exact = x.double() @ weight.dequantise().double().T
    return Measured(f"{kernel}: {case.name}, {rows} rows", relative(linear.run(kernel, x), exact), LIMITS[case.dtype])


def check_single_rows(kernel: str, dtype: torch.dtype, device: torch.device, seed: int) -> Measured:
    generator = torch.Generator(device).manual_seed(seed)
    weight, x, bias = (
        torch.randn(*shape, generator=generator, device=device).to(dtype)
        for shape in ((1030, 4100), (3, 4100), (1030,))
    )
    out = triton_linear.TritonLinear(weight, bias).run(kernel, x)
    exact = x.double() @ weight.double().T + bias.double()
    return Measured(f"{kernel}, {str(dtype).removeprefix('torch.')}", relative(out, exact), LIMITS[dtype])


def check_small(dtype: torch.dtype, device: torch.device, seed: int) -> Iterator[Measured]:
    """Norms, rotary embeddings and SiLU · up against the reference in float64."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    ops, exact, limit = TritonOps(device, dtype), TorchOps(device), LIMITS[dtype]
    name = str(dtype).removeprefix("torch.")
    x, residual, weight, gate_up = normal(5, 576), normal(5, 576), normal(576), normal(5, 3072)
    q, k, cos_sin, positions = normal(5, 6, 64), normal(5, 2, 64), normal(9, 64).float(), torch.arange(5, device=device)
    want_norm = exact.rms_norm(x.double(), weight.double(), 1e-5)
    want_sum, want_residual = exact.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-5)
    want_q, want_k = exact.rope(q.double(), k.double(), cos_sin, positions)
    yield Measured(f"rms_norm, {name}", relative(ops.rms_norm(x, weight, 1e-5), want_norm), limit)
    yield Measured(f"silu_mul, {name}", relative(ops.silu_mul(gate_up), exact.silu_mul(gate_up.double())), limit)
    got_sum, got_residual = ops.add_rms_norm(x, residual, weight, 1e-5)
    yield Measured(f"add_rms_norm, {name}", relative(got_sum, want_sum), limit)
    yield Measured(f"sum of add_rms_norm, {name}", relative(got_residual, want_residual), limit)
    got_q, got_k = ops.rope(q.clone(), k.clone(), cos_sin, positions)
    yield Measured(f"rope of queries, {name}", relative(got_q, want_q), limit)
    yield Measured(f"rope of keys, {name}", relative(got_k, want_k), limit)
    for kv in ("auto", "int8", "fp8_e4m3", "fp8_e4m3_head"):
        yield from _check_cache(AttentionCase(name=kv, kv_heads=2, dim=64, dtype=dtype, kv=kv), q, k, cos_sin, device)


def _check_cache(
    case: AttentionCase, q: Tensor, k: Tensor, cos_sin: Tensor, device: torch.device
) -> Iterator[Measured]:
    name, slots = f"{case.kv}, {str(case.dtype).removeprefix('torch.')}", torch.arange(3, 3 + len(k), device=device)
    positions = torch.arange(len(k), device=device)
    mine, wanted = case.cache(device), case.cache(device)
    write_cache(mine, slots, k, k)
    wanted.write(slots, k, k)
    yield Measured(f"cache written, {name}", _unlike(mine, wanted), 0.0)
    turned = TorchOps(device).rope(q, k, cos_sin, positions)[1]
    mine, wanted = case.cache(device), case.cache(device)
    rope_and_write(q.clone(), k, k, cos_sin, positions, slots, mine)
    wanted.write(slots, turned, k)
    exact = wide(wanted).keys
    # One step of the grid, where rounding differs: at its coarsest an eighth of a number.
    step = {"auto": 1e-2, "int8": 1 / 100, "fp8_e4m3": 1 / 12, "fp8_e4m3_head": 1 / 7}[case.kv]
    yield Measured(f"cache written with rope, {name}", relative(wide(mine).keys, exact), step)


def _unlike(one: LayerCache, other: LayerCache) -> float:
    """Share of stored numbers that are not the same bits."""
    pairs = [(one.keys, other.keys), (one.values, other.values)]
    if one.key_scales is not None and other.key_scales is not None:
        pairs.append((one.key_scales, other.key_scales))
    return max((a != b).double().mean().item() for a, b in pairs)


def check_sampling(
    device: torch.device, seed: int, sizes: Sequence[tuple[int, int]] = ((5, 128256), (16, 50257), (3, 1000))
) -> Iterator[Measured]:
    """Tokens drawn against the greatest of the same noisy logits in float64: how much less those drawn had. It is 0
    for equal tokens; of two that nearly tie, rounding decides."""
    generator = torch.Generator(device).manual_seed(seed)
    for rows, width in sizes:
        logits = 5 * torch.randn(rows, width, generator=generator, device=device)
        ids = torch.rand(rows, width, generator=generator, device=device).argsort(dim=1)
        places = torch.arange(rows, device=device).flip(0)
        keys = torch.tensor([row_key(seed, row, width) for row in range(rows)], device=device)
        sharpness = torch.linspace(0, 2, rows, device=device)
        lots = Lots(places, keys, sharpness, torch.full_like(sharpness, -1.0))
        exact = logits[places].double().cpu().numpy()
        noisy = np.where(exact < -1, -np.inf, exact * lots.sharpness.double().cpu().numpy()[:, None])
        noisy += gumbel(keys.cpu().numpy(), np.arange(width))
        noisy[0] = exact[0]
        listed = logits.double().cpu().numpy() + gumbel(keys.cpu().numpy(), ids.cpu().numpy())
        for parts in (1, 7):
            out = torch.full((rows,), -1, device=device)
            noisy_argmax(logits, lots, out, parts)
            yield Measured(f"sampling, {rows} x {width}, {parts} parts", _short(noisy, out[places]), 1e-4)
            listed_argmax(logits, ids, keys, out, parts)
            at = (ids == out[:, None]).to(torch.uint8).argmax(dim=1)
            yield Measured(f"sampling of listed, {rows} x {width}, {parts} parts", _short(listed, at), 1e-4)
        yield Measured(f"sampling by thresholds, {width}", _short_by_thresholds(logits[:3], keys[:3]), 1e-4)


def _short_by_thresholds(logits: Tensor, keys: Tensor) -> float:
    """`_short` of draws from a third of the tokens, the likeliest, and of those from nine tenths of the mass."""
    rows, width = logits.shape
    most = max(width // 3, 1)
    limits = torch.tensor([1.0, 0.0, float(most), 0.9], device=logits.device).view(4, 1).expand(4, rows)
    drawn = torch.full((rows,), -1, device=logits.device)
    draw_rest(logits, limits, keys, torch.zeros(rows, device=logits.device), drawn)
    exact = logits.double().cpu().numpy()
    order = (-exact).argsort(axis=1)[:, :most]
    mass = np.exp(np.take_along_axis(exact - exact.max(axis=1, keepdims=True), order, axis=1))
    before = (mass.cumsum(axis=1) - mass) / mass.sum(axis=1, keepdims=True)
    noisy = np.full_like(exact, -np.inf)
    kept = np.take_along_axis(exact + gumbel(keys.cpu().numpy(), np.arange(width)), order, axis=1)
    np.put_along_axis(noisy, order, np.where(before < 0.9, kept, -np.inf), axis=1)
    return _short(noisy, drawn)


def _short(noisy: NDArray[np.float64], taken: Tensor) -> float:
    """How much the worst of the taken columns lacks of its row's greatest number."""
    return float((noisy.max(axis=1) - noisy[np.arange(len(noisy)), taken.cpu().numpy()]).max())


def checks(device: torch.device, seed: int) -> dict[str, list[Callable[[], list[Measured]]]]:
    """All checks by kind; each is to be called on its own, as any may fail. Of a kind that begins with CHOICE one is
    chosen by measuring, so a device may refuse the others."""

    def attention(case: AttentionCase) -> Callable[[], list[Measured]]:
        return lambda: [check_attention(case, TritonAttention(device), device, seed)]

    def sized(case: AttentionCase, kind: str, size: str) -> Callable[[], list[Measured]]:
        def check() -> list[Measured]:
            measured = check_attention(case, TritonAttention(device, **{kind: size}), device, seed)
            return [replace(measured, name=f"{measured.name}, {size}")]

        return check

    named = {case.name: case for case in ATTENTION}
    every_size = {
        f"{kind}{suffix}": [(named[f"llama-3-8b {kind}{suffix}"], kind, size) for size in sizes]
        for kind, sizes in (("decode", DECODE), ("prefill", PREFILL))
        for suffix in ("", " fp8")
    }

    def linear(case: LinearCase, kernel: str, rows: int) -> Callable[[], list[Measured]]:
        return lambda: [check_linear(case, kernel, rows, device, seed)]

    def single_rows(kernel: str, dtype: torch.dtype) -> Callable[[], list[Measured]]:
        return lambda: [check_single_rows(kernel, dtype, device, seed)]

    def small(dtype: torch.dtype) -> Callable[[], list[Measured]]:
        return lambda: [*check_small(dtype, device, seed)]

    return {
        "attention": [attention(case) for case in ATTENTION],
        **{f"{CHOICE}attention, {name}": [sized(*of) for of in sizes] for name, sizes in every_size.items()},
        **{
            f"{CHOICE}products, {case.name}, {rows} rows": [
                linear(case, kernel, rows)
                for kernel, variant in VARIANTS.items()
                if variant.fits(rows, case.shape[0], case.dtype)
            ]
            for case in LINEAR
            for rows in case.rows
        },
        "single rows": [single_rows(kernel, dtype) for kernel in triton_linear.VARIANTS for dtype in LIMITS],
        "small": [small(dtype) for dtype in LIMITS],
        "sampling": [lambda: [*check_sampling(device, seed)]],
    }
