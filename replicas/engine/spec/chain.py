"""The arithmetic of a draft on the target's states (`state_draft.py`): several guesses of several sequences, one after
the other, each from what was computed for the one before it."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from replicas.engine.attention import LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.model import Decoder
from replicas.engine.native.chain import NativeChain
from replicas.engine.native.linear import NativeLinear
from replicas.engine.native.stack import NativeStack
from replicas.engine.ops import Linear
from replicas.engine.spec.draft_layers import SubsetHead


class Chain(Protocol):
    def __call__(
        self, batch: StepBatch, states: Tensor, caches: Seq[LayerCache], depth: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """batch: the newest tokens of S sequences, at least one of each, its block tables with room for `depth` - 1
        more; states [T, H]: the target's before each. Guess i of all sequences and how probable it is: [depth][S] each.
        """
        ...


class StepByStep:
    """The reference, for any device. fuse: the layer [T, 2 H] -> [T, H] in front of the decoder's."""

    def __init__(self, decoder: Decoder, fuse: Linear, head: SubsetHead) -> None:
        self._decoder, self._fuse, self._head = decoder, fuse, head

    def __call__(
        self, batch: StepBatch, states: Tensor, caches: Seq[LayerCache], depth: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        guesses, sure = [], []
        for ahead in range(depth):
            inputs = self._fuse(torch.cat((self._decoder.embed(batch.token_ids), states), dim=1))
            states = self._decoder.layers(inputs, batch, caches)
            tokens, probabilities = self._head(states)
            guesses.append(tokens.tolist())
            sure.append(probabilities)
            if ahead + 1 < depth:
                batch = _next(batch, tokens, caches[0].keys.shape[1])
        return guesses, sure


def _next(batch: StepBatch, tokens: Tensor, block_size: int) -> StepBatch:
    """One place further on in every sequence, without the host."""
    places = batch.context_lens.long()
    count = torch.arange(len(places) + 1, device=places.device)
    blocks = batch.block_tables.gather(1, (places // block_size)[:, None])[:, 0].long()
    return replace(
        batch,
        token_ids=tokens,
        positions=places,
        slot_mapping=blocks * block_size + places % block_size,
        query_start=count.int(),
        context_lens=batch.context_lens + 1,
        logits_rows=count[:-1],
        max_query_len=1,
        max_context_len=batch.max_context_len + 1,
    )


def choose_chain(decoder: Decoder, fuse: Linear, head: SubsetHead) -> Chain:
    """One native call where everything in it is native."""
    stack, embedding, output = decoder.stack, decoder.embedding, head.output
    if (
        isinstance(stack, NativeStack)
        and isinstance(fuse, NativeLinear)
        and isinstance(output, NativeLinear)
        and isinstance(embedding, NativeLinear | Tensor)
    ):
        return NativeChain(stack, fuse, output, embedding, head.targets)
    return StepByStep(decoder, fuse, head)
