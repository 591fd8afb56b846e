"""A step's tensors, against what their description says of every single token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from replicas.engine import layout as layout_module
from replicas.engine.layout import Layout
from replicas.engine.sequence import Sequence
from replicas.protocol import SamplingParams

BLOCK, LONGEST = 4, 48


@st.composite
def items(draw: st.DrawFn) -> list[tuple[Sequence, int]]:
    """Sequences anywhere in their lives: prefilling, decoding, with drafts; blocks of their own."""
    free = iter(draw(st.permutations(range(200))))
    made = []
    for index in range(draw(st.integers(1, 5))):
        tokens = draw(st.lists(st.integers(0, 999), min_size=1, max_size=LONGEST - 8))
        seq = Sequence("r", index, tokens, len(tokens), SamplingParams(), 0, b"")
        seq.drafts = draw(st.lists(st.integers(0, 999), max_size=4))
        seq.num_computed = draw(st.integers(0, len(tokens) - 1))
        count = draw(st.integers(1, len(tokens) - seq.num_computed + len(seq.drafts)))
        seq.blocks = [next(free) for _ in range(-(-(seq.num_computed + count) // BLOCK) + draw(st.integers(0, 2)))]
        made.append((seq, count))
    return made


@pytest.mark.parametrize("few", [0, 10_000])
@given(items=items(), more=st.integers(0, 4))
def test_every_token_lies_where_its_sequence_says(few: int, items: list[tuple[Sequence, int]], more: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "_FEW", few)
        batch = Layout(8, LONGEST + 8, BLOCK, torch.device("cpu"))(items, more_places=more)
    at, sampled = 0, []
    for i, (seq, count) in enumerate(items):
        assert batch.query_start[i] == at
        for place in range(seq.num_computed, seq.num_computed + count):
            assert batch.token_ids[at] == (seq.tokens + seq.drafts)[place]
            assert batch.positions[at] == place
            assert batch.slot_mapping[at] == seq.blocks[place // BLOCK] * BLOCK + place % BLOCK
            if place >= len(seq.tokens) - 1:
                sampled.append(at)
            at += 1
        assert batch.context_lens[i] == seq.num_computed + count
        width = min(-(-(seq.num_computed + count + more) // BLOCK), len(seq.blocks))
        assert batch.block_tables[i, :width].tolist() == seq.blocks[:width]
    assert batch.query_start[-1] == len(batch.token_ids) == at
    assert batch.logits_rows.tolist() == sampled
    assert batch.max_query_len == max(count for _, count in items)
    assert batch.max_context_len == int(batch.context_lens.max())
    types = {"query_start": torch.int32, "context_lens": torch.int32, "block_tables": torch.int32}
    for name in ("token_ids", "positions", "slot_mapping", "logits_rows", *types):
        assert getattr(batch, name).dtype is types.get(name, torch.int64), name
