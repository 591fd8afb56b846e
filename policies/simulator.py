"""Gateways and replicas in virtual time, running the policy code that serves. Deterministic by seed.

    requests = prepare(scaled(read_trace(path), length_scale=32))
    result = simulate(requests, "affinity", Fleet(replicas=8), rate_scale=2.0)

One heap holds what happens next: a request arrives at a gateway, a submission reaches a replica, a step ends, what a
replica published reaches the gateways, the end of a stream reaches its gateway. What gateways know is as old as it is
in life: a replica publishes between steps, its load at most every `status_s`, and every message takes `lag_s`.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from policies.fleet_view import FleetLoads, RouteRequest
from policies.peers import POLICIES, Policy
from policies.prefix_history import HistoryIndex
from policies.prefix_index import Counts, PrefixIndex, PrefixSource
from policies.sim_replica import ReplicaModel, SimReplica, SimSequence
from policies.traces import TraceRequest
from replicas.protocol import KVEvent, ReplicaState, ReplicaStatus, block_hash, prefix_root

_INCARNATION = "1"
_READS_EVENTS = {"affinity"}
_READS_HISTORY = {"cache_aware"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What is simulated. all_seeing: every decision sees the replicas' true load and caches, of this very instant."""

    replicas: int = 8
    gateways: int = 1
    model: ReplicaModel = field(default_factory=ReplicaModel)
    status_s: float = 0.02
    lag_s: float = 0.002
    all_seeing: bool = False


@dataclass(frozen=True, slots=True)
class SimRequest:
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[bytes, ...]
    root: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaShare:
    """One replica's part. busy: share of the run it spent in steps."""

    requests: int
    prompt_tokens: int
    busy: float
    hit_rate: float
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SimResult:
    """Latencies in seconds from a request's arrival at the gateway; rates a second of virtual time.

    requests = completed + refused. ttft_s and e2e_s hold the completed ones in the order of their arrival.
    """

    policy: str
    requests: int
    completed: int
    refused: int
    duration_s: float
    ttft_s: np.ndarray[tuple[int], np.dtype[np.float64]]
    e2e_s: np.ndarray[tuple[int], np.dtype[np.float64]]
    hit_rate: float
    output_tokens: int
    replicas: tuple[ReplicaShare, ...]
    events: int

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


def prepare(requests: Sequence[TraceRequest], block_size: int = 16) -> list[SimRequest]:
    """Traced requests with the hashes their prompts' full blocks would have.

    A prefix id stands for `block_tokens` tokens that no other id has; requests without ids share nothing.
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
                digest = block_hash(parent, (name & 0x7FFFFFFF, part, *([0] * (block_size - 2))))
                if request.prefix_ids:
                    known[parent, name, part] = digest
            parent = digest
            yield digest

    for request in requests:
        if request.prefix_ids and request.block_tokens % block_size:
            raise ValueError(f"blocks of {block_size} tokens do not divide the trace's {request.block_tokens}")
    return [SimRequest(r.arrival_s, r.prompt_tokens, r.output_tokens, tuple(chain(r)), root) for r in requests]


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


class _TrueCaches:
    """The replicas' caches themselves, read at the instant of the decision."""

    def __init__(self, replicas: dict[str, SimReplica]) -> None:
        self._replicas = replicas

    def leading(self, hashes: Sequence[bytes], replica_ids: tuple[str, ...]) -> Counts:
        return np.array([self._replicas[name].cache.leading(hashes) for name in replica_ids], np.int64)


class _Gateway:
    def __init__(self, name: str, policy: str, fleet: Fleet, prefixes: PrefixSource, seed: int) -> None:
        self.name = name
        self.rng = random.Random(f"{seed} {name}")
        blocks = fleet.model.num_blocks
        history = HistoryIndex(blocks) if policy in _READS_HISTORY else None
        self.loads = FleetLoads(name, prefixes=prefixes, history=history)
        self.index = prefixes if isinstance(prefixes, PrefixIndex) else None
        self.last_seq: dict[str, int] = {}


