"""Large pieces of host memory on 2 MiB pages: a stream through 4 KiB pages pays a page walk each.

SmolLM2's weights read at 20 GB/s from the heap (most of its pages small) and at 29 GB/s from here.
"""

from __future__ import annotations

import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from replicas.protocol import ConfigError

_PAGE = 2 << 20


def host_zeros(nbytes: int) -> Tensor:
    """uint8 [nbytes], zero, starting on a 2 MiB border. Memory is taken from the system where it is first written."""
    if sys.platform != "linux":
        return torch.zeros(nbytes, dtype=torch.uint8)
    mapping = mmap.mmap(-1, nbytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping alive, and so do its views
    start = -whole.data_ptr() % _PAGE
    return whole[start : start + nbytes]


def pin(memory: Tensor) -> None:
    """Lock what `host_zeros` gave, so that CUDA copies from and to it beside what computes. It takes all of it now.

    Not by torch's allocator of pinned memory: that rounds up to a power of two and gives nothing back.
    """
    cuda: Any = torch.cuda
    code = int(cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code:
        raise ConfigError(f"CUDA cannot lock {memory.nbytes / 2**30:.2f} GiB of host memory (error {code})")


def unpin(*memories: Tensor) -> None:
    cuda: Any = torch.cuda
    for memory in memories:
        cuda.cudart().cudaHostUnregister(memory.data_ptr())


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """On a GPU through pinned memory of this call alone, so that the copy need not be waited for: torch's allocator of
    pinned memory hands a piece out again only when the copy from it is done."""
    return values if device.type != "cuda" else values.pin_memory().to(device, non_blocking=True)


class Arena:
    """Tensors that live as long as a model, laid end to end: matrices smaller than a page share pages too."""

    def __init__(self, chunk_bytes: int = 64 << 20) -> None:
        self._chunk_bytes = chunk_bytes
        self._rest = torch.empty(0, dtype=torch.uint8)

    def floats(self, count: int) -> Tensor:
        """float32 [count], zero, 64-byte aligned."""
        nbytes = -(-count * 4 // 64) * 64
        if nbytes > len(self._rest):
            self._rest = host_zeros(max(nbytes, self._chunk_bytes))
        taken, self._rest = self._rest[:nbytes], self._rest[nbytes:]
        return taken.view(torch.float32)[:count]
