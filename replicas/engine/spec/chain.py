"""The arithmetic of a draft on the target's states (`state_draft.py`): several guesses of several sequences, one after
the other, each from what was computed for the one before it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Protocol

import torch
from torch import Tensor

from replicas.engine.attention import LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.graphs import Graph
from replicas.engine.model import Decoder
from replicas.engine.native.chain import NativeChain
from replicas.engine.native.linear import NativeLinear
from replicas.engine.native.stack import NativeStack
from replicas.engine.ops import Linear
from replicas.engine.spec.draft_layers import SubsetHead
from replicas.engine.spec.further import Further, read

_RECORDED = 64  # sequences: with more, guesses hardly ever pay


class Chain(Protocol):
    def __call__(
        self, batch: StepBatch, states: Tensor, caches: Seq[LayerCache], depth: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """batch: the newest tokens of S sequences, at least one of each, its block tables with room for `depth` - 1
        more; states [T, H]: the target's before each. Guess i of all sequences and how probable it is: [depth][S] each.
        """
        ...


class StepByStep:
    """The reference, for any device. fuse: the layer [T, 2 H] -> [T, H] in front of the decoder's. make_graph: see
    `Further`; the last block of the caches must then belong to nobody."""

    def __init__(
        self, decoder: Decoder, fuse: Linear, head: SubsetHead, make_graph: Callable[[], Graph] | None = None
    ) -> None:
        self._decoder, self._fuse, self._head, self._make_graph = decoder, fuse, head, make_graph
        self._further: Further | None = None

    def __call__(
        self, batch: StepBatch, states: Tensor, caches: Seq[LayerCache], depth: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        tokens, sure, states = self._guess(batch, states, caches)
        if depth == 1:
            return read([tokens], [sure])
        further = self._further = self._further or self._build(caches)
        more, surer = further(tokens, states, batch.block_tables, batch.context_lens, depth - 1)
        return read([tokens, *more], [sure, *surer])

    def _guess(self, batch: StepBatch, states: Tensor | None, caches: Seq[LayerCache]) -> tuple[Tensor, Tensor, Tensor]:
        assert states is not None, "a draft on states was asked without them"
        inputs = self._fuse(torch.cat((self._decoder.embed(batch.token_ids), states), dim=1))
        states = self._decoder.layers(inputs, batch, caches)
        return *self._head.likeliest(states), states

    def _build(self, caches: Seq[LayerCache]) -> Further:
        blocks, block_size = caches[0].keys.shape[:2]
        return Further(
            lambda batch, states: self._guess(batch, states, caches),
            self._make_graph,
            max_seqs=_RECORDED,
            max_blocks=-(-self._decoder.max_model_len // block_size),
            block_size=block_size,
            scratch=blocks - 1,
        )


def choose_chain(
    decoder: Decoder, fuse: Linear, head: SubsetHead, make_graph: Callable[[], Graph] | None = None
) -> Chain:
    """One native call where everything in it is native."""
    stack, embedding, output = decoder.stack, decoder.embedding, head.output
    if (
        isinstance(stack, NativeStack)
        and isinstance(fuse, NativeLinear)
        and isinstance(output, NativeLinear)
        and isinstance(embedding, NativeLinear | Tensor)
    ):
        return NativeChain(stack, fuse, output, embedding, head.targets)
    return StepByStep(decoder, fuse, head, make_graph)
