"""How much memory is really free, and how many KV blocks fit into it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from replicas.engine.config import EngineConfig
from replicas.protocol import ConfigError

_GIB = 1 << 30
_CPU_FRACTION, _CUDA_FRACTION = 0.25, 0.92


def choose_num_blocks(
    config: EngineConfig, device: torch.device, bytes_per_block: int, max_model_len: int, profile: Callable[[], int]
) -> int:
    """Blocks for the KV pool. ConfigError if not even one sequence of one block fits.

    `num_blocks` and `kv_memory_gib` are taken at their word; else a share of what is free: on CUDA after `profile()`
    has run the largest step the engine may run (activations, logits, sampler) and said how many bytes more its graphs
    may take, on CPU of the memory that the kernel or
    the container's cgroup would still give. Never more than max_num_seqs sequences of max_model_len could use.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    if config.kv_memory_gib is not None:
        budget = int(config.kv_memory_gib * _GIB)
    elif device.type == "cuda":
        budget = _free_on_cuda(device, config.memory_fraction or _CUDA_FRACTION, profile)
    else:
        budget = int(free_host_memory() * (config.memory_fraction or _CPU_FRACTION))
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    blocks = min(budget // bytes_per_block, most)
    if blocks < 1:
        raise ConfigError(
            f"{budget / _GIB:.2f} GiB for the KV cache do not hold one block of {bytes_per_block / _GIB:.4f} GiB; "
            "set kv_memory_gib or free memory"
        )
    return blocks


def _free_on_cuda(device: torch.device, fraction: float, profile: Callable[[], int]) -> int:
    """`fraction` of the card, less what weights hold and the largest step needs at its peak, less other processes'."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    graphs = profile()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return int(total * fraction) - peak - others - graphs


def free_host_memory() -> int:
    """Bytes: MemAvailable, or what the cgroup's limit leaves if that is less."""
    available = _meminfo_available()
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read_int(limit_file), _read_int(used_file)
        if limit is not None and used is not None:
            available = min(available, max(limit - used, 0))
    return available


def _meminfo_available() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 * _GIB  # no /proc (macOS): a modest guess, kv_memory_gib overrides it


def _read_int(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None