@dataclass(slots=True)
class _Site:
    """A replica and what the simulator must remember of it: its step from `began` to `ends`, what it admitted of each
    gateway, and what it published last."""

    name: str
    replica: SimReplica
    admitted: dict[str, int] = field(default_factory=dict)
    stepping: bool = False
    began: float = 0.0
    ends: float = -1.0
    published: float = float("-inf")
    next_event: int = 1
    requests: int = 0


class _Simulation:
    def __init__(self, policy: str, fleet: Fleet, seed: int) -> None:
        self._policy: Policy = POLICIES[policy]
        self._name = policy
        self._fleet = fleet
        self._sites = [_Site(f"replica-{n}", SimReplica(fleet.model)) for n in range(fleet.replicas)]
        self._site_of = {site.name: site for site in self._sites}
        self._listens = policy in _READS_EVENTS and not fleet.all_seeing
        truth = _TrueCaches({site.name: site.replica for site in self._sites})
        self._gateways = [
            _Gateway(f"gateway-{n}", policy, fleet, truth if fleet.all_seeing else PrefixIndex(), seed)
            for n in range(fleet.gateways)
        ]
        for gateway in self._gateways:
            for site in self._sites:
                gateway.loads.join(site.name, _INCARNATION)
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._foreseen = 0
        self._arrived = array("d")
        self._ttft = array("d")
        self._e2e = array("d")
        self._refused = 0
        self._output_tokens = 0
        self._now = 0.0

    def run(
        self, requests: Iterable[SimRequest], rate_scale: float, progress: Callable[[int], None] | None
    ) -> SimResult:
        coming = iter(requests)
        self._await_arrival(coming, rate_scale, progress)
        while self._heap:
            self._now, _, happens = heapq.heappop(self._heap)
            happens(self._now)
        return self._result()

    def _at(self, when: float, happens: Callable[[float], None]) -> None:
        """Of what happens at the same instant, the first that was foreseen comes first."""
        self._foreseen += 1
        heapq.heappush(self._heap, (when, self._foreseen, happens))

    # ---------------------------------------------------------------- at a gateway

    def _await_arrival(
        self, coming: Iterator[SimRequest], rate_scale: float, progress: Callable[[int], None] | None
    ) -> None:
        request = next(coming, None)
        if request is None:
            return

        def arrive(now: float) -> None:
            self._arrive(now, request)
            self._await_arrival(coming, rate_scale, progress)
            if progress is not None and len(self._arrived) % 1000 == 0:
                progress(len(self._arrived))

        self._at(request.arrival_s / rate_scale, arrive)

    def _arrive(self, now: float, request: SimRequest) -> None:
        number = len(self._arrived)
        self._arrived.append(now)
        self._ttft.append(float("nan"))
        self._e2e.append(float("nan"))
        gateway = self._gateway_of(number)
        if self._fleet.all_seeing:
            for site in self._sites:
                gateway.loads.report(self._status(site))
        prompt = RouteRequest(
            request_id=str(number),
            prompt_tokens=request.prompt_tokens,
            hashes=request.hashes,
            block_size=self._fleet.model.block_size,
            max_tokens=request.output_tokens,
        )
        decision = self._policy(prompt, gateway.loads.view(), now, gateway.rng)
        site = self._site_of[decision.replica_id]
        submission = gateway.last_seq[site.name] = gateway.last_seq.get(site.name, 0) + 1
        gateway.loads.sent(prompt, decision, submission)
        seq = SimSequence(number, request.prompt_tokens, request.output_tokens, request.hashes, request.root)
        self._at(now + self._fleet.lag_s, partial(self._submit, site, gateway, submission, seq))

    def _hear(
        self, site: _Site, status: ReplicaStatus | None, first: int, events: Sequence[KVEvent], now: float
    ) -> None:
        for gateway in self._gateways:
            if events and gateway.index is not None:
                gateway.index.apply(site.name, _INCARNATION, first, events)
            if status is not None:
                gateway.loads.report(status)

    def _gateway_of(self, number: int) -> _Gateway:
        return self._gateways[number % len(self._gateways)]

    def _leave(self, site: _Site, number: int, now: float) -> None:
        """The gateway learns that a stream is over."""
        loads = self._gateway_of(number).loads
        self._at(now + self._fleet.lag_s, lambda _: loads.ended(site.name))

    # ---------------------------------------------------------------- at a replica

    def _submit(self, site: _Site, gateway: _Gateway, submission: int, seq: SimSequence, now: float) -> None:
        site.admitted[gateway.name] = submission
        if not site.replica.fits(seq):
            self._refused += 1
            self._leave(site, seq.number, now)
            return
        site.requests += 1
        site.replica.add(seq)
        if site.stepping:
            self._end_step_at(site, site.began + site.replica.cut(now - site.began))
        else:
            self._begin(site, now)

    def _begin(self, site: _Site, now: float) -> None:
        site.stepping, site.began = True, now
        self._end_step_at(site, now + site.replica.begin())

    def _end_step_at(self, site: _Site, when: float) -> None:
        if when != site.ends:  # else it is foreseen already
            site.ends = when
            self._at(when, partial(self._step, site))

    def _step(self, site: _Site, now: float) -> None:
        if now != site.ends:
            return  # it was cut short and has ended
        site.ends = -1.0
        result = site.replica.finish()
        heard = now + self._fleet.lag_s
        for seq in result.first:
            self._ttft[seq.number] = heard - self._arrived[seq.number]
        for seq in result.done:
            self._e2e[seq.number] = heard - self._arrived[seq.number]
            self._output_tokens += seq.output_tokens
            self._leave(site, seq.number, now)
        site.stepping = False
        if site.replica.has_work():
            self._begin(site, now)
        self._publish(site, now)

    def _publish(self, site: _Site, now: float) -> None:
        events = site.replica.cache.take_events()
        if self._fleet.all_seeing:
            return
        if not self._listens:
            events = []
        due = not site.stepping or now - site.published >= self._fleet.status_s
        if due or events:
            status = self._status(site) if due else None
            site.published = now if due else site.published
            self._at(now + self._fleet.lag_s, partial(self._hear, site, status, site.next_event, events))
            site.next_event += len(events)

    def _status(self, site: _Site) -> ReplicaStatus:
        return ReplicaStatus(
            replica_id=site.name,
            incarnation=_INCARNATION,
            model="simulated",
            state=ReplicaState.READY,
            stats=site.replica.stats(),
            admitted=dict(site.admitted),
        )

    # ---------------------------------------------------------------- the end

    def _result(self) -> SimResult:
        for site in self._sites:
            site.replica.check_integrity()
        e2e = np.frombuffer(self._e2e, np.float64)
        ended = ~np.isnan(e2e)
        assert int(ended.sum()) + self._refused == len(e2e), "a request neither completed nor was refused"
        span = self._now - (self._arrived[0] if len(self._arrived) else 0.0)
        queries = sum(site.replica.prefix_queries for site in self._sites)
        return SimResult(
            policy=self._name,
            requests=len(e2e),
            completed=int(ended.sum()),
            refused=self._refused,
            duration_s=span,
            ttft_s=np.frombuffer(self._ttft, np.float64)[ended],
            e2e_s=e2e[ended],
            hit_rate=sum(site.replica.prefix_hits for site in self._sites) / queries if queries else 0.0,
            output_tokens=self._output_tokens,
            replicas=tuple(self._share(site, span) for site in self._sites),
            events=self._foreseen,
        )

    def _share(self, site: _Site, span: float) -> ReplicaShare:
        replica = site.replica
        return ReplicaShare(
            requests=site.requests,
            prompt_tokens=replica.prompt_tokens,
            busy=replica.busy_s / span if span else 0.0,
            hit_rate=replica.prefix_hits / replica.prefix_queries if replica.prefix_queries else 0.0,
            num_preemptions=replica.num_preemptions,
        )
