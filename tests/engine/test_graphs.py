"""Padding, buckets and bookkeeping of recorded steps, on any device: graphs that run their work again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from replicas.engine.batch import StepBatch
from replicas.engine.graphs import CudaGraphs, EagerGraph, GraphRunner, bucket_sizes, reserved_bytes

BLOCK, SCRATCH = 4, 9


def step(*sequences: tuple[int, int]) -> StepBatch:
    """(new tokens, context length) each; sequence i lives in blocks 2i and 2i + 1."""
    news = [new for new, _ in sequences]
    positions = torch.cat([torch.arange(context - new, context) for new, context in sequences])
    owners = torch.repeat_interleave(torch.arange(len(news)), torch.tensor(news))
    return StepBatch(
        token_ids=torch.arange(sum(news)) + 100,
        positions=positions,
        slot_mapping=owners * 2 * BLOCK + positions,
        query_start=torch.tensor([0, *news]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor([context for _, context in sequences], dtype=torch.int32),
        block_tables=torch.arange(2 * len(news), dtype=torch.int32).view(-1, 2),
        logits_rows=torch.arange(sum(news)),
        max_query_len=max(news),
        max_context_len=max(context for _, context in sequences),
    )


class Recorder:
    """`compute` that keeps what it was given and gives each wanted row its token and position."""

    def __init__(self) -> None:
        self.batches: list[StepBatch] = []

    def __call__(self, batch: StepBatch) -> tuple[torch.Tensor, ...]:
        self.batches.append(batch)
        rows = torch.stack([batch.token_ids, batch.positions], dim=1)[batch.logits_rows]
        return rows.float(), rows[:, :1].clone()


def runner(compute: Callable[..., Any], make_graph: Callable[[], Any] = EagerGraph, **changes: Any) -> GraphRunner:
    settings = {"max_seqs": 6, "max_query_len": 3, "max_blocks": 5, "block_size": BLOCK, "scratch": SCRATCH}
    return GraphRunner(compute, make_graph, **{**settings, **changes}, device=torch.device("cpu"))


def test_buckets_hold_every_size_and_waste_little() -> None:
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(6) == [1, 2, 4, 6]
    assert bucket_sizes(64)[-3:] == [48, 56, 64]
    sizes = bucket_sizes(512)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 512
    assert len(sizes) < 40
    for n in range(1, 513):
        assert min(size for size in sizes if size >= n) <= max(n + 64, 1) if n > 256 else n + 16


def test_the_first_step_of_a_bucket_runs_as_it_is_the_second_records_the_others_replay() -> None:
    compute = Recorder()
    run = runner(compute)
    for seen, (recordings, replays) in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        rows, ids = run(step((1, 5), (1, 2), (1, 7)))
        assert (run.recordings, run.replays) == (recordings, replays), f"after {seen + 1} steps"
        assert rows.tolist() == [[100, 4], [101, 1], [102, 6]]
        assert ids.flatten().tolist() == [100, 101, 102]
    run(step((1, 5)))  # another bucket starts anew
    assert (run.recordings, run.replays) == (1, 3)


def test_padding_writes_to_scratch_and_sees_itself_only() -> None:
    compute = Recorder()
    run = runner(compute)
    run(step((1, 5), (1, 2), (1, 7)))
    run(step((1, 8), (1, 3), (1, 4)))
    padded = compute.batches[-1]
    assert padded.token_ids.tolist() == [100, 101, 102, 0]
    assert padded.slot_mapping.tolist() == [7, 10, 19, SCRATCH * BLOCK]
    assert padded.query_start.tolist() == [0, 1, 2, 3, 4]
    assert padded.context_lens.tolist() == [8, 3, 4, 1]
    assert padded.block_tables[3, 0] == SCRATCH
    assert padded.max_context_len == 5 * BLOCK, "no number that is recorded may depend on lengths"


def test_drafts_of_any_length_share_a_bucket() -> None:
    compute = Recorder()
    run = runner(compute)
    run(step((3, 5), (1, 2), (2, 7)))
    rows, _ = run(step((1, 5), (2, 4), (1, 2)))
    assert rows.tolist() == [[100, 4], [101, 2], [102, 3], [103, 1]]
    padded = compute.batches[-1]
    assert len(padded.token_ids) == 4 * 3
    assert padded.query_start.tolist() == [0, 1, 3, 4, 7]  # 5 tokens at the end belong to nobody
    assert padded.context_lens.tolist() == [5, 4, 2, 3]
    assert (padded.slot_mapping[4:] == SCRATCH * BLOCK).all()
    rows, _ = run(step((3, 5), (3, 6), (3, 3), (3, 3)))  # full to the last row
    assert compute.batches[-1].query_start.tolist() == [0, 3, 6, 9, 12]
    assert len(rows) == 12


def test_a_step_that_outgrew_what_went_before_leaves_nothing_behind() -> None:
    compute = Recorder()
    run = runner(compute)
    for _ in range(2):
        run(step((1, 5), (1, 2), (1, 7), (1, 6)))
    run(step((1, 5), (1, 2), (1, 7)))
    padded = compute.batches[-1]
    assert (padded.token_ids[3], padded.positions[3], padded.context_lens[3]) == (0, 0, 1)
    assert padded.slot_mapping[3] == SCRATCH * BLOCK


def test_only_wanted_rows_come_back() -> None:
    run = runner(Recorder())
    batch = step((3, 5), (2, 2))
    batch = replace(batch, logits_rows=torch.tensor([2]))
    run(batch)
    rows, _ = run(batch)
    assert rows.tolist() == [[102, 4]]


@pytest.mark.parametrize("sequences", [[(4, 4)], [(1, 2)] * 7])
def test_what_no_bucket_holds_runs_as_it_is(sequences: list[tuple[int, int]]) -> None:
    compute = Recorder()
    run = runner(compute)
    for _ in range(3):
        run(step(*sequences))
    assert run.recordings == 0
    assert len(compute.batches) == 3


def test_a_bucket_without_memory_to_be_recorded_is_computed_as_it_is() -> None:
    class NoRoom(EagerGraph):
        def record(self, work: Callable[[], None]) -> None:
            raise torch.OutOfMemoryError("no room")

    run = runner(Recorder(), NoRoom)
    for _ in range(3):
        rows, _ = run(step((1, 5), (1, 2)))
        assert rows.tolist() == [[100, 4], [101, 1]]
    assert run.recordings == run.replays == 0


def test_kernels_are_compiled_before_they_are_recorded() -> None:
    """Loading a kernel is no work that a recording holds: it must not be the first to run one."""
    compute = Recorder()

    class Strict(EagerGraph):
        def record(self, work: Callable[[], None]) -> None:
            assert [len(batch.token_ids) for batch in compute.batches] == [3, 4]
            super().record(work)

    run = runner(compute, Strict)
    for _ in range(2):
        run(step((1, 5), (1, 2), (1, 7)))
    assert run.recordings == 1


def test_memory_kept_for_graphs_grows_with_rows_and_buckets() -> None:
    one = reserved_bytes(1, 1, row_bytes=10, activation_bytes=100)
    assert reserved_bytes(64, 1, 10, 100) > one
    assert reserved_bytes(64, 5, 10, 100) > reserved_bytes(64, 1, 10, 100) + 4 * 64 * 110


class FakeCuda:
    """As much of torch.cuda as recording touches: which pool each recording was given, and where streams stand."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.pools: list[int] = []
        self.stream, self.failing = "own", False
        patch.setattr(torch.cuda, "CUDAGraph", object)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda: self.stream)
        patch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        patch.setattr(torch.cuda, "graph_pool_handle", iter(range(99)).__next__)
        patch.setattr(torch.cuda, "graph", self.graph)

    @contextmanager
    def graph(self, graph: object, pool: int, capture_error_mode: str) -> Iterator[None]:
        self.pools.append(pool)
        self.stream = "capturing"
        yield
        if self.failing:
            raise RuntimeError("out of memory at the end of recording")
        self.stream = "own"


def test_graphs_share_a_pool_as_long_as_one_of_them_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording into a pool that was given up is an error in torch: every later step would be launched one by one."""
    cuda, graphs = FakeCuda(monkeypatch), CudaGraphs()
    first, second = graphs(), graphs()
    first.record(lambda: None)
    second.record(lambda: None)
    del first
    third = graphs()
    third.record(lambda: None)
    del second, third
    graphs().record(lambda: None)
    assert cuda.pools == [0, 0, 0, 1]


def test_a_recording_that_fails_leaves_neither_its_stream_nor_its_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, graphs = FakeCuda(monkeypatch), CudaGraphs()
    cuda.failing = True
    with pytest.raises(RuntimeError, match="out of memory"):
        graphs().record(lambda: None)
    assert cuda.stream == "own"
    cuda.failing = False
    graphs().record(lambda: None)
    assert cuda.pools == [0, 1]
