"""Guesses from extra heads on the target's own last hidden state; what a head computes stands in heads.py.

A chain, not a tree: the likeliest token of each head. On a CPU every further row of a step costs, and the next-best
branches of a tree are worth less than the chain's own next guess. On a CPU that multiplies with codes the heads and
their output layer are rounded to 8 bits: reading them is what a guess costs, and the target checks it anyway.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from replicas.engine.model import Decoder
from replicas.engine.ops import Ops
from replicas.engine.sequence import Sequence
from replicas.engine.spec.draft_layers import rounded_linear
from replicas.engine.spec.further import read
from replicas.engine.spec.heads import HeadsConfig
from replicas.engine.spec.proposer import Proposal, level, likeliest


class Medusa:
    name, costs = "medusa", True

    def __init__(self, config: HeadsConfig, tensors: dict[str, Tensor], decoder: Decoder, ops: Ops) -> None:
        def held(name: str) -> Tensor:
            return tensors[name].to(decoder.device, decoder.dtype)

        self.num_heads = config.num_heads
        self._decoder = decoder
        self._sequential = config.sequential
        self._targets = tensors["targets"].to(decoder.device, torch.int64)
        self._output = rounded_linear(decoder.head_rows(self._targets).to(decoder.dtype), None, ops)
        self._heads = []
        for i in range(config.num_heads):
            weight = held(f"heads.{i}.state.weight")
            if config.sequential:  # one product with [z, e] instead of one each
                weight = torch.cat((weight, held(f"heads.{i}.token.weight")), dim=1)
            self._heads.append(rounded_linear(weight, held(f"heads.{i}.state.bias"), ops))
        self._states: dict[Sequence, Tensor] = {}

    @torch.inference_mode()
    def propose(self, sequences: Seq[Sequence], depth: int) -> list[Proposal]:
        state = torch.stack([self._states[seq] for seq in sequences])
        tokens = torch.tensor([seq.tokens[-1] for seq in sequences], device=state.device)
        found: list[Tensor] = []
        surely: list[Tensor] = []
        for head in self._heads[:depth]:
            if self._sequential:
                z = state + torch.nn.functional.silu(head(torch.cat((state, self._decoder.embed(tokens)), dim=1)))
                state = z
            else:
                z = state + torch.nn.functional.silu(head(state))
            at, probabilities = likeliest(self._output(z).float())
            tokens = self._targets[at]
            found.append(tokens)
            surely.append(probabilities)
        guesses, sure = read(found, surely)
        return [Proposal([row[i] for row in guesses], [level(row[i]) for row in sure]) for i in range(len(sequences))]

    def observe(self, seq: Sequence, states: Tensor) -> None:
        self._states[seq] = states[-1]

    def forget(self, seq: Sequence) -> None:
        self._states.pop(seq, None)

    def check_integrity(self, running: Seq[Sequence]) -> None:
        assert set(self._states) <= set(running), "a hidden state outlived its sequence"
