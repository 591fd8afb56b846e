"""The host-memory tier of the KV cache: the copies that `host_store` notes, carried out by a mover and measured.

What is kept of a block is everything there is of it, in the KV format's own codes and scales: what comes back is equal
to the bit.
"""

from __future__ import annotations

import logging
import time
import weakref

import torch

from replicas.engine.config import EngineConfig
from replicas.engine.host_memory import host_zeros, pin, unpin
from replicas.engine.host_movers import BUFFERS, CudaStreams, DirectMover, Mover, Pairs, StagedMover
from replicas.engine.host_store import FetchRule, HostStore
from replicas.engine.kv_format import KVTensors
from replicas.engine.memory import free_host_memory
from replicas.protocol import ConfigError

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_BUFFER_BYTES = 32 << 20
_PROBED, _PROBES = 16, 4  # blocks copied at once, and how often, to measure at start


class HostCache:
    """store: which block is where, and the rule by which the scheduler fetches."""

    def __init__(self, store: HostStore, mover: Mover) -> None:
        self.store = store
        self._mover = mover

    @torch.inference_mode()
    def move(self, offloads: Pairs, fetches: Pairs) -> None:
        """Start what a step decided on, before anything else of the step."""
        if offloads:
            self._mover.offload(offloads)
        if fetches:
            self._mover.fetch(fetches)

    def settle(self) -> float:
        """After a step: learn from the copies that have ended. Seconds for which a step waited for them."""
        waited = 0.0
        for blocks, seconds, held_up in self._mover.finished():
            self.store.rule.record(blocks, seconds)
            waited += seconds if held_up else 0.0
        return waited

    def calibrate(self, num_blocks: int) -> None:
        """Measure real copies, of empty rows to the first of `num_blocks` blocks, while nobody uses them."""
        many = min(_PROBED, num_blocks, self.store.num_slots)
        self._seconds_of(many)  # touches memory for the first time
        one_s, many_s = (min(self._seconds_of(count) for _ in range(_PROBES)) for count in (1, many))
        self.store.rule.calibrate(one_s, many, many_s)

    def _seconds_of(self, count: int) -> float:
        started = time.perf_counter()
        self.move([], [(i, i) for i in range(count)])
        self._mover.wait()
        seconds = time.perf_counter() - started
        self._mover.finished()
        return seconds

    def __str__(self) -> str:
        store = self.store
        return f"host cache {store.num_slots} blocks ({store.num_slots * store.rule.block_bytes / _GIB:.2f} GiB)"


def staging_bytes(config: EngineConfig) -> int:
    """Device memory that the tier may take on CUDA."""
    return BUFFERS * _BUFFER_BYTES if config.host_cache_gib else 0


def build_host_cache(config: EngineConfig, kv: KVTensors, num_blocks: int, block_bytes: int) -> HostCache | None:
    """The tier that `config.host_cache_gib` asks for, measured; None for 0. ConfigError where it cannot be had.

    num_blocks: of `kv`, that nobody uses yet. block_bytes: of one block.
    """
    if not config.host_cache_gib:
        return None
    device = kv.data.device
    slots = _slots(config, block_bytes, reserved=num_blocks * block_bytes if device.type == "cpu" else 0)
    raw = [host_zeros(slots * tensor[0].nbytes) for tensor in kv.tensors]
    rows = [memory.view(t.dtype).view(slots, *t.shape[1:]) for memory, t in zip(raw, kv.tensors, strict=True)]
    mover: Mover
    if device.type == "cpu":
        mover = DirectMover(kv.tensors, rows)
    else:
        for memory in raw:
            pin(memory)
        mover = StagedMover(kv.tensors, rows, max(_BUFFER_BYTES // block_bytes, 1), CudaStreams(device))
        weakref.finalize(mover, unpin, *raw)
    cache = HostCache(HostStore(slots, FetchRule(block_bytes)), mover)
    cache.calibrate(num_blocks)
    rule = cache.store.rule
    logger.info("%s, copied at %.1f GB/s after %.0f us", cache, rule.copy_rate / 1e9, rule.overhead_s * 1e6)
    return cache


def _slots(config: EngineConfig, block_bytes: int, reserved: int) -> int:
    """Blocks that the tier holds. reserved: bytes of host memory that the KV pool may still take."""
    wanted, free = int(config.host_cache_gib * _GIB), max(free_host_memory() - reserved, 0)
    if wanted > free:
        raise ConfigError(
            f"host_cache_gib {config.host_cache_gib} is more than the {free / _GIB:.2f} GiB of free host memory",
            param="host_cache_gib",
        )
    if wanted < block_bytes:
        raise ConfigError(
            f"host_cache_gib {config.host_cache_gib} does not hold one block of {block_bytes / _GIB:.6f} GiB",
            param="host_cache_gib",
        )
    return wanted // block_bytes
