"""Small steps replayed from recorded graphs: a decode on a GPU is hundreds of kernels, and launching them one by one
costs more time than they take.

A graph is recorded for a *bucket*: so many sequences, each with at most so many tokens. A step is padded to the
smallest bucket that holds it:

    tokens       the step's own | padding, each to a page of scratch that nobody reads
    sequences    the step's own | padding: the padding tokens, a bucket's width each, then none

and copied into the bucket's fixed tensors. Nothing that a kernel is launched with depends on lengths: the attention
backends that are used here look lengths up on the device.

Recording waits: the first step of a bucket runs as it is (which also compiles its kernels), the second one records,
all others replay. So no answer waits for graphs that nobody needs. A bucket that cannot be
recorded, for want of memory above all, is computed as it is from then on.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.triton import device as triton_device
from replicas.engine.triton import steps as triton_steps
from replicas.protocol import ConfigError

logger = logging.getLogger(__name__)

_FINE, _COARSE = 64, 256
# What the driver keeps of a recorded graph of a few hundred kernels, generously.
_GRAPH_BYTES = 16 << 20


class Graph(Protocol):
    """Work recorded once and run again on the same memory."""

    def record(self, work: Callable[[], None]) -> None:
        """Record `work`; it need not have run when this returns."""
        ...

    def replay(self) -> None: ...


class EagerGraph:
    """No recording at all: the work itself, again. Shows on any device whether padding and bookkeeping are right."""

    def __init__(self) -> None:
        self._work: Callable[[], None] | None = None

    def record(self, work: Callable[[], None]) -> None:
        self._work = work

    def replay(self) -> None:
        assert self._work is not None, "replayed before it was recorded"
        self._work()


class CudaGraphs:
    """Makes CUDA graphs that share one pool of memory: no two of them run at once."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._recorded: WeakSet[_CudaGraph] = WeakSet()

    def __call__(self) -> Graph:
        return _CudaGraph(self)

    @property
    def pool(self) -> Any:
        # Torch gives a pool up with the last graph of it, and refuses to record into one that it gave up.
        if self._pool is None or not self._recorded:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def add(self, graph: _CudaGraph) -> None:
        """It was recorded, and keeps the pool alive as long as it lives."""
        self._recorded.add(graph)


class _CudaGraph:
    def __init__(self, graphs: CudaGraphs) -> None:
        self._graphs, self._graph = graphs, torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], None]) -> None:
        torch.cuda.synchronize()
        stream = torch.cuda.current_stream()
        try:
            # Other threads of the process may talk to CUDA meanwhile (a second engine): only this one is recorded.
            with torch.cuda.graph(self._graph, pool=self._graphs.pool, capture_error_mode="thread_local"):
                work()
        finally:
            torch.cuda.set_stream(stream)  # where recording fails at its end, torch does not return to it
        self._graphs.add(self)

    def replay(self) -> None:
        self._graph.replay()


def choose_graphs(mode: str, device: torch.device, attention: str) -> Callable[[], Graph] | None:
    """What makes graphs for `EngineConfig.step_graphs`, None for steps that are launched kernel by kernel."""
    if mode == "eager":
        return EagerGraph
    if mode not in ("auto", "off"):
        raise ConfigError(f"step_graphs {mode!r} is not supported; use auto, off or eager", param="step_graphs")
    # The torch backend looks lengths up on the host, which a recorded graph cannot do.
    if mode == "off" or device.type != "cuda" or attention == "torch":
        return None
    return CudaGraphs()


def bucket_sizes(most: int) -> list[int]:
    """1, 2, 4, then multiples of 8, from 64 on of 16, from 256 on of 64; the last is `most`."""
    sizes = [1, 2, 4, *range(8, _FINE, 8), *range(_FINE, _COARSE, 16), *range(_COARSE, most, 64)]
    return [size for size in sizes if size < most] + [most]


