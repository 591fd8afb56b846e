"""Guesses from layers that read the target's last hidden states beside the tokens (EAGLE: Li et al. 2024,
arXiv:2401.15077), made by `signalbox distill-draft --states`.

To guess what follows token p the layers take [embedding of token p; the target's state before it], and see the places
before p the same way. Past the newest token there are no states of the target: the layers' own take their place, and
are computed anew once the target's are there. Prompts are not seen: whoever answers from the prefix cache has no states
of them, and the states of the output know what matters of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from replicas.engine.ops import Linear
from replicas.engine.sequence import Sequence
from replicas.engine.spec.draft_model import Shadows
from replicas.engine.spec.proposer import Proposal, level

# Of a sequence that nobody asked about for a while only so many places are computed: the states know what was before.
_CATCH_UP = 32


class StateDraft(Shadows):
    """fuse: the layer [T, 2 H] -> [T, H] in front. A shadow has the output tokens whose states are known."""

    def __init__(self, fuse: Linear, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._fuse = fuse
        self._unseen: dict[Sequence, list[Tensor]] = {}  # states [N, H] before the newest tokens, not computed yet

    def observe(self, seq: Sequence, states: Tensor) -> None:
        unseen = self._unseen.setdefault(seq, [])
        unseen.append(states)
        if len(unseen) > 2 * _CATCH_UP:
            self._restart(seq)

    def _restart(self, seq: Sequence) -> None:
        """Begin a new shadow with the newest places that nobody asked about."""
        newest = torch.cat(self._unseen[seq])[-_CATCH_UP:]
        self.forget(seq)
        self._unseen[seq] = [newest]

    @torch.inference_mode()
    def propose(self, sequences: Seq[Sequence], depth: int) -> list[Proposal]:
        followed = {seq: shadow for seq in sequences if (shadow := self._follow(seq, depth)) is not None}
        guesses: dict[Sequence, tuple[list[int], list[int]]] = {seq: ([], []) for seq in sequences}
        if followed:
            shadows = list(followed.values())
            hidden = self._catch_up(followed)
            for ahead in range(depth):
                tokens, sure = self._head(hidden)
                for seq, token, probability in zip(followed, tokens.tolist(), sure, strict=True):
                    guesses[seq][0].append(token)
                    guesses[seq][1].append(level(probability))
                if ahead + 1 < depth:
                    for shadow, token in zip(shadows, tokens.tolist(), strict=True):
                        shadow.tokens.append(token)
                    hidden = self._step([(shadow, 1) for shadow in shadows], hidden)
        for shadow in followed.values():
            # guesses and what was computed from them end here: the target's states will be there next time
            computed = shadow.num_prompt
            del shadow.tokens[computed:]
            shadow.num_computed = computed
        return [Proposal(*guesses[seq]) for seq in sequences]

    def _follow(self, seq: Sequence, depth: int) -> Sequence | None:
        """The shadow of `seq` with its newest tokens, their states still to be computed; None if there is no room."""
        unseen = sum(map(len, self._unseen.get(seq, ())))
        if unseen > _CATCH_UP:
            self._restart(seq)
            unseen = _CATCH_UP
        shadow = self._shadow(seq) if unseen else None
        if shadow is None:
            return None
        shadow.tokens += seq.tokens[len(seq.tokens) - unseen :]
        shadow.num_prompt = len(shadow.tokens)  # what the target itself has said
        return shadow if self._grow(seq, shadow, len(shadow.tokens) + depth) else None

    def _catch_up(self, followed: dict[Sequence, Sequence]) -> Tensor:
        """Compute what each shadow lacks, in steps of `budget` tokens; [S, H] of their newest places."""
        lacking = {shadow: torch.cat(self._unseen.pop(seq)) for seq, shadow in followed.items()}
        newest: dict[Sequence, Tensor] = {}
        while lacking:
            items, states, left = [], [], self._budget
            for shadow, own in lacking.items():
                if count := min(len(own), left):
                    items.append((shadow, count))
                    states.append(own[:count])
                    left -= count
            rows = iter(self._step(items, torch.cat(states)))
            for shadow, count in items:
                lacking[shadow] = lacking[shadow][count:]
                if not len(lacking[shadow]):
                    del lacking[shadow]
                    newest[shadow] = next(rows)
        return torch.stack([newest[shadow] for shadow in followed.values()])

    def _step(self, items: list[tuple[Sequence, int]], states: Tensor) -> Tensor:
        """The layers' own states [R, H] of the places that are their shadow's newest."""
        batch = self._layout(items)
        inputs = self._fuse(torch.cat((self._decoder.embed(batch.token_ids), states), dim=1))
        for shadow, count in items:
            shadow.num_computed += count
        return self._decoder.layers(inputs, batch, self._caches)

    def forget(self, seq: Sequence) -> None:
        self._unseen.pop(seq, None)
        super().forget(seq)

    def check_integrity(self, running: Seq[Sequence]) -> None:
        super().check_integrity(running)
        assert set(self._unseen) <= set(running), "states outlived their sequence"
