"""FlashAttention 2 and 3 behind the engine's `Attention`, where they are installed.

    flash_attn            FlashAttention 2 (Dao 2023, arXiv:2307.08691): the optional extra `gpu`; a page must be a
                          multiple of 256 tokens
    flash_attn_interface  FlashAttention 3 (Shah et al. 2024, arXiv:2407.08608): built from its repository's `hopper`
                          folder; Hopper only, pages of any size

Both take unrounded caches. FlashAttention 3 also multiplies e4m3 with e4m3, with a float32 factor each for the queries,
keys and values of a sequence and KV head (`q_descale`, `k_descale`, `v_descale`): that is what kv_cache_dtype
fp8_e4m3_head keeps, while formats with a scale for each token (`kv_format.py`) have no argument to go to. Queries are
rounded for it on the way (`rounded_queries.py`), softmax weights by FlashAttention itself; its results are bfloat16.
Both split long contexts over programs by themselves, from shapes alone, so that a captured graph holds.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import KVFormat, LayerCache
from replicas.engine.rounded_queries import round_queries
from replicas.engine.triton import device as triton_device

_LEAST_VERSION = (2, 6)  # of FlashAttention 2: block tables in the varlen call
_PAGE = 256
_LARGEST_HEAD = 256
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Flash:
    """An installed FlashAttention: generation 2 or 3 and what its package calls its version."""

    generation: int
    version: str


@cache
def installed() -> Flash | None:
    """The newest FlashAttention that can be imported; looked for once a process."""
    for module, generation in (("flash_attn_interface", 3), ("flash_attn", 2)):
        if importlib.util.find_spec(module) is not None:
            return Flash(generation, _version(module))
    return None


def _version(module: str) -> str:
    for package in (module, "flash_attn_3" if module == "flash_attn_interface" else "flash-attn"):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an attention backend is asked to serve. capability: the CUDA device's; None where there is none."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int
    kv: KVFormat | None
    capability: tuple[int, int] | None


def wanted(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int, kv: KVFormat | None) -> Wanted:
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Wanted(device=device, dtype=dtype, head_dim=head_dim, block_size=block_size, kv=kv, capability=capability)


def obstacle(flash: Flash | None, want: Wanted) -> str:
    """Why FlashAttention cannot serve that; "" if it can."""
    if flash is None:
        return "neither flash_attn_interface nor flash_attn is installed"
    if want.capability is None:
        return f"runs on cuda, not on {want.device.type}"
    if want.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 or bfloat16, not in {str(want.dtype).removeprefix('torch.')}"
    if want.head_dim % 8 or want.head_dim > _LARGEST_HEAD:
        return f"takes head sizes that are multiples of 8 up to {_LARGEST_HEAD}, not {want.head_dim}"
    if want.kv is not None and want.kv.scaled and not want.kv.per_head:
        return f"has no argument for a scale of each token, which kv_cache_dtype {want.kv.name} keeps"
    return _obstacle_of_generation(flash, want)


def _obstacle_of_generation(flash: Flash, want: Wanted) -> str:
    assert want.capability is not None, "only a CUDA device gets here"
    major = want.capability[0]
    eight_bits = want.kv is not None and want.kv.scaled
    if flash.generation == 3:
        if eight_bits and want.head_dim % 16:
            return f"FlashAttention 3 takes head sizes that are multiples of 16 in FP8, not {want.head_dim}"
        return "" if major == 9 else f"FlashAttention 3 runs on compute capability 9, this device has {major}"
    if want.kv is not None and eight_bits:
        return f"FlashAttention 2 takes no 8-bit keys and values, which kv_cache_dtype {want.kv.name} keeps"
    if _numbers(flash.version) < _LEAST_VERSION:
        return f"flash-attn {flash.version} is older than {'.'.join(map(str, _LEAST_VERSION))}"
    if major < 8:
        return f"FlashAttention 2 needs compute capability 8, this device has {major}"
    if want.block_size % _PAGE:
        return f"FlashAttention 2 needs a block_size that is a multiple of {_PAGE}, not {want.block_size}"
    return ""


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else (0,)


class FlashAttention:
    """See `replicas.engine.attention.Attention` for the contract; `obstacle` says what it can serve."""

    def __init__(self, flash: Flash, device: torch.device, dtype: torch.dtype) -> None:
        self.name = f"flash_attn {flash.version}"
        self._generation = flash.generation
        self._write: Callable[[LayerCache, Tensor, Tensor, Tensor], None] = LayerCache.write
        self._round: Callable[[Tensor, StepBatch, int], tuple[Tensor, Tensor]] = round_queries
        if not triton_device.obstacle(device, dtype):
            from replicas.engine.triton import cache

            self._write, self._round = cache.write_cache, cache.round_queries
        module = importlib.import_module("flash_attn_interface" if flash.generation == 3 else "flash_attn")
        self._paged: Any = module.flash_attn_with_kvcache
        self._varlen: Any = getattr(module, "flash_attn_varlen_func", None)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: LayerCache,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        self._write(cache, batch.slot_mapping, k, v)
        return self.attend(q, cache, batch, scale=scale, window=window)

    def attend(self, q: Tensor, cache: LayerCache, batch: StepBatch, *, scale: float, window: int | None) -> Tensor:
        """As a call, the step's keys and values being in the cache already."""
        settings = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
        }
        if self._generation == 3:
            return self._third(q, cache, batch, settings)
        num_seqs = len(batch.context_lens)
        if len(q) == num_seqs * batch.max_query_len:  # all sequences bring the same number of tokens
            out: Tensor = self._paged(
                q.view(num_seqs, batch.max_query_len, *q.shape[1:]),
                cache.keys,
                cache.values,
                cache_seqlens=batch.context_lens,
                block_table=batch.block_tables,
                **settings,
            )
            return out.flatten(0, 1)
        ends = torch.nn.functional.pad(batch.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        mixed: Tensor = self._varlen(
            q,
            cache.keys,
            cache.values,
            cu_seqlens_q=batch.query_start,
            cu_seqlens_k=ends,
            max_seqlen_q=batch.max_query_len,
            max_seqlen_k=batch.max_context_len,
            block_table=batch.block_tables,
            **settings,
        )
        return mixed

    def _third(self, q: Tensor, cache: LayerCache, batch: StepBatch, settings: dict[str, Any]) -> Tensor:
        queries, keys, values = q, cache.keys, cache.values
        if cache.key_scales is not None and cache.value_scales is not None:
            form = cache.format
            assert form is not None, "scales without a format"
            assert form.per_head, f"FlashAttention was given {form.name}, which has a scale for each token"
            queries, q_descale = self._round(q, batch, keys.shape[2])
            keys, values = keys.view(_FP8), values.view(_FP8)
            k_descale, v_descale = (s[0, 0].expand_as(q_descale) for s in (cache.key_scales, cache.value_scales))
            settings |= {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        out: Tensor = self._paged(
            queries,
            keys,
            values,
            cache_seqlens=batch.context_lens,
            page_table=batch.block_tables,
            cu_seqlens_q=batch.query_start,
            max_seqlen_q=batch.max_query_len,
            **settings,
        )
        return out.to(q.dtype)
