"""Steps that answer nobody: how long they take by their rows, and how much memory the largest of them needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count, islice

import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.config import EngineConfig
from replicas.engine.graphs import choose_graphs, reserved_bytes
from replicas.engine.layout import Layout
from replicas.engine.loading import Loaded
from replicas.engine.sampler import Sampler
from replicas.engine.sequence import Sequence, sampled_rows
from replicas.engine.spec.cost import FEW, PROBED
from replicas.protocol import SamplingParams

Forward = Callable[[StepBatch], tuple[Tensor, ...]]


def measure_steps(
    forward: Forward, sampler: Sampler, layout: Layout, most: int, width: int, limit_s: float
) -> dict[int, float]:
    """Least seconds of steps by their rows, at most `most`, on blocks that nobody uses yet.

    forward: a step -> logits and more, as the engine computes them. width: rows of one sequence, at most.

    All sizes take turns, so that a machine that is busy for a moment does not make one of them look dear; after two
    rounds it stops when the limit is reached.
    """
    began = time.perf_counter()
    measured: dict[int, float] = {}
    for turn in range(4):
        for rows in (rows for rows in PROBED if rows <= most and -(-rows // width) <= len(layout.table)):
            late = time.perf_counter() - began > limit_s
            if late and (turn > 1 or rows > FEW):
                continue
            seconds = _seconds_of(rows, forward, sampler, layout, width)
            if turn:  # the first round touches memory for the first time
                measured[rows] = min(measured.get(rows, seconds), seconds)
    return measured


@torch.inference_mode()
def _seconds_of(rows: int, forward: Forward, sampler: Sampler, layout: Layout, width: int) -> float:
    greedy = SamplingParams(temperature=0)
    blocks = count()
    items = []
    for first in range(0, rows, width):
        tokens = min(width, rows - first)
        own = list(islice(blocks, -(-tokens // layout.block_size)))
        items.append((Sequence("", first, [0], 1, greedy, 0, b"", blocks=own, drafts=[0] * (tokens - 1)), tokens))
    started = time.perf_counter()
    logits, *_ = forward(layout(items))
    sampler(logits, [row for seq, tokens in items for row in sampled_rows(seq, tokens)])
    seconds = time.perf_counter() - started
    for seq, _ in items:
        layout.release(seq)
    return seconds


@torch.inference_mode()
def run_largest_steps(loaded: Loaded, config: EngineConfig, sampler: Sampler) -> int:
    """Run the largest steps there can be, on scratch blocks, so that their peak memory is known (CUDA); returns how
    many bytes recorded steps may take beside it.

    One has as many tokens as a step may have; one, with drafts, as many as may be sampled. The sampler is given logits
    that are all alike: no set of the likeliest reaches top_p then, and it has to sort rows whole.
    """
    before = torch.cuda.memory_allocated(loaded.device)
    num_seqs = min(config.max_num_seqs, loaded.max_num_batched_tokens)
    share = loaded.max_num_batched_tokens // num_seqs
    logits = _forward_alike(loaded, config, num_seqs, share, drafts=0)
    activations = torch.cuda.max_memory_allocated(loaded.device) - before
    _sample_alike(sampler, torch.zeros_like(logits))
    drafts = min(config.tokens_per_step, share) - 1
    if drafts:
        logits = _forward_alike(loaded, config, num_seqs, drafts + 1, drafts)
        _sample_alike(sampler, torch.zeros_like(logits))
    if choose_graphs(config.step_graphs, loaded.device, loaded.attention) is None:
        return 0
    model, element = loaded.decoder.config, loaded.dtype.itemsize
    outputs = 4 * logits.shape[1] + element * model.hidden_size
    return reserved_bytes(
        num_seqs,
        config.tokens_per_step,
        # Logits are made in the model's type first.
        outputs + (4 + element) * logits.shape[1],
        activations // (num_seqs * share),
        drafting=config.speculative is not None and "draft_model" in config.speculative.methods,
    ) + _largest_dequantised(loaded)


def _forward_alike(loaded: Loaded, config: EngineConfig, num_seqs: int, tokens: int, drafts: int) -> Tensor:
    """Logits of a step of so many sequences, each with so many tokens; of the drafts among them too."""
    layout = Layout(num_seqs, tokens, config.block_size, loaded.device)
    blocks = list(range(-(-tokens // config.block_size)))
    known, params = tokens - drafts, SamplingParams()
    items = [
        (Sequence("", i, [0] * known, known, params, i, b"", blocks=blocks, drafts=[0] * drafts), tokens)
        for i in range(num_seqs)
    ]
    caches = loaded.allocate_kv(len(blocks), config.block_size).layers
    return loaded.decoder.forward(layout(items), caches)


def _sample_alike(sampler: Sampler, logits: Tensor) -> None:
    """Draw with everything on, and without limits: the other way to draw has kernels of its own to be compiled."""
    for params in (
        SamplingParams(max_tokens=1, top_p=0.9, logprobs=20, repetition_penalty=1.1),
        SamplingParams(max_tokens=1),
    ):
        sampler(logits, [Sequence("", i, [0], 1, params, i, b"") for i in range(len(logits))])


def _largest_dequantised(loaded: Loaded) -> int:
    """Bytes of the largest quantised matrix once it is written out, as a recorded step may do; 0 if none is."""
    decoder, element = loaded.decoder, loaded.dtype.itemsize
    model = decoder.config
    if decoder.layer_bytes + decoder.head_bytes >= model.matmul_parameters * element:
        return 0
    return max(2 * model.intermediate_size, model.vocab_size) * model.hidden_size * element
