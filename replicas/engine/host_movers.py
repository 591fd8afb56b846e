"""Moves whole blocks between the KV cache and host memory, and says how long it took. Knows no hashes.

A block is a row of each of the KV cache's tensors (`KVTensors.tensors`) and of as many tensors in host memory. On a
CPU a copy is one move of memory, made at once. On CUDA the device's rows are strided (each layer's cache is
contiguous), so they pass through small contiguous buffers on the device:

    offload   compute stream: gather blocks ─► buffer │ side stream: buffer ─► pinned rows, while the step computes
    fetch     side stream: pinned rows ─► buffer      │ compute stream waits, then scatters buffer ─► blocks

All traffic between buffers and host is in one stream and so in the order in which it was decided on: a row is never
read before it is written, nor written over while it is read. A buffer is used again when what used it last is done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from replicas.engine.host_memory import to_device

Pairs = Sequence[tuple[int, int]]
Finished = tuple[int, float, bool]
_Bytes = npt.NDArray[np.uint8]

BUFFERS = 2


class Mover(Protocol):
    def offload(self, pairs: Pairs) -> None:
        """(block, slot)s, from the device to the host."""
        ...

    def fetch(self, pairs: Pairs) -> None:
        """(slot, block)s, from the host to the device."""
        ...

    def finished(self) -> list[Finished]:
        """(blocks, seconds, whether the step waited for it) of each copy that has ended since the last call."""
        ...

    def wait(self) -> None:
        """Until all is copied."""
        ...


class DirectMover:
    """device, host: contiguous tensors in the same memory, each with rows of the same shape.

    Copied by this thread alone: torch would divide each block among its own, and on busy cores wait for one of them.
    """

    def __init__(self, device: Sequence[Tensor], host: Sequence[Tensor]) -> None:
        self._device, self._host = [_rows(tensor) for tensor in device], [_rows(tensor) for tensor in host]
        self._done: list[Finished] = []

    def offload(self, pairs: Pairs) -> None:
        self._move(pairs, self._device, self._host)

    def fetch(self, pairs: Pairs) -> None:
        self._move(pairs, self._host, self._device)

    def _move(self, pairs: Pairs, sources: Sequence[_Bytes], targets: Sequence[_Bytes]) -> None:
        started = time.perf_counter()
        for source, target in zip(sources, targets, strict=True):
            for row, to in pairs:
                target[to] = source[row]
        self._done.append((len(pairs), time.perf_counter() - started, True))

    def finished(self) -> list[Finished]:
        done, self._done = self._done, []
        return done

    def wait(self) -> None:
        pass


def _rows(tensor: Tensor) -> _Bytes:
    """uint8 [rows, bytes of one], the same memory."""
    rows: _Bytes = tensor.view(len(tensor), -1).view(torch.uint8).numpy()
    return rows


class Event(Protocol):
    def query(self) -> bool: ...
    def elapsed_time(self, end_event: Event) -> float: ...  # milliseconds


class Streams(Protocol):
    """The stream that computes, which is the current one, and one beside it."""

    def side(self) -> AbstractContextManager[object]:
        """What is launched within goes to the stream beside."""
        ...

    def mark(self) -> Event:
        """This point of the current stream."""
        ...

    def wait(self, event: Event) -> None:
        """What is launched from now on in the current stream comes after `event`."""
        ...

    def synchronize(self) -> None: ...


class CudaStreams:
    def __init__(self, device: torch.device) -> None:
        self._cuda: Any = torch.cuda
        self._device, self._side = device, self._cuda.Stream(device)

    def side(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._side)

    def mark(self) -> Event:
        event: Event = self._cuda.current_stream(self._device).record_event(self._cuda.Event(enable_timing=True))
        return event

    def wait(self, event: Event) -> None:
        self._cuda.current_stream(self._device).wait_event(event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)


@dataclass(slots=True, eq=False)
class _Buffer:
    """rows: of each tensor. used: when what used it last is done."""

    rows: list[Tensor]
    used: Event | None = None


class StagedMover:
    """device: the KV cache's tensors. host: pinned, contiguous ones. width: blocks that a buffer holds."""

    def __init__(self, device: Sequence[Tensor], host: Sequence[Tensor], width: int, streams: Streams) -> None:
        self._device, self._host, self._width, self._streams = device, host, width, streams
        self._buffers = cycle(
            [
                _Buffer([torch.empty(width, *t.shape[1:], dtype=t.dtype, device=t.device) for t in device])
                for _ in range(BUFFERS)
            ]
        )
        self._running: deque[tuple[Event, Event, int, bool]] = deque()

    def offload(self, pairs: Pairs) -> None:
        for part, buffer in self._parts(pairs):
            self._await(buffer)
            blocks = to_device(torch.tensor([block for block, _ in part]), self._device[0].device)
            for tensor, staged in zip(self._device, buffer.rows, strict=True):
                torch.index_select(tensor, 0, blocks, out=staged[: len(part)])
            gathered = self._streams.mark()
            with self._streams.side():
                self._streams.wait(gathered)
                began = self._streams.mark()
                for tensor, staged in zip(self._host, buffer.rows, strict=True):
                    for row, (_, slot) in zip(staged[: len(part)], part, strict=True):
                        tensor[slot].copy_(row, non_blocking=True)
                buffer.used = self._streams.mark()
            self._running.append((began, buffer.used, len(part), False))

    def fetch(self, pairs: Pairs) -> None:
        for part, buffer in self._parts(pairs):
            with self._streams.side():
                self._await(buffer)
                began = self._streams.mark()
                for tensor, staged in zip(self._host, buffer.rows, strict=True):
                    for row, (slot, _) in zip(staged[: len(part)], part, strict=True):
                        row.copy_(tensor[slot], non_blocking=True)
                ended = self._streams.mark()
            self._streams.wait(ended)
            blocks = to_device(torch.tensor([block for _, block in part]), self._device[0].device)
            for tensor, staged in zip(self._device, buffer.rows, strict=True):
                tensor.index_copy_(0, blocks, staged[: len(part)])
            buffer.used = self._streams.mark()
            self._running.append((began, ended, len(part), True))

    def _parts(self, pairs: Pairs) -> Iterator[tuple[Pairs, _Buffer]]:
        for start in range(0, len(pairs), self._width):
            yield pairs[start : start + self._width], next(self._buffers)

    def _await(self, buffer: _Buffer) -> None:
        if buffer.used is not None:
            self._streams.wait(buffer.used)

    def finished(self) -> list[Finished]:
        done: list[Finished] = []
        while self._running and self._running[0][1].query():
            began, ended, blocks, held_up = self._running.popleft()
            done.append((blocks, began.elapsed_time(ended) / 1e3, held_up))
        return done

    def wait(self) -> None:
        self._streams.synchronize()
