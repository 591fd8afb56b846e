"""Gateways and replicas in virtual time, running the policy code that serves. Deterministic by seed.

    requests = prepare(scaled(read_trace(path), length_scale=32))
    result = simulate(requests, "affinity", Fleet(replicas=8), rate_scale=2.0)

One heap holds what happens next: a request arrives at a gateway, a submission reaches a replica, a step ends, what a
replica published reaches the gateways, the end of a stream reaches its gateway. Decodes in which nobody comes, ends or
needs a block are one event however many steps they are, so the cost grows with requests, not with tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from policies.fleet_view import RouteRequest
from policies.sim_clock import Clock
from policies.sim_fleet import Autoscale, Fleet, Outage, SimRequest
from policies.sim_outcome import COMPLETED, CUT, TOO_LONG, UNAVAILABLE, Floats, Outcomes, ReplicaShare, shares
from policies.sim_pool import Pool, Ticket
from policies.traces import TraceRequest
from replicas.protocol import block_hash, prefix_root

__all__ = ["Autoscale", "Fleet", "Outage", "ReplicaShare", "SimRequest", "SimResult", "prepare", "simulate"]

_WORD = 0x7FFFFFFF
_MEMO = 1_000_000  # hashes of traced blocks that are remembered while more are made: some 250 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class SimResult:
    """Latencies in seconds from a request's arrival at the gateway; rates a second of virtual time.

    requests = completed + refused (too long for any replica) + unavailable (no replica in time) + cut (a replica died
    after the first token). ttft_s and e2e_s hold the completed ones in the order of their arrival.
    """

    policy: str
    requests: int
    completed: int
    refused: int
    unavailable: int
    cut: int
    duration_s: float
    ttft_s: Floats
    e2e_s: Floats
    hit_rate: float
    output_tokens: int
    replicas: tuple[ReplicaShare, ...]
    events: int
    outcomes: Outcomes = field(repr=False, compare=False)

    def ttft(self, percentile: float) -> float:
        return float(np.percentile(self.ttft_s, percentile)) if self.completed else float("nan")

    @property
    def throughput(self) -> float:
        """Completed requests a second, until the last one."""
        return self.completed / self.duration_s if self.duration_s else 0.0

    @property
    def imbalance(self) -> float:
        """The busiest replica's time in steps over the mean."""
        busy = [replica.busy for replica in self.replicas]
        return max(busy) * len(busy) / sum(busy) if sum(busy) else 1.0


def prepare(requests: Iterable[TraceRequest], block_size: int = 16) -> list[SimRequest]:
    """`prepared`, all at once."""
    return list(prepared(requests, block_size))


