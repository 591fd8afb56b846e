"""Memory that is there when it is written, on large pages, and pieces of it that do not overlap."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from replicas.engine.host_memory import Arena, host_zeros


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_pool_takes_memory_only_where_it_is_written() -> None:
    before = resident_bytes()
    pool = host_zeros(4 << 30)
    assert (len(pool), pool.data_ptr() % (2 << 20)) == (4 << 30, 0)
    pool[1 << 30] = pool[-1] = 1
    assert resident_bytes() - before < 64 << 20


def test_it_outlives_the_tensor_it_was_given_as() -> None:
    part = host_zeros(1 << 20)[5:10].view(5)
    part += 3
    assert part.tolist() == [3] * 5


def test_an_arenas_pieces_are_zero_aligned_and_apart() -> None:
    arena = Arena(chunk_bytes=4096)
    counts = [1, 17, 1000, 5, 3000, 16]  # within a chunk, across its end, larger than one
    pieces = [arena.floats(count) for count in counts]
    for number, (piece, count) in enumerate(zip(pieces, counts, strict=True)):
        assert piece.shape == (count,)
        assert piece.dtype is torch.float32
        assert piece.data_ptr() % 64 == 0
        assert not piece.any()
        piece.fill_(number + 1)
    assert [set(piece.tolist()) for piece in pieces] == [{number + 1} for number in range(len(counts))]
