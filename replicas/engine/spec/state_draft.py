"""Guesses from layers that read the target's last hidden states beside the tokens (EAGLE: Li et al. 2024,
arXiv:2401.15077), made by `signalbox distill-draft --states`.

To guess what follows token p the layers take [embedding of token p; the target's state before it], and see the places
before p the same way. Past the newest token there are no states of the target: the layers' own take their place, and
are computed anew once the target's are there. Prompts are not seen: whoever answers from the prefix cache has no states
of them, and the states of the output know what matters of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from replicas.engine.model import Decoder
from replicas.engine.sequence import Sequence
from replicas.engine.spec.chain import Chain
from replicas.engine.spec.draft_model import Shadows
from replicas.engine.spec.proposer import Proposal, level

# Of a sequence that nobody asked about for a while only so many places are computed, so that a step's budget has room
# for all: the states know what was before.
_CATCH_UP = 32


class StateDraft(Shadows):
    """chain: computes the guesses. A shadow has the output tokens whose states are known."""

    def __init__(self, decoder: Decoder, chain: Chain, **settings: int) -> None:
        super().__init__(decoder, **settings)
        self._chain = chain
        self._unseen: dict[Sequence, list[Tensor]] = {}  # states [N, H] before the newest tokens, not computed yet

    def observe(self, seq: Sequence, states: Tensor) -> None:
        unseen = self._unseen.setdefault(seq, [])
        unseen.append(states)
        if len(unseen) > 2 * _CATCH_UP:
            self._restart(seq, _CATCH_UP)

    def _restart(self, seq: Sequence, places: int) -> None:
        """Begin a new shadow with the newest places that nobody asked about."""
        newest = torch.cat(self._unseen[seq])[-places:]
        self.forget(seq)
        self._unseen[seq] = [newest]

    @torch.inference_mode()
    def propose(self, sequences: Seq[Sequence], depth: int) -> list[Proposal]:
        places = min(_CATCH_UP, max(self._budget // len(sequences), 1))
        followed: dict[Sequence, Sequence] = {}
        items: list[tuple[Sequence, int]] = []
        for seq in sequences:
            if (shadow := self._follow(seq, depth, places)) is not None:
                followed[seq] = shadow
                items.append((shadow, len(shadow.tokens) - shadow.num_computed))
        if not followed:
            return [Proposal() for _ in sequences]
        states = torch.cat([part for seq in followed for part in self._unseen.pop(seq)])
        batch = self._layout(items, more_places=depth - 1)
        guesses, sure = self._chain(batch, states, self._caches, depth)
        for shadow, count in items:
            shadow.num_computed += count
        found = {
            seq: Proposal([row[i] for row in guesses], [level(row[i]) for row in sure])
            for i, seq in enumerate(followed)
        }
        return [found.get(seq, Proposal()) for seq in sequences]

    def _follow(self, seq: Sequence, depth: int, places: int) -> Sequence | None:
        """The shadow of `seq` with its newest tokens, their states still to be computed; None if there is no room."""
        unseen = sum(map(len, self._unseen.get(seq, ())))
        if unseen > places:
            self._restart(seq, places)
            unseen = places
        shadow = self._shadow(seq) if unseen else None
        if shadow is None:
            return None
        shadow.tokens += seq.tokens[len(seq.tokens) - unseen :]
        return shadow if self._grow(seq, shadow, len(shadow.tokens) + depth) else None

    def forget(self, seq: Sequence) -> None:
        self._unseen.pop(seq, None)
        super().forget(seq)

    def check_integrity(self, running: Seq[Sequence]) -> None:
        super().check_integrity(running)
        assert set(self._unseen) <= set(running), "states outlived their sequence"
