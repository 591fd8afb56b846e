"""One model's replicas in virtual time, and what every gateway knows of them: the policy code that serves, at work.

    pool.ask(ticket, now)      a gateway chooses a replica by its policy and sends the request there
    desk.first / done / failed what becomes of it, when the gateway learns of it

What gateways know is as old as it is in life: a replica publishes between steps, its load at most every `status_s`, and
every message takes `lag_s`. All gateways hear the same events at the same time, so one index of prefixes stands for all
of theirs; each has its own books of what it sent.

A replica that dies takes its requests along. A gateway gives those that had no token yet to another one, as
`gateway.dispatch` does; the others are cut.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from policies.fleet_view import FleetLoads, RouteRequest
from policies.peers import POLICIES, Policy
from policies.prefix_history import HistoryIndex
from policies.prefix_index import Counts, PrefixSource
from policies.sim_clock import Clock
from policies.sim_fleet import Fleet, SimRequest
from policies.sim_index import HolderIndex
from policies.sim_replica import SimReplica, SimSequence, StepResult
from replicas.protocol import KVEvent, NoReplica

_READS_EVENTS = {"affinity"}
_READS_HISTORY = {"cache_aware"}

# (numbers, whether it takes work, the last submission it admitted of each gateway)
_Report = tuple[tuple[float, ...], bool, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class Ticket:
    """A request at its gateway. shown: its first token went out. placed: the replica it is at, while it is at one.

    patient: a replica is waited for, if there is none. refused: the last one that was tried had a full queue.
    """

    number: int
    request: SimRequest
    gateway: int
    policy: str
    route: RouteRequest
    deadline: float = 0.0
    attempts: int = 0
    tried: tuple[str, ...] = ()
    shown: bool = False
    placed: Site | None = None
    cached: int = 0
    patient: bool = True
    refused: bool = False


class Desk(Protocol):
    """Who is told. `now` is when the gateway learns of it."""

    def first(self, ticket: Ticket, now: float) -> None: ...
    def done(self, ticket: Ticket, now: float) -> None: ...
    def failed(self, ticket: Ticket, why: str, now: float) -> None:
        """why: "too_long", "unavailable" (nothing was answered) or "cut" (something was)."""
        ...


@dataclass(slots=True, eq=False)
class Site:
    """A replica and what the simulator must remember of it: its step from `began` to `ends`, what it admitted of each
    gateway, and what it published last. `past` are the processes that died under this name."""

    name: str
    replica: SimReplica
    incarnation: int = 1
    alive: bool = True
    draining: bool = False
    admitted: list[int] = field(default_factory=list)
    tickets: dict[int, Ticket] = field(default_factory=dict)
    past: list[SimReplica] = field(default_factory=list)
    stepping: bool = False
    began: float = 0.0
    ends: float = -1.0
    published: float = float("-inf")
    requests: int = 0
    since: float = 0.0
    up_s: float = 0.0

    def go(self, now: float) -> None:
        """It is dead, or dismissed."""
        self.alive, self.stepping, self.ends = False, False, -1.0
        self.up_s += now - self.since


class _Gateway:
    def __init__(self, name: str, index: PrefixSource, history: HistoryIndex | None, seed: int) -> None:
        self.name = name
        self.rng = random.Random(f"{seed} {name}")
        self.loads = FleetLoads(name, prefixes=index, history=history)
        self.last_seq: dict[str, int] = {}


class _TrueCaches:
    """The replicas' caches themselves, read at the instant of the decision."""

    def __init__(self, sites: dict[str, Site]) -> None:
        self._sites = sites

    def leading(self, hashes: Sequence[bytes], replica_ids: tuple[str, ...]) -> Counts:
        return np.array([self._sites[name].replica.cache.leading(hashes) for name in replica_ids], np.int64)


