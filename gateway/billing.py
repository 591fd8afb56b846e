"""Every attempt at a request holds what it may cost before it runs, and pays what it did cost, however it ends.

    meter = await charge(job, attempt)      # BudgetExceeded or RateLimited when it may not run
    try:
        ... meter.saw(chunks) ...
    finally:
        meter.end()                         # settled or released

Retries, a cascade's two models, a fallback and a shadow are attempts of their own. An attempt that brought no token is
given back as a whole; one that was cut short pays for the tokens that came. Tokens that were made and that nobody was
shown, because the answer began again elsewhere, are noted as unbilled: the house bears them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.ledger.entries import Reservation, Spend, note
from policies.budget import Account, Price, Subject
from policies.limits import RateLimit
from replicas.protocol import Chunk, ReplicaLost, SignalboxError, Usage
from replicas.upstream_messages import UpstreamUsage

if TYPE_CHECKING:
    from gateway.jobs import Job
    from gateway.ledger.ledger import Ledger

_NOTHING = Usage(prompt_tokens=0, completion_tokens=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Who pays for a job, by which prices, and within which bounds.

    claimant: by which the same request is known when its caller comes again; fresh: that it is known not to have.
    reservations: filled as attempts are made.
    """

    ledger: Ledger
    subject: Subject
    price: Price
    accounts: Sequence[Account] = ()
    limits: Sequence[RateLimit] = ()
    claimant: bytes = b""
    fresh: bool = False
    reservations: list[Reservation] = field(default_factory=list)

    def spend(self, request_id: str, attempt: int, prompt_tokens: int, max_tokens: int) -> Spend:
        return Spend(
            request_id=request_id,
            subject=self.subject,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            price=self.price,
            attempt=attempt,
            claimant=self.claimant,
            fresh=self.fresh and not attempt,
        )


def claimant(key_id: str, body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=12, key=key_id.encode()[:64]).digest()


@dataclass(slots=True)
class Meter:
    """Counts what an attempt brings, and ends it on the books.

    used: what is known to have been used, if anybody has said so. cached: tokens of the prompt that were not computed.
    void: nobody saw anything of it. unseen: its replica may be making tokens that do not come here.
    """

    job: Job
    reservation: Reservation | None = None
    produced: int = 0
    cached: int = 0
    used: Usage | None = None
    void: bool = False
    unseen: bool = False

    def handed_over(self) -> str:
        """To a replica, and what its journal is to know of it; "" where nothing is reserved."""
        self.unseen = True
        held = self.reservation
        return note(held.spend) if held is not None and held.in_database else ""

    def saw(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self.produced += len(chunk.token_ids)
            if chunk.timing is not None:
                self.cached = chunk.timing.cached_tokens
            if chunk.usage is not None:
                self.used = chunk.usage
                self.unseen = False

    def failed(self, error: SignalboxError, *, shown: bool) -> None:
        """A replica that tells of an error has told everything before it; of a lost one nobody knows."""
        self.void = not shown
        self.unseen = self.unseen and isinstance(error, ReplicaLost)

    def end(self) -> None:
        """Once, when the attempt is over."""
        self.job.used = usage = self._usage()
        bill, reservation = self.job.bill, self.reservation
        if bill is None or reservation is None:
            return
        if usage.prompt_tokens or usage.completion_tokens:
            estimated = isinstance(usage, UpstreamUsage) and usage.estimated
            bill.ledger.settle(reservation, usage, estimated=estimated, cut=self.unseen)
        else:
            made = self.produced if self.used is None else self.used.completion_tokens
            bill.ledger.release(reservation, unbilled=made, cut=self.unseen)

    def _usage(self) -> Usage:
        if self.void:
            return _NOTHING
        if self.used is not None:
            return self.used
        if not self.produced:
            return _NOTHING
        return Usage(prompt_tokens=self.job.prompt_tokens, completion_tokens=self.produced, cached_tokens=self.cached)


async def charge(job: Job, attempt: int) -> Meter:
    """Reserve for one attempt. Raises BudgetExceeded, RateLimited or Unavailable, and then holds nothing."""
    bill = job.bill
    if bill is None:
        return Meter(job)
    spend = bill.spend(job.request.request_id, attempt, job.prompt_tokens, job.max_tokens)
    reservation = await bill.ledger.reserve(spend, bill.accounts, bill.limits)
    bill.reservations.append(reservation)
    return Meter(job, reservation)
