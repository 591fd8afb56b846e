"""Steps that answer nobody: how long they take by their rows, and how much memory the largest of them needs."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

import torch

from replicas.engine.config import EngineConfig
from replicas.engine.graphs import choose_graphs, reserved_bytes
from replicas.engine.kv_format import LayerCache
from replicas.engine.layout import Layout
from replicas.engine.loading import Loaded
from replicas.engine.model import Decoder
from replicas.engine.sampler import Sampler
from replicas.engine.sequence import Sequence, sampled_rows
from replicas.engine.spec.cost import FEW, PROBED
from replicas.protocol import SamplingParams


def measure_steps(
    decoder: Decoder, sampler: Sampler, layout: Layout, caches: Seq[LayerCache], most: int, limit_s: float
) -> dict[int, float]:
    """Least seconds of steps by their rows, at most `most`, on blocks that nobody uses yet.

    All sizes take turns, so that a machine that is busy for a moment does not make one of them look dear; after two
    rounds it stops when the limit is reached.
    """
    began = time.perf_counter()
    measured: dict[int, float] = {}
    for turn in range(4):
        for rows in (rows for rows in PROBED if rows <= most):
            late = time.perf_counter() - began > limit_s
            if late and (turn > 1 or rows > FEW):
                continue
            seconds = _seconds_of(rows, decoder, sampler, layout, caches)
            if turn:  # the first round touches memory for the first time
                measured[rows] = min(measured.get(rows, seconds), seconds)
    return measured


@torch.inference_mode()
def _seconds_of(rows: int, decoder: Decoder, sampler: Sampler, layout: Layout, caches: Seq[LayerCache]) -> float:
    blocks = list(range(-(-rows // layout.block_size)))
    seq = Sequence("", 0, [0], 1, SamplingParams(temperature=0), 0, b"", blocks=blocks, drafts=[0] * (rows - 1))
    started = time.perf_counter()
    hidden = decoder.hidden(layout([(seq, rows)]), caches)
    sampler(decoder.logits(hidden), sampled_rows(seq, rows))
    seconds = time.perf_counter() - started
    layout.release(seq)
    return seconds


@torch.inference_mode()
def run_largest_step(loaded: Loaded, config: EngineConfig, sampler: Sampler) -> int:
    """Run the largest step there can be, on scratch blocks, so that its peak memory is known (CUDA); returns how many
    bytes recorded steps may take beside it."""
    before = torch.cuda.memory_allocated(loaded.device)
    num_seqs = min(config.max_num_seqs, loaded.max_num_batched_tokens)
    share = loaded.max_num_batched_tokens // num_seqs
    layout = Layout(num_seqs, share, config.block_size, loaded.device)
    params = SamplingParams(max_tokens=1, top_p=0.9, logprobs=20, repetition_penalty=1.1)
    blocks = list(range(-(-share // config.block_size)))
    items = [(Sequence("", i, [0] * share, share, params, i, b"", blocks=blocks), share) for i in range(num_seqs)]
    logits = loaded.decoder.forward(layout(items), loaded.allocate_kv(len(blocks), config.block_size).layers)
    activations = torch.cuda.max_memory_allocated(loaded.device) - before
    rows = [seq for seq, _ in items]
    sampler(logits, rows)
    for seq in rows:  # the other way to draw, so that its kernels are compiled before anybody waits for them
        seq.sampling = SamplingParams(max_tokens=1)
    sampler(logits, rows)
    if choose_graphs(config.step_graphs, loaded.device, loaded.attention) is None:
        return 0
    return reserved_bytes(
        num_seqs,
        config.tokens_per_step,
        logits.shape[1] * 4,
        activations // (num_seqs * share),
        drafting=config.speculative is not None and "draft_model" in config.speculative.methods,
    )