class Pool:
    """busy: whether anything may still come; it keeps autoscaling awake."""

    def __init__(
        self,
        clock: Clock,
        fleet: Fleet,
        policies: Sequence[str],
        desk: Desk,
        *,
        seed: int = 0,
        busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.fleet = fleet
        self.sites: dict[str, Site] = {}
        self._clock = clock
        self._desk = desk
        self._busy = busy
        self._policies: dict[str, Policy] = {name: POLICIES[name] for name in policies}
        self._listens = bool(_READS_EVENTS.intersection(policies)) and not fleet.all_seeing
        self._index = HolderIndex()
        self._waiting: dict[Ticket, None] = {}  # for any replica at all
        self._unneeded_since: float | None = None
        self._starting = 0
        seen: PrefixSource = _TrueCaches(self.sites) if fleet.all_seeing else self._index
        blocks, keeps = fleet.model.num_blocks, bool(_READS_HISTORY.intersection(policies))
        self._gateways = [
            _Gateway(f"gateway-{n}", seen, HistoryIndex(blocks) if keeps else None, seed) for n in range(fleet.gateways)
        ]
        for _ in range(fleet.replicas):
            self._add_site(0.0)

    def start(self, now: float) -> None:
        """The first request has come: what befalls the fleet counts from here."""
        for site in self.sites.values():
            site.since = now
        for outage in self.fleet.outages:
            site = self.sites[f"replica-{outage.replica}"]
            self._clock.at(now + outage.at_s, self._kill, site, outage.down_s)
        if self.fleet.autoscale is not None:
            self._clock.at(now + self.fleet.autoscale.look_s, self._look)

    def ready(self) -> int:
        """How many replicas take work, as gateways know it."""
        return int(self._gateways[0].loads.view().eligible.sum())

    def check(self, now: float) -> None:
        """Nothing is left of any request; AssertionError."""
        for site in self.sites.values():
            if site.alive:
                site.replica.check_integrity()
            assert not site.tickets, f"{site.name} still has requests at {now}"
        assert not self._waiting, "a request still waits for a replica"

    # ---------------------------------------------------------------- at a gateway

    def ask(self, ticket: Ticket, now: float) -> None:
        """Give the request to a replica, or let it wait for one."""
        if ticket.attempts == 0:
            ticket.deadline = now + self.fleet.wait_s
        gateway = self._gateways[ticket.gateway]
        if self.fleet.all_seeing:
            for site in self._living():
                self._hear(site, self._report(site), [], site.incarnation, now)
        try:
            view = gateway.loads.view(ticket.tried) if ticket.tried else gateway.loads.view()
            decision = self._policies[ticket.policy](ticket.route, view, now, gateway.rng)
        except NoReplica:
            if ticket.refused or not ticket.patient:  # a full queue is not waited for, only tried elsewhere
                self._desk.failed(ticket, "unavailable", now)
                return
            self._waiting[ticket] = None
            self._clock.at(ticket.deadline, self._give_up, ticket)
            return
        name = decision.replica_id
        site = self.sites[name]
        submission = gateway.last_seq[name] = gateway.last_seq.get(name, 0) + 1
        gateway.loads.sent(ticket.route, decision, submission)
        ticket.attempts += 1
        self._clock.at(now + self.fleet.lag_s, self._submit, site, site.incarnation, gateway, submission, ticket)

    def _give_up(self, ticket: Ticket, now: float) -> None:
        if ticket in self._waiting:
            del self._waiting[ticket]
            self._desk.failed(ticket, "unavailable", now)

    def _left(self, site: Site, incarnation: int, gateway: int, now: float) -> None:
        """The gateway learns that a stream is over."""
        self._gateways[gateway].loads.ended(site.name, str(incarnation))

    def _told_done(self, site: Site, incarnation: int, ticket: Ticket, now: float) -> None:
        self._left(site, incarnation, ticket.gateway, now)
        self._desk.done(ticket, now)

    def _told_refused(self, site: Site, incarnation: int, ticket: Ticket, now: float) -> None:
        self._left(site, incarnation, ticket.gateway, now)
        self._desk.failed(ticket, "too_long", now)

    def _hear(self, site: Site, report: _Report | None, events: list[KVEvent], incarnation: int, now: float) -> None:
        if site.incarnation != incarnation or not site.alive:
            return
        if events:
            self._index.apply(site.name, events)
        if report is not None:
            numbers, ready, admitted = report
            name, process = site.name, str(incarnation)
            for gateway, last in zip(self._gateways, admitted, strict=True):
                gateway.loads.heard(name, process, numbers, ready=ready, admitted=last)

    def _told_full(self, site: Site, incarnation: int, ticket: Ticket, now: float) -> None:
        self._left(site, incarnation, ticket.gateway, now)
        ticket.refused = True
        ticket.tried = (*ticket.tried, site.name)
        if ticket.attempts >= self.fleet.attempts:
            self._desk.failed(ticket, "unavailable", now)
        else:
            self.ask(ticket, now)

    def _lost(self, ticket: Ticket, name: str, now: float) -> None:
        """The gateway learns that the replica died under this request."""
        if ticket.shown:
            self._desk.failed(ticket, "cut", now)
            return
        ticket.tried = (*ticket.tried, name)
        if ticket.attempts >= self.fleet.attempts:
            self._desk.failed(ticket, "unavailable", now)
        else:
            self._clock.at(now + self.fleet.pause_s * ticket.attempts, self.ask, ticket)

    # ---------------------------------------------------------------- replicas come and go

    def _living(self) -> list[Site]:
        return [site for site in self.sites.values() if site.alive]

    def _add_site(self, now: float) -> None:
        number = len(self.sites)
        site = self.sites[f"replica-{number}"] = Site(
            f"replica-{number}", SimReplica(self.fleet.model), admitted=[0] * len(self._gateways), since=now
        )
        self._join(site, now)

    def _join(self, site: Site, now: float) -> None:
        for gateway in self._gateways:
            gateway.loads.join(site.name, str(site.incarnation))
        self._index.join(site.name)
        waiting, self._waiting = self._waiting, {}
        for ticket in waiting:
            self.ask(ticket, now)

    def _leave(self, name: str, now: float) -> None:
        for gateway in self._gateways:
            gateway.loads.leave(name)
            if gateway.loads.history is not None:
                gateway.loads.history.drop(name)
            gateway.last_seq.pop(name, None)
        self._index.drop(name)

    def _kill(self, site: Site, down_s: float, now: float) -> None:
        if not site.alive:
            return
        lost, site.tickets = list(site.tickets.values()), {}
        site.go(now)
        site.past.append(site.replica)
        heard = now + self.fleet.lag_s
        self._clock.at(heard, lambda when: self._leave(site.name, when))
        for ticket in lost:
            ticket.placed = None
            self._clock.at(heard, self._lost, ticket, site.name)
        if down_s < float("inf"):
            self._clock.at(max(now + down_s, heard), self._revive, site)

    def _revive(self, site: Site, now: float) -> None:
        site.replica = SimReplica(self.fleet.model)
        site.incarnation += 1
        site.alive, site.draining, site.since = True, False, now
        site.admitted, site.published = [0] * len(self._gateways), float("-inf")
        self._join(site, now)

    # ---------------------------------------------------------------- autoscaling

    def _look(self, now: float) -> None:
        scale = self.fleet.autoscale
        assert scale is not None, "only looked at where there is something to see"
        open_ = sum(len(site.tickets) for site in self._living()) + len(self._waiting)
        if not open_ and not self._busy():
            return
        ready = [site for site in self._living() if not site.draining]
        wanted = scale.wanted(open_)
        have = len(ready) + self._starting
        if wanted > have:
            for _ in range(wanted - have):
                self._starting += 1
                self._clock.at(now + scale.start_s, self._started)
        if wanted >= have:
            self._unneeded_since = None
        elif self._unneeded_since is None:
            self._unneeded_since = now
        elif now - self._unneeded_since >= scale.down_after_s and len(ready) > scale.least:
            self._drain(ready[-1], now)
            self._unneeded_since = now
        self._clock.at(now + scale.look_s, self._look)

    def _started(self, now: float) -> None:
        self._starting -= 1
        self._add_site(now)

    def _drain(self, site: Site, now: float) -> None:
        site.draining = True
        self._clock.at(now + self.fleet.lag_s, self._hear, site, self._report(site), [], site.incarnation)
        self._dismiss_if_idle(site, now)

    def _dismiss_if_idle(self, site: Site, now: float) -> None:
        """Two messages' time after it fell idle nothing can be on its way to it any more."""
        if site.draining and site.alive and not site.tickets:
            self._clock.at(now + 2 * self.fleet.lag_s + 1e-9, self._dismiss, site)

    def _dismiss(self, site: Site, now: float) -> None:
        if site.alive and not site.tickets:
            site.go(now)
            self._leave(site.name, now)

    # ---------------------------------------------------------------- at a replica

    def _submit(
        self, site: Site, incarnation: int, gateway: _Gateway, submission: int, ticket: Ticket, now: float
    ) -> None:
        if site.incarnation != incarnation or not site.alive:
            self._clock.at(now + self.fleet.lag_s, self._lost, ticket, site.name)
            return
        site.admitted[ticket.gateway] = submission
        request = ticket.request
        seq = SimSequence(
            ticket.number, request.prompt_tokens, request.output_tokens, request.hashes, request.root, tag=ticket
        )
        if not site.replica.fits(seq):
            self._clock.at(now + self.fleet.lag_s, self._told_refused, site, incarnation, ticket)
            return
        if site.replica.is_full():
            self._clock.at(now + self.fleet.lag_s, self._told_full, site, incarnation, ticket)
            return
        ticket.refused = False
        site.requests += 1
        site.tickets[ticket.number] = ticket
        ticket.placed = site
        site.replica.add(seq)
        if site.stepping:
            self._end_step_at(site, site.began + site.replica.cut(now - site.began))
        else:
            self._begin(site, now)

    def _begin(self, site: Site, now: float) -> None:
        site.stepping, site.began = True, now
        self._end_step_at(site, now + site.replica.begin())

    def _end_step_at(self, site: Site, when: float) -> None:
        if when != site.ends:  # else it is foreseen already
            site.ends = when
            self._clock.at(when, self._step, site)

    def _step(self, site: Site, now: float) -> None:
        if now != site.ends:
            return  # it was cut short and has ended, or the replica is dead
        site.ends = -1.0
        result = site.replica.finish()
        if result.first or result.done:
            self._tell(site, result, now + self.fleet.lag_s)
        site.stepping = False
        if site.replica.has_work():
            self._begin(site, now)
        self._publish(site, now)
        if site.draining:
            self._dismiss_if_idle(site, now)

    def _tell(self, site: Site, result: StepResult, heard: float) -> None:
        for seq in result.first:
            ticket: Ticket = seq.tag
            ticket.shown = True
            self._desk.first(ticket, heard)
        for seq in result.done:
            ticket = seq.tag
            ticket.placed = None
            ticket.cached = seq.cached
            del site.tickets[ticket.number]
            self._clock.at(heard, self._told_done, site, site.incarnation, ticket)

    def _publish(self, site: Site, now: float) -> None:
        events = site.replica.cache.take_events()
        if self.fleet.all_seeing:
            return
        if not self._listens:
            events = []
        due = not site.stepping or now - site.published >= self.fleet.status_s
        if due or events:
            report = self._report(site) if due else None
            site.published = now if due else site.published
            self._clock.at(now + self.fleet.lag_s, self._hear, site, report, events, site.incarnation)

    def _report(self, site: Site) -> _Report:
        return site.replica.numbers(), not site.draining, tuple(site.admitted)
