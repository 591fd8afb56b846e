"""One launch of every kernel in every form that models in use ask for, to be compiled ahead or checked on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import LayerCache, allocate_kv, choose_kv_format
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.triton.attention import DECODE, PREFILL, TritonAttention
from replicas.engine.triton.cache import rope_and_write, round_queries
from replicas.engine.triton.linear import VARIANTS, TritonLinear
from replicas.engine.triton.ops import TritonOps
from replicas.engine.triton.overlap import overlap
from replicas.engine.triton.quant import TritonQuantizedLinear
from replicas.engine.triton.sampling import Lots, draw_rest, listed_argmax, noisy_argmax
from replicas.engine.triton.steps import pad_into


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """sequences: (new tokens, context). A model's heads, a cache's format."""

    name: str
    q_heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv: str = "auto"
    window: int | None = None
    block_size: int = 16
    sequences: tuple[tuple[int, int], ...] = ((1, 700), (1, 33), (1, 1500))

    def make(self, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fresh normal q, k, v of the step's tokens."""
        generator = torch.Generator(device).manual_seed(seed)
        total = sum(new for new, _ in self.sequences)
        return (
            torch.randn(total, self.q_heads, self.dim, generator=generator, device=device).to(self.dtype),
            torch.randn(total, self.kv_heads, self.dim, generator=generator, device=device).to(self.dtype),
            torch.randn(total, self.kv_heads, self.dim, generator=generator, device=device).to(self.dtype),
        )

    def cache(self, device: torch.device, seed: int = 1) -> LayerCache:
        """Every sequence's past is in it, as fresh normal numbers."""
        generator = torch.Generator(device).manual_seed(seed)
        blocks = sum(-(-context // self.block_size) for _, context in self.sequences) + 1
        kv = choose_kv_format(self.kv, self.dtype)
        [cache] = allocate_kv(
            blocks,
            self.block_size,
            num_layers=1,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            kv=kv,
            device=device,
            scales=torch.full((1, 2, self.kv_heads), 0.01, device=device) if kv.per_head else None,  # up to 4.48
        ).layers
        everything = torch.arange(blocks * self.block_size, device=device)
        k, v = torch.randn(
            2, len(everything), self.kv_heads, self.dim, generator=generator, device=device, dtype=self.dtype
        )
        cache.write(everything, k, v)
        return cache

    def batch(self, device: torch.device) -> StepBatch:
        """Pages in reverse, so that a kernel that takes them to be in order is wrong."""
        news, contexts = zip(*self.sequences, strict=True)
        counts = [-(-context // self.block_size) for context in contexts]
        tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        top = sum(counts)
        for row, count in zip(tables, counts, strict=True):
            row[:count] = torch.arange(top, top - count, -1)
            top -= count
        positions = [torch.arange(context - new, context) for new, context in self.sequences]
        slots = [
            tables[i][at // self.block_size].long() * self.block_size + at % self.block_size
            for i, at in enumerate(positions)
        ]
        return StepBatch(
            token_ids=torch.zeros(sum(news), dtype=torch.int64, device=device),
            positions=torch.cat(positions).to(device),
            slot_mapping=torch.cat(slots).to(device),
            query_start=torch.tensor([0, *news]).cumsum(0).to(torch.int32).to(device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            logits_rows=torch.zeros(0, dtype=torch.int64, device=device),
            max_query_len=max(news),
            max_context_len=max(contexts),
        )


_MIXED = ((300, 300), (1, 900), (65, 400))
ATTENTION = (
    AttentionCase(name="llama-3-8b decode"),
    AttentionCase(name="llama-3-8b prefill", sequences=_MIXED),
    AttentionCase(name="llama-3-8b decode int8", kv="int8"),
    AttentionCase(name="llama-3-8b decode fp8", kv="fp8_e4m3"),
    AttentionCase(name="llama-3-8b prefill fp8", kv="fp8_e4m3", sequences=_MIXED),
    AttentionCase(name="llama-3-8b decode fp8, a scale a head", kv="fp8_e4m3_head"),
    AttentionCase(name="llama-3-8b prefill fp8, a scale a head", kv="fp8_e4m3_head", sequences=_MIXED),
    AttentionCase(name="llama-3-8b verify", sequences=((5, 700), (5, 40))),
    AttentionCase(name="llama-3-70b decode", q_heads=64),
    AttentionCase(name="mistral windows", window=256, sequences=_MIXED),
    AttentionCase(name="smollm2 float32 decode", q_heads=9, kv_heads=3, dim=64, dtype=torch.float32),
    AttentionCase(name="smollm2 float32 prefill", q_heads=9, kv_heads=3, dim=64, dtype=torch.float32, sequences=_MIXED),
    AttentionCase(name="float32 int8", q_heads=9, kv_heads=3, dim=64, dtype=torch.float32, kv="int8", sequences=_MIXED),
    AttentionCase(name="float16, head of 80", q_heads=8, kv_heads=8, dim=80, dtype=torch.float16, sequences=_MIXED),
    AttentionCase(name="one long context", q_heads=4, kv_heads=1, sequences=((1, 5000),)),
    AttentionCase(name="head of 256", q_heads=8, kv_heads=4, dim=256, sequences=_MIXED),
)


def attention_launches(device: torch.device, cases: Sequence[AttentionCase] = ATTENTION) -> Iterator[str]:
    for case in cases:
        q, k, v = case.make(device)
        TritonAttention(device)(
            q, k, v, case.cache(device), case.batch(device), scale=case.dim**-0.5, window=case.window
        )
        yield case.name


def size_launches(device: torch.device) -> Iterator[str]:
    """Every size that measuring may choose, in bfloat16 and with FP8 keys and values."""
    named = {case.name: case for case in ATTENTION}
    for suffix in ("", " fp8"):
        for kind, sizes in (("decode", DECODE), ("prefill", PREFILL)):
            case = named[f"llama-3-8b {kind}{suffix}"]
            (q, k, v), cache, batch = case.make(device), case.cache(device), case.batch(device)
            for size in sizes:
                TritonAttention(device, **{kind: size})(q, k, v, cache, batch, scale=case.dim**-0.5, window=None)
                yield f"{case.name}, {size}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCase:
    """A quantised layer and the numbers of rows that its kernels are tried with. origin: none, zeros or mins."""

    name: str
    bits: int = 4
    group: int = 128
    origin: str = "zeros"
    dtype: torch.dtype = torch.bfloat16
    shape: tuple[int, int] = (384, 2048)
    rows: tuple[int, ...] = (1, 16, 33, 100, 256)

    def weight(self, device: torch.device, seed: int = 0) -> QuantizedWeight:
        """Fresh random codes, of a standard deviation near 1/50 once multiplied by their scales."""
        generator = torch.Generator(device).manual_seed(seed)
        rows, columns = self.shape
        groups = -(-columns // self.group)
        most = 2**self.bits
        scales = (torch.rand(rows, groups, generator=generator, device=device) + 0.5) * (0.07 / most)
        zeros = torch.randint(0, most, (rows, groups), generator=generator, device=device, dtype=torch.uint8)
        return QuantizedWeight(
            self.bits,
            self.group,
            torch.randint(0, most, self.shape, generator=generator, device=device, dtype=torch.uint8),
            scales.half(),
            zeros if self.origin == "zeros" else None,
            (scales * -most / 2).half() if self.origin == "mins" else None,
        )

    def inputs(self, rows: int, device: torch.device, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(rows, self.shape[1], generator=generator, device=device).to(self.dtype)


LINEAR = (
    LinearCase(name="AWQ, GPTQ"),
    LinearCase(name="int8", bits=8, group=1 << 20, origin="none"),
    LinearCase(name="groups of 64", group=64, rows=(1, 16, 100)),
    LinearCase(name="Q4_0", group=32, origin="none", rows=(1, 16, 100)),
    LinearCase(name="Q4_1", group=32, origin="mins", rows=(1, 100)),
    LinearCase(name="Q8_0", bits=8, group=32, origin="none", rows=(1, 100)),
    LinearCase(name="symmetric, float16", origin="none", dtype=torch.float16),
    LinearCase(name="Q4_1, float32", group=32, origin="mins", dtype=torch.float32, rows=(1, 8, 100)),
    LinearCase(name="2 bits", bits=2, group=64, rows=(1, 8, 100)),
)


def linear_launches(device: torch.device, cases: Sequence[LinearCase] = LINEAR) -> Iterator[str]:
    for case in cases:
        linear = TritonQuantizedLinear(case.weight(device), None, device, case.dtype)
        for rows in case.rows:
            for variant in linear.variants(rows):
                linear.run(variant, case.inputs(rows, device))
        yield case.name


def plain_launches(device: torch.device) -> Iterator[str]:
    """Single rows times a weight as it is, and a step's padding."""
    for dtype in (torch.bfloat16, torch.float32):
        linear = TritonLinear(torch.zeros(64, 4096, dtype=dtype, device=device), None)
        for variant in VARIANTS:
            linear.run(variant, torch.zeros(2, 4096, dtype=dtype, device=device))
        yield f"single rows, {str(dtype).removeprefix('torch.')}"
    for width in (1, 5):
        batch = AttentionCase(name="", sequences=((width, 40), (width, 20))).batch(device)
        pad_into(batch, batch, 0, 16)
        yield f"padding of {width} tokens a sequence"


_SMALL = ((torch.bfloat16, 4096, 32, 8, 128), (torch.float32, 576, 9, 3, 64))


def small_launches(device: torch.device, models: Sequence[tuple[torch.dtype, int, int, int, int]]) -> Iterator[str]:
    """Norms, rotary embeddings and SiLU · up. models: type, hidden size, heads, KV heads, head size of each."""
    for dtype, hidden, heads, kv_heads, dim in models:
        ops = TritonOps(device, dtype)
        x, weight = torch.ones(3, hidden, dtype=dtype, device=device), torch.ones(hidden, dtype=dtype, device=device)
        ops.rms_norm(x, weight, 1e-5)
        ops.add_rms_norm(x, x.clone(), weight, 1e-5)
        ops.silu_mul(torch.ones(3, 2 * hidden, dtype=dtype, device=device))
        q, k = (torch.ones(3, n, dim, dtype=dtype, device=device) for n in (heads, kv_heads))
        cos_sin, positions = torch.ones(8, dim, device=device), torch.arange(3, device=device)
        ops.rope(q, k, cos_sin, positions)
        for kv in ("auto", "fp8_e4m3", "fp8_e4m3_head"):
            case = AttentionCase(name="", kv_heads=kv_heads, dim=dim, dtype=dtype, kv=kv, sequences=((3, 16),))
            rope_and_write(q, k, k, cos_sin, positions, positions, case.cache(device))
        round_queries(q, case.batch(device), kv_heads)
        yield f"small operations, {str(dtype).removeprefix('torch.')}"


_VOCABULARIES = (128256, 50257)


def sampling_launches(device: torch.device, widths: Sequence[int]) -> Iterator[str]:
    """The whole vocabulary, and a list of likeliest tokens."""
    keys, out = torch.arange(3, device=device), torch.empty(3, dtype=torch.int64, device=device)
    for width in widths:
        logits = torch.zeros(3, width, device=device)
        noisy_argmax(logits, Lots(keys, keys, logits[:, 0] + 1, logits[:, 0]), out, parts=4)
        listed_argmax(logits, torch.arange(width, device=device).repeat(3, 1), keys, out, parts=4)
        draw_rest(logits, torch.ones(4, 3, device=device), keys, torch.zeros(3, device=device), out)
        yield f"sampling from {width}"


def early_launches(device: torch.device, *, few: bool = False) -> Iterator[str]:
    """Small steps' kernels, launched to overlap."""
    decodes = [case for case in ATTENTION if all(new == 1 for new, _ in case.sequences)]
    with overlap(True):
        yield from attention_launches(device, decodes[:2] + decodes[-1:] if few else decodes)
        yield from linear_launches(device, [replace(LINEAR[0], rows=(1,))] if few else LINEAR)
        yield from plain_launches(device)
        yield from small_launches(device, _SMALL[:1] if few else _SMALL)


def launch_everything(device: torch.device, *, early: bool = True) -> list[str]:
    """Launch each kernel in every form; the names of what was launched. early: also to overlap, which takes compute
    capability 9.0."""
    return [
        *attention_launches(device),
        *size_launches(device),
        *linear_launches(device),
        *plain_launches(device),
        *small_launches(device, _SMALL),
        *(early_launches(device) if early else ()),
        *sampling_launches(device, _VOCABULARIES),
    ]


def launch_each(device: torch.device, *, early: bool = True) -> list[str]:
    """Launch each kernel once or twice, as Llama-3-8B has it in bfloat16. early: see `launch_everything`."""
    names = ("llama-3-8b decode", "llama-3-8b prefill", "llama-3-8b decode fp8", "one long context")
    attention = [case for case in ATTENTION if case.name in names]
    linear = replace(LINEAR[0], rows=(1, 100))
    return [
        *attention_launches(device, attention),
        *linear_launches(device, [linear]),
        *plain_launches(device),
        *small_launches(device, _SMALL[:1]),
        *(early_launches(device, few=True) if early else ()),
        *sampling_launches(device, _VOCABULARIES[:1]),
    ]
