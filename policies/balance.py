"""Which replica of a model gets the next request. Pure: no clock, no sockets, no memory between calls."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from replicas.protocol import EngineStats, NoReplica


@dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One candidate as seen at the moment of decision.

    `stats` is the replica's last report (None before the first one). `unreported` and `unreported_tokens` are the
    requests, and their prompt tokens, that this gateway has sent and that report does not include yet: without them a
    burst would pile onto whichever replica reported idle last.
    """

    replica_id: str
    stats: EngineStats | None
    unreported: int = 0
    unreported_tokens: int = 0

    @property
    def requests(self) -> int:
        reported = self.stats.num_requests_running + self.stats.num_requests_waiting if self.stats else 0
        return reported + self.unreported

    @property
    def queued_tokens(self) -> int:
        return (self.stats.queued_tokens if self.stats else 0) + self.unreported_tokens


@dataclass(frozen=True, slots=True)
class Choice:
    """`index` into the candidates, and every candidate's terms (requests, queued prompt tokens) for an explanation."""

    index: int
    terms: tuple[tuple[int, int], ...]


def least_load(candidates: Sequence[ReplicaLoad], rng: random.Random) -> Choice:
    """The candidate with fewest requests, among those the fewest prompt tokens still to compute; ties by lot.

    Raises NoReplica when there is no candidate.
    """
    if not candidates:
        raise NoReplica("no replica is ready")
    terms = tuple((candidate.requests, candidate.queued_tokens) for candidate in candidates)
    best = min(terms)
    tied = [index for index, term in enumerate(terms) if term == best]
    return Choice(tied[0] if len(tied) == 1 else rng.choice(tied), terms)