@dataclass(slots=True)
class Recording:
    """Of a step that comes again. seen: times so far. graph: None until recorded. broken: recording failed, and is not
    tried again."""

    seen: int = 0
    graph: Graph | None = None
    broken: bool = False

    def next(
        self, make_graph: Callable[[], Graph], prepare: Callable[[], None], work: Callable[[], None], what: str
    ) -> Graph | None:
        """What to replay this time, recorded at the second; None to run the step as it is.

        prepare: lays out what `work` reads, where it is recorded. what: the steps, for the log.
        """
        self.seen += 1
        if self.graph is not None or self.broken or self.seen == 1:
            return self.graph
        graph = make_graph()
        prepare()
        try:
            # Once unrecorded: kernels are compiled for these sizes, and results lie outside of any graph's memory.
            work()
            graph.record(work)
        except Exception as error:  # out of memory, what the driver says of a recording that ran out, Triton's own
            logger.warning("%s are launched kernel by kernel: %s", what, error)
            self.broken = True
            return None
        self.graph = graph
        return graph


@dataclass(slots=True)
class _Bucket:
    batch: StepBatch
    recording: Recording = field(default_factory=Recording)


@dataclass(slots=True)
class _Outputs:
    """Where graphs leave their results: one buffer for all of them, as only one runs at a time."""

    buffers: list[Tensor] = field(default_factory=list)

    def take(self, results: Sequence[Tensor], most_rows: int) -> None:
        if not self.buffers:
            self.buffers = [torch.empty(most_rows, *r.shape[1:], dtype=r.dtype, device=r.device) for r in results]
        for buffer, result in zip(self.buffers, results, strict=True):
            buffer[: len(result)].copy_(result)


def pad_into(fixed: StepBatch, batch: StepBatch, scratch: int, block_size: int) -> None:
    """Copy `batch` into a bucket's tensors and pad it: what is left of them belongs to block `scratch`."""
    tokens, num_seqs, width = len(batch.token_ids), len(batch.context_lens), fixed.max_query_len
    fixed.token_ids[:tokens].copy_(batch.token_ids)
    fixed.token_ids[tokens:] = 0
    fixed.positions[:tokens].copy_(batch.positions)
    fixed.positions[tokens:] = 0
    fixed.slot_mapping[:tokens].copy_(batch.slot_mapping)
    fixed.slot_mapping[tokens:] = scratch * block_size
    fixed.context_lens[:num_seqs].copy_(batch.context_lens)
    fixed.query_start[: num_seqs + 1].copy_(batch.query_start)
    fixed.block_tables[:num_seqs, : batch.block_tables.shape[1]].copy_(batch.block_tables)
    padding = len(fixed.context_lens) - num_seqs
    if padding:
        # Padding sequences see themselves only, in the scratch block; those that have no token left see nothing.
        ends = torch.arange(1, padding + 1, device=fixed.token_ids.device) * width + tokens
        fixed.query_start[num_seqs + 1 :] = ends.clamp_(max=len(fixed.token_ids))
        fixed.context_lens[num_seqs:] = fixed.query_start[num_seqs + 1 :] - fixed.query_start[num_seqs:-1]
        fixed.block_tables[num_seqs:, 0] = scratch


Padding = Callable[[StepBatch, StepBatch, int, int], None]


def choose_padding(device: torch.device) -> Padding:
    """The one for a device: launches cost more than what they do here."""
    if device.type != "cuda" or triton_device.obstacle(device, torch.float32):
        return pad_into
    return triton_steps.pad_into


