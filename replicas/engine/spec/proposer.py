"""What a proposer is: something that guesses the next tokens of sequences, cheaply."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from replicas.engine.sequence import Sequence

LEVELS = 10


@dataclass(frozen=True, slots=True)
class Proposal:
    """Guesses at the tokens that follow, and how sure of each the proposer is: level i claims about (i + 1/2) / LEVELS.

    What a level is really worth is measured (`acceptance.py`); it only has to tell better guesses from worse ones.
    """

    tokens: Seq[int] = ()
    levels: Seq[int] = ()


def level(probability: float) -> int:
    return min(max(int(probability * LEVELS), 0), LEVELS - 1)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [R, V] -> the likeliest of each row, int64 [R], and its probability, float32 [R], without waiting.

    On a CPU by numpy: torch would wake its threads for each of these few microseconds, and wait for them on busy cores.
    """
    if logits.device.type != "cpu":
        best, at = logits.max(dim=-1)
        return at, (best - logits.logsumexp(dim=-1)).exp()
    rows = logits.numpy()
    at_row = rows.argmax(axis=-1)
    shifted = rows - rows[np.arange(len(rows)), at_row][:, None]
    return torch.from_numpy(at_row), torch.from_numpy(1.0 / np.exp(shifted).sum(axis=-1))


class Proposer(Protocol):
    """costs: whether asking takes time worth counting; a look into a table does not."""

    name: str
    costs: bool

    def propose(self, sequences: Seq[Sequence], depth: int) -> list[Proposal]:
        """At most `depth` guesses for each of `sequences`, all of which decode; none is a fine answer."""
        ...

    def observe(self, seq: Sequence, states: Tensor) -> None:
        """`seq` got N new tokens; states [N, H] are the target's last normed ones before each. They may be kept."""
        ...

    def forget(self, seq: Sequence) -> None:
        """`seq` ended (then it has a finish_reason), was aborted or lost its place. Called for unknown ones too."""
        ...

    def check_integrity(self, running: Seq[Sequence]) -> None:
        """AssertionError if something is held for a sequence that is not among `running`."""
        ...
