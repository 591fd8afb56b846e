"""What became of simulated requests: arrays that grow by one entry a request, and the figures made of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies.sim_pool import Site, Ticket

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]

# How a request ended. OPEN is no end: at the end of a simulation nobody has it. LIMITED: by a rate limit, BLOCKED: by a
# budget, UNKNOWN: no model of the name.
OPEN, COMPLETED, TOO_LONG, UNAVAILABLE, CUT, LIMITED, BLOCKED, UNKNOWN = range(8)
ENDS = {"too_long": TOO_LONG, "unavailable": UNAVAILABLE, "cut": CUT}


class Outcomes:
    """One entry a request, in the order of their arrival. Seconds count from the arrival at the gateway.

    cost: pico-dollars. model: the last one that was asked, by its number in the world; -1 where none was.
    """

    def __init__(self) -> None:
        self.arrived = array("d")
        self.ttft_s = array("d")
        self.e2e_s = array("d")
        self.prompt_tokens = array("q")
        self.output_tokens = array("q")
        self.cached_tokens = array("q")
        self.ends = array("B")
        self.cost = array("q")
        self.model = array("h")
        self.generation = array("l")

    def __len__(self) -> int:
        return len(self.arrived)

    def arrive(self, now: float, prompt_tokens: int) -> int:
        """The new request's number."""
        self.arrived.append(now)
        self.ttft_s.append(float("nan"))
        self.e2e_s.append(float("nan"))
        self.prompt_tokens.append(prompt_tokens)
        self.output_tokens.append(0)
        self.cached_tokens.append(0)
        self.ends.append(OPEN)
        self.cost.append(0)
        self.model.append(-1)
        self.generation.append(0)
        return len(self.arrived) - 1

    def first(self, ticket: Ticket, now: float) -> None:
        self.ttft_s[ticket.number] = now - self.arrived[ticket.number]

    def done(self, ticket: Ticket, now: float) -> None:
        number = ticket.number
        self.e2e_s[number] = now - self.arrived[number]
        self.output_tokens[number] = ticket.request.output_tokens
        self.cached_tokens[number] = max(ticket.cached, 0)
        self.end(number, COMPLETED)

    def failed(self, ticket: Ticket, why: str, now: float) -> None:
        self.end(ticket.number, ENDS[why])

    def end(self, number: int, how: int) -> None:
        assert self.ends[number] == OPEN, f"request {number} ended twice"
        self.ends[number] = how

    def column(self, name: str) -> Any:
        """One of the arrays as numpy's, a copy: an array that numpy looks into cannot grow."""
        return np.array(getattr(self, name))

    def check(self) -> None:
        assert OPEN not in self.ends, "a request neither completed nor was refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaShare:
    """One replica's part. busy: share of the run it spent in steps. up_s: seconds for which it lived."""

    requests: int
    prompt_tokens: int
    busy: float
    hit_rate: float
    num_preemptions: int
    up_s: float


def shares(sites: Iterable[Site], span: float, now: float) -> tuple[ReplicaShare, ...]:
    """Every replica's part, those of its dead processes included, after a recount of what it holds."""
    found = []
    for site in sites:
        if site.alive:
            site.replica.check_integrity()
        processes = {id(one): one for one in (*site.past, site.replica)}.values()
        queries = sum(one.prefix_queries for one in processes)
        found.append(
            ReplicaShare(
                requests=site.requests,
                prompt_tokens=sum(one.prompt_tokens for one in processes),
                busy=sum(one.busy_s for one in processes) / span if span else 0.0,
                hit_rate=sum(one.prefix_hits for one in processes) / queries if queries else 0.0,
                num_preemptions=sum(one.num_preemptions for one in processes),
                up_s=site.up_s + (now - site.since if site.alive else 0.0),
            )
        )
    return tuple(found)