class GraphRunner:
    """Runs `compute` on a step, through a graph where there is one for it.

    compute: StepBatch -> tensors with a row for each of its logits_rows, in their order. It writes keys and values and
        must launch the same kernels for every step of a bucket.
    make_graph: a fresh Graph. max_seqs, max_query_len: of the largest bucket; larger steps run as they are.
    scratch: a block that no sequence ever gets. max_blocks: of one sequence. pad: `pad_into`, or what does the same.
    """

    def __init__(
        self,
        compute: Callable[[StepBatch], tuple[Tensor, ...]],
        make_graph: Callable[[], Graph],
        *,
        max_seqs: int,
        max_query_len: int,
        max_blocks: int,
        block_size: int,
        scratch: int,
        device: torch.device,
        pad: Padding = pad_into,
    ) -> None:
        self._compute, self._make_graph = compute, make_graph
        self._sizes, self._max_query_len = bucket_sizes(max_seqs), max_query_len
        self._max_blocks, self._block_size = max_blocks, block_size
        self._scratch, self._device = scratch, device
        self._pad_into = pad
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._outputs = _Outputs()
        self.replays = 0

    def __call__(self, batch: StepBatch) -> tuple[Tensor, ...]:
        """What `compute(batch)` would give. The tensors may be views of memory that the next call writes to."""
        key = self._key(batch)
        if key is None:
            return self._compute(batch)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(self._fixed(*key))
        graph = bucket.recording.next(
            self._make_graph,
            lambda: self._pad_into(bucket.batch, batch, self._scratch, self._block_size),
            lambda: self._outputs.take(self._compute(bucket.batch), self._sizes[-1] * self._max_query_len),
            f"steps of {key[0]} sequences",
        )
        if graph is None:
            return self._compute(batch)
        self._pad_into(bucket.batch, batch, self._scratch, self._block_size)
        graph.replay()
        self.replays += 1
        return self._rows(batch)

    def idle(self) -> StepBatch:
        """A step of one token that belongs to nobody, in the scratch block."""
        batch = self._fixed(1, 1)
        batch.slot_mapping.fill_(self._scratch * self._block_size)
        batch.query_start[1], batch.context_lens[0] = 1, 1
        batch.block_tables.fill_(self._scratch)
        return batch

    @property
    def recordings(self) -> int:
        return sum(bucket.recording.graph is not None for bucket in self._buckets.values())

    def counts(self) -> dict[str, int]:
        """Steps that were recorded and replayed, and buckets that could not be recorded."""
        broken = sum(bucket.recording.broken for bucket in self._buckets.values())
        return {"recordings": self.recordings, "replays": self.replays, "broken": broken}

    def _key(self, batch: StepBatch) -> tuple[int, int] | None:
        """(sequences, tokens of each) of the smallest bucket that holds the step; None if none does."""
        num_seqs, width = len(batch.context_lens), batch.max_query_len
        if width > self._max_query_len or num_seqs > self._sizes[-1] or not len(batch.logits_rows):
            return None
        if width > 1:
            width = self._max_query_len  # drafts come and go: one bucket for all lengths of them
        return self._sizes[bisect_left(self._sizes, num_seqs)], width

    def _fixed(self, size: int, width: int) -> StepBatch:
        """The bucket's own tensors, as a step of padding only."""

        def zeros(count: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(count, dtype=dtype, device=self._device)

        tokens = size * width
        return StepBatch(
            token_ids=zeros(tokens, torch.int64),
            positions=zeros(tokens, torch.int64),
            slot_mapping=zeros(tokens, torch.int64),
            query_start=zeros(size + 1, torch.int32),
            context_lens=zeros(size, torch.int32),
            block_tables=zeros(size * self._max_blocks, torch.int32).view(size, self._max_blocks),
            logits_rows=torch.arange(tokens, device=self._device),
            max_query_len=width,
            max_context_len=self._max_blocks * self._block_size,
        )

    def _rows(self, batch: StepBatch) -> tuple[Tensor, ...]:
        rows = len(batch.logits_rows)
        if rows == len(batch.token_ids):  # every token's are wanted: no need to gather
            return tuple(buffer[:rows] for buffer in self._outputs.buffers)
        return tuple(buffer[batch.logits_rows] for buffer in self._outputs.buffers)


def reserved_bytes(
    max_seqs: int, max_query_len: int, row_bytes: int, activation_bytes: int, *, drafting: bool = False
) -> int:
    """Memory to keep free for graphs: outputs of the largest, its activations, and what the driver keeps of each.

    row_bytes: of one row of `compute`'s results. activation_bytes: of one token, at the peak of a step. drafting: a
    draft's steps (`spec/further.py`) are recorded too.
    """
    rows = max_seqs * max_query_len
    widths = (1 if max_query_len == 1 else 2) + drafting
    return rows * (row_bytes + activation_bytes) + widths * len(bucket_sizes(max_seqs)) * _GRAPH_BYTES
