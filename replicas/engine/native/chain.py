"""All guesses of a draft on the target's states in one foreign call: CPU, float32."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from replicas.engine.attention import LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.native.library import ChainParts, pointer
from replicas.engine.native.linear import NativeLinear
from replicas.engine.native.stack import NativeStack


class NativeChain:
    """See `replicas.engine.spec.chain.Chain` for the contract; not for two threads at once.

    embedding: a table [V, H], or the layer whose rows it is. head [N, H], and the token of each of its rows.
    """

    def __init__(
        self,
        stack: NativeStack,
        fuse: NativeLinear,
        head: NativeLinear,
        embedding: NativeLinear | Tensor,
        targets: Tensor,
    ) -> None:
        self._stack = stack
        self._held = fuse, head, embedding, targets  # what the structure below points to
        for linear, shape in ((fuse, (stack.hidden, 2 * stack.hidden)), (head, (len(targets), stack.hidden))):
            found = linear.out_features, linear.in_features
            assert found == shape, f"a layer of {found}, expected {shape}"
        table = pointer("embedding", embedding, torch.float32) if isinstance(embedding, Tensor) else None
        looked_up = None if isinstance(embedding, Tensor) else embedding.address
        self._parts = ChainParts(
            *(ctypes.addressof(stack.structure), fuse.address, head.address, looked_up, table),
            pointer("targets", targets, torch.int64),
        )

    def __call__(
        self, batch: StepBatch, states: Tensor, caches: Sequence[LayerCache], depth: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        described, shape = self._stack.describe(batch, caches)
        guesses = torch.empty((depth, described.sequences), dtype=torch.int64)
        sure = torch.empty((depth, described.sequences))
        self._stack.library.chain(
            *(ctypes.byref(part) for part in (self._parts, described, shape)),
            *(pointer(name, getattr(batch, name), torch.int64) for name in ("positions", "token_ids")),
            *(self._stack.inputs(states, batch), depth, guesses.data_ptr(), sure.data_ptr()),
        )
        return guesses.tolist(), sure.tolist()
