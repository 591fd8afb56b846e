"""A step padded by one kernel is the one that is padded tensor by tensor, and numbers that travel together arrive."""

from __future__ import annotations

from dataclasses import fields

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.batch import StepBatch
from replicas.engine.graphs import pad_into
from replicas.engine.staging import _apart, _end_to_end, staged_together
from replicas.engine.triton import steps

BLOCK = 4


def step(counts: list[int], blocks: int, seed: int) -> StepBatch:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(1, 1000, shape, generator=generator).to(dtype)

    total = sum(counts)
    return StepBatch(
        token_ids=numbers(total),
        positions=numbers(total),
        slot_mapping=numbers(total),
        query_start=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
        context_lens=numbers(len(counts), dtype=torch.int32),
        block_tables=numbers(len(counts), blocks, dtype=torch.int32),
        logits_rows=torch.arange(total),
        max_query_len=max(counts),
        max_context_len=blocks * BLOCK,
    )


def empty(size: int, width: int, blocks: int) -> StepBatch:
    """A bucket with something else in it."""
    return step([width] * size, blocks, seed=99)


@settings(max_examples=50, deadline=None)
@given(width=st.sampled_from([1, 2, 3, 5]), blocks=st.integers(1, 300), data=st.data(), seed=st.integers(0, 99))
def test_one_launch_pads_as_a_dozen_do(width: int, blocks: int, data: st.DataObject, seed: int) -> None:
    counts = data.draw(st.lists(st.integers(1, width), min_size=1, max_size=6))
    size = len(counts) + data.draw(st.integers(0, 3))
    given_step = step(counts, data.draw(st.integers(1, blocks)), seed)
    ours, wanted = empty(size, width, blocks), empty(size, width, blocks)
    steps.pad_into(ours, given_step, 77, BLOCK)
    pad_into(wanted, given_step, 77, BLOCK)
    for field in fields(StepBatch):
        mine, reference = getattr(ours, field.name), getattr(wanted, field.name)
        assert torch.equal(mine, reference) if isinstance(mine, torch.Tensor) else mine == reference, field.name


@given(
    parts=st.lists(
        st.tuples(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9), st.sampled_from([torch.int32, torch.int64])),
        min_size=1,
        max_size=7,
    )
)
def test_numbers_that_travel_together_arrive_as_they_are(parts: list[tuple[list[int], torch.dtype]]) -> None:
    wanted = [torch.tensor(values, dtype=dtype) for values, dtype in parts]
    raw, places = _end_to_end(wanted, pin=False)
    for found, apart, tensor in zip(
        staged_together(parts, torch.device("cpu")), _apart(raw.clone(), wanted, places), wanted, strict=True
    ):
        assert found.dtype is apart.dtype is tensor.dtype
        assert torch.equal(found, tensor)
        assert torch.equal(apart, tensor)
        assert all(place % 16 == 0 for place in places)
