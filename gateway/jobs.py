"""A prompt on its way to a replica or an upstream, and what it met there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from gateway.billing import Bill
from gateway.routes import DEFAULT_POLICY
from policies.admission import Bounds
from policies.fleet_view import RouteRequest
from replicas.protocol import Chunk, GenerateRequest, RouteDecision, SignalboxError, Timing, Usage
from replicas.upstream_messages import UpstreamChunk, UpstreamRequest

if TYPE_CHECKING:
    from gateway.tracing import AttemptSpan, Trace


@dataclass(frozen=True, slots=True)
class Attempt:
    """One replica that a request was given to: why that one, when (Unix seconds), and what became of it."""

    decision: RouteDecision
    at: float
    error: str | None = None


@dataclass(slots=True, kw_only=True)
class Job:
    """A prompt on its way. `attempts` grows with every replica it is given to.

    whole: nobody sees the answer before it is complete, so it may begin again elsewhere even after its first token.
    max_tokens: of all its choices together. bill: who pays; None where nobody does.
    first_at: when its first chunk came (perf_counter). shown: something of the answer was handed on. used: what is
    known to have been used, set when it ends. route: what a choice among replicas is made by; upstreams need none.
    role: as in `explain.Step`. timing: where its time went in the engine, when that has ended. trace, span: None where
    nobody traces; finish_reasons: of a traced one's choices. until: its deadline, by the loop's clock. bounds: of what
    may wait for its model. avoid: replicas not to be given to. on_first: called when its first chunk has come.
    """

    model: str
    request: GenerateRequest | UpstreamRequest
    route: RouteRequest | None
    role: str = "answer"
    policy: str = DEFAULT_POLICY
    generation: int = 0
    whole: bool = False
    max_tokens: int = 0
    bill: Bill | None = None
    first_at: float | None = None
    shown: bool = False
    used: Usage | None = None
    timing: Timing | None = None
    attempts: list[Attempt] = field(default_factory=list)
    trace: Trace | None = None
    span: AttemptSpan | None = None
    finish_reasons: tuple[str, ...] = ()
    until: float | None = None
    bounds: Bounds | None = None
    avoid: frozenset[str] = frozenset()
    on_first: Callable[[], None] | None = None

    @property
    def prompt_tokens(self) -> int:
        request = self.request
        return len(request.prompt_token_ids) if isinstance(request, GenerateRequest) else request.prompt_tokens

    def again(self, request_id: str, role: str) -> Job:
        """The same prompt for replicas that have not got it; its caller's rate limits do not count it twice."""
        assert isinstance(self.request, GenerateRequest), "an upstream has no other replica"
        return replace(
            self,
            request=replace(self.request, request_id=request_id),
            role=role,
            bill=replace(self.bill, limits=(), reservations=[]) if self.bill is not None else None,
            avoid=frozenset(attempt.decision.replica_id for attempt in self.attempts),
            attempts=[],
            first_at=None,
            on_first=None,
            used=None,
            span=None,
        )

    def began(self, decision: RouteDecision, address: str) -> None:
        """It is given to a replica at `address`."""
        self.attempts.append(Attempt(decision, time.time()))
        if self.trace is not None:
            self.span = self.trace.attempt(self, address)

    def saw(self, ready: Sequence[Chunk] | Sequence[UpstreamChunk]) -> None:
        """Something of it came; never nothing."""
        if self.first_at is None:
            self.first_at = time.perf_counter()
            if self.on_first is not None:
                self.on_first()
        last = ready[-1]
        if last.usage is not None and isinstance(last, Chunk):
            self.timing = last.timing
        if self.span is not None:
            self.span.saw(ready)

    def failed(self, error: SignalboxError) -> None:
        """The latest attempt ended in an error."""
        self.attempts[-1] = replace(self.attempts[-1], error=f"{type(error).__name__}: {error.message}")
        if self.span is not None:
            self.span.failure = error

    def ended(self) -> None:
        """The latest attempt is over and `used` is known; called in its `finally`."""
        if self.span is not None:
            self.span.end()
            self.span = None
