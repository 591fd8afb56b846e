"""A prompt on its way to a replica or an upstream, and what it met there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gateway.billing import Bill
from gateway.routes import DEFAULT_POLICY
from policies.fleet_view import RouteRequest
from replicas.protocol import GenerateRequest, RouteDecision, SignalboxError, Usage
from replicas.upstream_messages import UpstreamRequest


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
    """

    model: str
    request: GenerateRequest | UpstreamRequest
    route: RouteRequest | None
    policy: str = DEFAULT_POLICY
    generation: int = 0
    whole: bool = False
    max_tokens: int = 0
    bill: Bill | None = None
    first_at: float | None = None
    shown: bool = False
    used: Usage | None = None
    attempts: list[Attempt] = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        request = self.request
        return len(request.prompt_token_ids) if isinstance(request, GenerateRequest) else request.prompt_tokens

    def failed(self, error: SignalboxError) -> None:
        """The latest attempt ended in an error."""
        self.attempts[-1] = replace(self.attempts[-1], error=f"{type(error).__name__}: {error.message}")
