"""What is run before anybody asks for anything: the steps that need most memory, and steps by their rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from replicas.engine.rehearsal import run_largest_steps
from replicas.engine.sampler import Sampler
from replicas.engine.spec.config import Speculative
from tests.engine.conftest import MakeEngine

DRAFTS = Speculative(method="ngram", max_draft_tokens=3)


class Recorder(Sampler):
    def __init__(self) -> None:
        super().__init__((0,))
        self.seen: list[tuple[int, float, bool]] = []

    def __call__(self, logits: torch.Tensor, rows: Any) -> Any:
        self.seen.append((len(logits), rows[0].sampling.top_p, bool((logits == 0).all())))
        return super().__call__(logits, rows)


@pytest.fixture(autouse=True)
def _no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + 7 * 8 * 100)


@pytest.mark.parametrize(("drafts", "sampled"), [(None, [7, 7]), (DRAFTS, [7, 7, 28, 28])])
def test_the_sampler_is_run_on_as_many_rows_as_a_step_may_sample(
    make_engine: MakeEngine, drafts: Speculative | None, sampled: list[int]
) -> None:
    engine = make_engine(max_num_seqs=7, max_num_batched_tokens=60, speculative=drafts)
    sampler = Recorder()
    assert run_largest_steps(engine.loaded, engine.config, sampler) == 0, "nothing is recorded here"
    assert [rows for rows, _, _ in sampler.seen] == sampled
    assert [top_p for _, top_p, _ in sampler.seen] == [0.9, 1.0] * (len(sampled) // 2)
    assert all(alike for _, _, alike in sampler.seen), "logits that differ need less memory to be sorted"


def test_what_recorded_steps_may_take_counts_logits_outputs_and_written_out_weights(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=7, max_num_batched_tokens=60, step_graphs="eager", speculative=DRAFTS)
    rows, vocab, hidden = 7 * 4, 257, 48
    least = rows * (100 + 4 * vocab + 4 * hidden + 8 * vocab)
    found = run_largest_steps(engine.loaded, engine.config, Recorder())
    buckets = 2 * 4  # for 1, 2, 4 and 7 sequences, with and without drafts
    assert found == least + buckets * (16 << 20)
    rounded = make_engine(
        max_num_seqs=7, max_num_batched_tokens=60, step_graphs="eager", speculative=DRAFTS, quantization="int8"
    )
    assert run_largest_steps(rounded.loaded, rounded.config, Recorder()) == found + 257 * 48 * 4


@pytest.mark.parametrize("graphs", ["off", "eager"])
def test_steps_are_timed_as_they_are_run(make_engine: MakeEngine, graphs: str) -> None:
    engine = make_engine(max_num_seqs=6, step_graphs=graphs, speculative=DRAFTS)
    times = engine.measure_steps()
    assert list(times) == ([1, 2, 4, 8, 16, 32] if graphs == "off" else [1, 2, 4, 8, 16])  # 6 sequences have 24 rows
    assert min(times.values()) > 0
    assert engine._layout.rows_in_use == 0
    if engine._graphs is not None:
        assert engine._graphs.replays >= len(times)