def prepared(requests: Iterable[TraceRequest], block_size: int = 16) -> Iterator[SimRequest]:
    """Traced requests with the hashes their prompts' full blocks would have.

    A prefix id stands for `block_tokens` tokens that no other id has; requests without ids share nothing. ValueError
    where blocks of `block_size` do not divide the trace's.
    """
    root = prefix_root("", "simulated")
    known: dict[tuple[bytes, int, int], bytes] = {}
    alone = -1

    def chain(request: TraceRequest) -> Iterator[bytes]:
        nonlocal alone
        parent = root
        for number in range(request.prompt_tokens // block_size):
            if request.prefix_ids:
                at, part = divmod(number * block_size, request.block_tokens)
                name = request.prefix_ids[at]
            else:
                name, part, alone = alone, 0, alone - 1
            digest = known.get((parent, name, part))
            if digest is None:
                digest = block_hash(parent, (name & _WORD, name >> 31 & _WORD, name >> 62 & _WORD, part))
                if request.prefix_ids:
                    known[parent, name, part] = digest
            parent = digest
            yield digest

    for request in requests:
        if request.prefix_ids and request.block_tokens % block_size:
            raise ValueError(f"blocks of {block_size} tokens do not divide the trace's {request.block_tokens}")
        if len(known) > _MEMO:
            known.clear()  # they can be made again
        yield SimRequest(request.arrival_s, request.prompt_tokens, request.output_tokens, tuple(chain(request)), root)


def simulate(
    requests: Iterable[SimRequest],
    policy: str,
    fleet: Fleet,
    *,
    rate_scale: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> SimResult:
    """Run all requests to their ends, arriving `rate_scale` times as fast as they say; they must come in order of time.

    `progress` is told how many have arrived, about every thousand.
    """
    return _Simulation(policy, fleet, seed).run(requests, rate_scale, progress)


class Arrivals:
    """Requests as they come: each is foreseen when the one before has come, so a million need not be in memory."""

    def __init__(
        self,
        clock: Clock,
        coming: Iterable[SimRequest],
        arrive: Callable[[SimRequest, float], None],
        *,
        rate_scale: float = 1.0,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._clock = clock
        self._coming = iter(coming)
        self._arrive = arrive
        self._rate_scale = rate_scale
        self._progress = progress
        self._count = 0
        self.more = True
        self._foresee()

    def _foresee(self) -> None:
        request = next(self._coming, None)
        if request is None:
            self.more = False
        else:
            self._clock.at(request.arrival_s / self._rate_scale, self._come, request)

    def _come(self, request: SimRequest, now: float) -> None:
        self._arrive(request, now)
        self._foresee()
        self._count += 1
        if self._progress is not None and self._count % 1000 == 0:
            self._progress(self._count)


def ticket_of(number: int, request: SimRequest, fleet: Fleet, policy: str) -> Ticket:
    """As a gateway has it; the gateways take turns."""
    route = RouteRequest(
        request_id=str(number),
        prompt_tokens=request.prompt_tokens,
        hashes=request.hashes,
        block_size=fleet.model.block_size,
        max_tokens=request.max_tokens or request.output_tokens,
    )
    return Ticket(number, request, number % fleet.gateways, policy, route)


class _Simulation:
    """One model, one policy, nobody who pays."""

    def __init__(self, policy: str, fleet: Fleet, seed: int) -> None:
        self._policy = policy
        self._fleet = fleet
        self._clock = Clock()
        self._outcomes = Outcomes()
        self._arrivals: Arrivals | None = None
        self._pool = Pool(self._clock, fleet, (policy,), self._outcomes, seed=seed, busy=self._more)

    def _more(self) -> bool:
        return self._arrivals is not None and self._arrivals.more

    def run(
        self, requests: Iterable[SimRequest], rate_scale: float, progress: Callable[[int], None] | None
    ) -> SimResult:
        self._arrivals = Arrivals(self._clock, requests, self._arrive, rate_scale=rate_scale, progress=progress)
        self._clock.run()
        self._outcomes.check()
        return self._result()

    def _arrive(self, request: SimRequest, now: float) -> None:
        if not len(self._outcomes):
            self._pool.start(now)
        ticket = ticket_of(self._outcomes.arrive(now, request.prompt_tokens), request, self._fleet, self._policy)
        if self._fleet.gateway_s:
            self._clock.at(now + self._fleet.gateway_s, self._pool.ask, ticket)
        else:
            self._pool.ask(ticket, now)

    def _result(self) -> SimResult:
        outcomes, now = self._outcomes, self._clock.now
        ends, e2e = outcomes.column("ends"), outcomes.column("e2e_s")
        good = ends == COMPLETED
        last = float(np.max(outcomes.column("arrived")[good] + e2e[good], initial=0.0))
        span = max(0.0, last - outcomes.arrived[0]) if len(ends) else 0.0
        asked = outcomes.column("prompt_tokens")[good].sum()
        return SimResult(
            policy=self._policy,
            requests=len(ends),
            completed=int(good.sum()),
            refused=int((ends == TOO_LONG).sum()),
            unavailable=int((ends == UNAVAILABLE).sum()),
            cut=int((ends == CUT).sum()),
            duration_s=span,
            ttft_s=outcomes.column("ttft_s")[good],
            e2e_s=e2e[good],
            hit_rate=float(outcomes.column("cached_tokens")[good].sum() / asked) if asked else 0.0,
            output_tokens=int(outcomes.column("output_tokens").sum()),
            replicas=shares(self._pool.sites.values(), span, now),
            events=self._clock.foreseen,
            outcomes=outcomes,
        )
