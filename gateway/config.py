"""What one gateway must be told: frozen values, every default written here and nowhere else."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from policies.document_limits import Failure
from replicas.protocol import ConfigError
from replicas.upstream_config import Upstream

# Seconds after which what a silent gateway has reserved is closed by another.
LEASE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as callers name it.

    `name` is also the `model` of its replicas' addresses. `default_max_tokens` 0 means whatever the model's own card
    says, and if that is silent too, what is left of the context. `price` is in dollars per million tokens by kind
    ("input", "cached_input", "output"); it is only carried here.
    """

    name: str
    aliases: tuple[str, ...] = ()
    default_max_tokens: int = 0
    price: Mapping[str, float] = field(default_factory=dict)
    owned_by: str = "signalbox"
    created: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a caller may ask for. Counts are per request; `max_choices` bounds prompts x n."""

    max_body_bytes: int = 4 * 1024 * 1024
    max_messages: int = 2048
    max_choices: int = 128
    body_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How long a request without a first token is kept alive while replicas come and go.

    `wait_s` is the total time from the first attempt after which the caller gets 503; `attempts` bounds how many
    replicas one request may be given to, so that a request that kills replicas cannot kill all of them. `backoff_s` is
    the pause before the second attempt, doubled each time. `on`: after which failures (`gateway.retrying`). After
    `breaker_failures` in a row a replica or upstream is left alone for `breaker_cooldown_s`.
    """

    attempts: int = 3
    wait_s: float = 20.0
    retry_after_s: float = 2.0
    backoff_s: float = 0.05
    on: tuple[Failure, ...] = ("lost", "draining", "full", "failed")
    breaker_failures: int = 5
    breaker_cooldown_s: float = 1.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.breaker_failures < 1:
            raise ConfigError("attempts and breaker_failures must be at least 1")
        if min(self.wait_s, self.retry_after_s, self.backoff_s) < 0 or not self.breaker_cooldown_s > 0:
            raise ConfigError("wait_s, retry_after_s and backoff_s must not be negative, breaker_cooldown_s above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Whether hashes, lengths and times of requests are kept for replay, and how much of them; the oldest go first."""

    record: bool = True
    max_requests: int = 1_000_000
    max_mib: float = 256.0
    max_days: float = 7.0

    def __post_init__(self) -> None:
        if min(self.max_requests, self.max_mib, self.max_days) <= 0:
            raise ConfigError("traffic: max_requests, max_mib and max_days must be positive")


def new_gateway_id() -> str:
    """Unique among all gateway processes, living and dead."""
    return f"gw-{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """One gateway process.

    upstreams: for those of `models` that other servers answer, by the same names.
    database_url: SQLAlchemy's; SQLite (WAL) embedded, or a shared server.
    state_dir: where the key secret lives when SIGNALBOX_KEY_SECRET is not in the environment; "" requires the latter.
    key_poll_s: how often changed keys are read; with one poll's own time it must stay below `key_stale_s`, the age
    beyond which a decision first waits for a fresh read.
    lease_s: how long a gateway may be silent before another closes what it has reserved; the same for all of them.
    server_sends_request_id: the server adds x-request-id to responses itself (Ray Serve does).
    alone: nothing else of importance runs in this process, so its interpreter may be set up for the gateway.
    """

    models: tuple[ServedModel, ...]
    database_url: str
    upstreams: tuple[Upstream, ...] = ()
    state_dir: str = ""
    gateway_id: str = field(default_factory=new_gateway_id)
    limits: Limits = field(default_factory=Limits)
    retries: Retries = field(default_factory=Retries)
    traffic: Traffic = field(default_factory=Traffic)
    key_poll_s: float = 0.4
    key_stale_s: float = 0.9
    connect_timeout_s: float = 5.0
    lease_s: float = LEASE_S
    server_sends_request_id: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("the gateway needs at least one model")
        seen: set[str] = set()
        for name in (name for model in self.models for name in (model.name, *model.aliases)):
            if not name or name in seen:
                raise ConfigError(f"model name or alias {name!r} is empty or used twice")
            seen.add(name)
        if unserved := {upstream.name for upstream in self.upstreams} - {model.name for model in self.models}:
            raise ConfigError(f"upstreams of models that are not served: {', '.join(sorted(unserved))}")
        if not 0 < self.key_poll_s < self.key_stale_s <= 1.0:
            raise ConfigError("key_poll_s and key_stale_s must satisfy 0 < key_poll_s < key_stale_s <= 1")
