"""A step on its way: begun, its tokens drawn but not yet known to the host.

Where the engine runs ahead, the next step is laid out and launched while this one computes. Its sequences then count a
token that is still on the device as their last (`Sequence.pending`), and the next step's layout picks it up there. What
a token would have decided comes one step late: a sequence that turns out to have ended is computed once more in vain,
into blocks that nobody else writes to before, and what that brings is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch

from replicas.engine.config import EngineConfig
from replicas.engine.sampler import Drawn, Sampled
from replicas.engine.scheduler import Step
from replicas.engine.sequence import Row, Sequence
from replicas.protocol import ConfigError

# A place in a sequence's tokens for one that is not known yet.
_UNKNOWN = 0


@dataclass(frozen=True, slots=True)
class Flight:
    """started: when its step began to be scheduled. wanted[i]: tokens that step.items[i] was sampled for.

    waits: no step may be laid out before its tokens are known.
    """

    step: Step
    drawn: Drawn
    wanted: list[int]
    started: float
    waits: bool = False

    @property
    def num_rows(self) -> int:
        """Tokens that the step computes."""
        return sum(count for _, count in self.step.items)

    def alive(self, knows: Callable[[Sequence], bool]) -> bool:
        """Whether anybody still waits for what it brings."""
        return any(knows(seq) for seq, _ in self.step.items)

    def assume(self, knows: Callable[[Sequence], bool], max_model_len: int) -> None:
        """Let its sequences go on from the tokens that it draws; not those that end with them whatever they are."""
        row = 0
        for (seq, _), wanted in zip(self.step.items, self.wanted, strict=True):
            if wanted and knows(seq) and not seq.ends_after(wanted, max_model_len):
                assert wanted == 1, "a step with drafts has to be waited for"
                seq.tokens.append(_UNKNOWN)
                seq.pending = row
            row += wanted

    def results(self) -> list[tuple[Sequence, list[Sampled]]]:
        """Who has been given which tokens, waiting for them."""
        sampled = iter(self.drawn.read())
        found = [
            (seq, list(islice(sampled, wanted))) for (seq, _), wanted in zip(self.step.items, self.wanted, strict=True)
        ]
        return [(seq, tokens) for seq, tokens in found if tokens]


def needs_history(row: Row) -> bool:
    """Whether its next token depends on which tokens came before, by more than the model."""
    params = row.sampling
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def choose_async(config: EngineConfig, device: torch.device) -> bool:
    """Whether the engine runs ahead of what it computes. On a CPU the host that would run ahead is what computes."""
    if config.async_scheduling and config.speculative is not None:
        raise ConfigError(
            "async_scheduling and speculative exclude each other: guesses need the last tokens",
            param="async_scheduling",
        )
    return device.type == "cuda" if config.async_scheduling is None else config.async_scheduling
