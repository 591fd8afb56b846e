"""Windowed perplexity of a text, computed by the decoder that serves: its weights, its kernels and its KV cache.

The text's T tokens are cut into windows of `window` tokens that begin every `stride` tokens. A window is computed with
no memory of what is before it; each token of the text is scored once, in the first window that holds it and something
before it:

    tokens   0        S        2S       3S
    window 0 ├────────W─────┤                     scores 1 … W-1
    window 1          ├────────W─────┤            scores W … S+W-1      (context W-S … W-1 tokens)
    window 2                   ├────────W─────┤   scores S+W … 2S+W-1

With stride = window the first token of each window has no context and is left out; a smaller stride costs
window / stride times as much and gives every token more context. Perplexity is exp of the mean negative log-likelihood
of the scored tokens, in nats, summed in float64.

Keys and values go through the paged cache before they are attended to, as in serving, so what a quantised cache loses
is in the figure.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from replicas.engine.batch import StepBatch
from replicas.engine.kv_format import LayerCache
from replicas.engine.loading import Loaded
from replicas.protocol import ConfigError

DEFAULT_WINDOW = 1024
_BLOCK = 64  # tokens a block of the scratch cache
_STEP_TOKENS = 1024  # tokens computed at once: their logits are what takes memory (4 bytes times the vocabulary, each)


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens begin..end of the text; those from `first` on are scored."""

    begin: int
    end: int
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """nll: sum of negative log-likelihoods of `scored` tokens, nats. text_tokens: of the whole text, scored or not."""

    nll: float
    scored: int
    text_tokens: int
    window: int
    stride: int
    seconds: float

    @property
    def value(self) -> float:
        mean = self.nll / self.scored
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_token(self) -> float:
        return self.nll / self.scored / math.log(2)


def windows(text_tokens: int, window: int, stride: int) -> list[Window]:
    """Every window of a text, in order; ConfigError if the numbers cannot be."""
    if not 2 <= window:
        raise ConfigError(f"window must be at least 2 tokens, got {window}", param="window")
    if not 1 <= stride <= window:
        raise ConfigError(f"stride must be between 1 and the window of {window}, got {stride}", param="stride")
    if text_tokens < 2:
        raise ConfigError(f"a text of {text_tokens} tokens holds nothing to predict", param="text")
    found, scored = [], 1
    for begin in range(0, text_tokens, stride):
        end = min(begin + window, text_tokens)
        first = max(scored, begin + 1)
        if first < end:
            found.append(Window(begin, end, first))
        scored = end
        if end == text_tokens:
            break
    return found


@torch.inference_mode()
def measure(
    loaded: Loaded,
    token_ids: Sequence[int],
    *,
    window: int | None = None,
    stride: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of `token_ids`; stride None is the window. `progress(done, total)`: tokens computed of all windows'.

    The window must fit the model; None is DEFAULT_WINDOW, or the model's longest context if that
    is less. Windows are computed together until they hold about a thousand tokens.
    """
    started = time.perf_counter()
    limit = loaded.decoder.max_model_len
    window = min(DEFAULT_WINDOW, limit) if window is None else window
    if window > limit:
        raise ConfigError(f"window {window} is longer than the model's {limit} tokens", param="window")
    step = stride or window
    todo = windows(len(token_ids), window, step)
    total = sum(w.end - w.begin for w in todo)
    together = max(1, _STEP_TOKENS // window)
    caches = loaded.allocate_kv(together * -(-window // _BLOCK), _BLOCK).layers
    tokens = torch.tensor(token_ids, dtype=torch.int64)
    nll, scored, done = 0.0, 0, 0
    for some in _batches(todo, together):
        for part in _losses(loaded, tokens, some, caches):
            nll += float(part.double().sum())
            scored += len(part)
        done += sum(w.end - w.begin for w in some)
        progress(done, total)
    return Perplexity(
        nll=nll,
        scored=scored,
        text_tokens=len(token_ids),
        window=window,
        stride=step,
        seconds=time.perf_counter() - started,
    )


@torch.inference_mode()
def agreement(loaded: Loaded, texts: Sequence[tuple[Sequence[int], int]]) -> tuple[int, int]:
    """How many tokens are this model's own first choice, and of how many.

    texts: token ids, and the place from which on they are judged, each given all the tokens before it. Written greedily
    by another model, they tell how often both choose alike, without one difference counting for all that follows it.
    """
    same = judged = 0
    for ids, first in texts:
        window = Window(0, len(ids), first)
        caches = loaded.allocate_kv(-(-len(ids) // _BLOCK), _BLOCK).layers
        for logits, targets in _predictions(loaded, torch.tensor(ids, dtype=torch.int64), [window], caches):
            same += int((logits.argmax(dim=-1) == targets).sum())
            judged += len(targets)
    return same, judged


def _batches(todo: Sequence[Window], together: int) -> Iterator[Sequence[Window]]:
    for start in range(0, len(todo), together):
        yield todo[start : start + together]


def _losses(loaded: Loaded, tokens: Tensor, some: Sequence[Window], caches: list[LayerCache]) -> Iterator[Tensor]:
    """Negative log-likelihoods float32 of each window's scored tokens."""
    for logits, targets in _predictions(loaded, tokens, some, caches):
        yield torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu()


def _predictions(
    loaded: Loaded, tokens: Tensor, some: Sequence[Window], caches: list[LayerCache]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, the tokens that came) of each window's scored tokens."""
    logits = loaded.decoder.forward(_layout(tokens, some, loaded.device), caches)
    start = 0
    for w in some:
        count = w.end - w.first
        yield logits[start : start + count], tokens[w.first : w.end].to(logits.device)
        start += count


def _layout(tokens: Tensor, some: Sequence[Window], device: torch.device) -> StepBatch:
    """The windows as one step of whole prompts, each in blocks of its own; logits of the tokens before scored ones."""
    lengths = np.array([w.end - w.begin for w in some])
    ends = lengths.cumsum()
    starts = ends - lengths
    blocks = -(-int(lengths.max()) // _BLOCK)
    tables = np.arange(len(some) * blocks, dtype=np.int32).reshape(len(some), blocks)
    positions = np.concatenate([np.arange(length) for length in lengths])
    slots = np.repeat(np.arange(len(some)) * blocks * _BLOCK, lengths) + positions
    rows = np.concatenate(
        [np.arange(w.first - 1 - w.begin, w.end - 1 - w.begin) + s for w, s in zip(some, starts, strict=True)]
    )

    def put(values: object, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype, device=device)

    return StepBatch(
        token_ids=torch.cat([tokens[w.begin : w.end] for w in some]).to(device),
        positions=put(positions, torch.int64),
        slot_mapping=put(slots, torch.int64),
        query_start=put(np.concatenate(([0], ends)), torch.int32),
        context_lens=put(lengths, torch.int32),
        block_tables=put(tables, torch.int32),
        logits_rows=put(rows, torch.int64),
        max_query_len=int(lengths.max()),
        max_context_len=int(lengths.max()),
    )
