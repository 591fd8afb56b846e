"""What is simulated: a fleet, what befalls it, and the requests that come. Frozen values only."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from policies.sim_replica import ReplicaModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """A replica's process dies at `at_s`, in seconds from the first arrival, and is back with an empty cache after
    `down_s`."""

    replica: int
    at_s: float
    down_s: float = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscale:
    """As many replicas as have `target` requests each, running and waiting; looked at every `look_s`.

    start_s: from the decision until a new replica takes requests. down_after_s: only after fewer would have done for
    so long does the youngest drain.
    """

    most: int
    least: int = 1
    target: float = 8.0
    look_s: float = 1.0
    start_s: float = 30.0
    down_after_s: float = 60.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ValueError(f"autoscaling needs 1 <= least ({self.least}) <= most ({self.most})")
        if min(self.target, self.look_s) <= 0 or min(self.start_s, self.down_after_s) < 0:
            raise ValueError("autoscaling's target and times must be positive")

    def wanted(self, requests: int) -> int:
        return max(self.least, min(self.most, math.ceil(requests / self.target)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """One model's replicas and the gateways in front of them. Seconds.

    all_seeing: every decision sees the replicas' true load and caches, of this very instant.
    status_s: between two reports of a replica. lag_s: of every message. gateway_s: from a request's arrival to its
    choice of a replica. attempts, pause_s, wait_s: how a gateway tries again elsewhere while nothing was answered.
    """

    replicas: int = 8
    gateways: int = 1
    model: ReplicaModel = field(default_factory=ReplicaModel)
    status_s: float = 0.02
    lag_s: float = 0.002
    gateway_s: float = 0.0
    all_seeing: bool = False
    outages: tuple[Outage, ...] = ()
    autoscale: Autoscale | None = None
    attempts: int = 3
    pause_s: float = 0.05
    wait_s: float = 20.0

    def __post_init__(self) -> None:
        if min(self.replicas, self.gateways, self.attempts) < 1:
            raise ValueError("a fleet has at least one replica, one gateway and one attempt")
        for outage in self.outages:
            if not 0 <= outage.replica < self.replicas:
                raise ValueError(f"there is no replica {outage.replica} among {self.replicas} that could fail")


@dataclass(frozen=True, slots=True)
class SimRequest:
    """hashes: of the prompt's full blocks, a chain from `root`. max_tokens: what was asked for; 0 is output_tokens."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[bytes, ...]
    root: bytes
    max_tokens: int = 0
