"""Sections of the policy document about money, limits and failures.

A rule's `key`, `team` and `model` say whom it concerns; those left out do not matter, and "*" stands for each one by
itself: {key: "*", usd: 5, window: day} gives every key five dollars a day of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from policies.section import Count, Dollars, Listed, Name, Seconds, Section, Share

Window = Literal["minute", "hour", "day", "month", "total"]


class Alerts(Section):
    """Shares of the budget at which somebody is told, once a window: in the log and, if given, at a webhook."""

    at: Annotated[tuple[Share, ...], Listed, Field(min_length=1, max_length=16)]
    webhook: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2048)] | None = None


class Downgrade(Section):
    """From this share of the budget on, requests that may choose are answered by `to`."""

    at: Share
    to: Name


class _Rule(Section):
    key: Name | None = None
    team: Name | None = None
    model: Name | None = None

    @model_validator(mode="after")
    def _concerns_somebody(self) -> Self:
        if self.key is self.team is self.model is None:
            raise ValueError("must name a key, a team or a model ('*' for each by itself)")
        return self


class Budget(_Rule):
    """Hard caps: a request that could pass one is refused with 429."""

    usd: Dollars | None = None
    tokens: Count | None = None
    window: Window
    alerts: Alerts | None = None
    downgrade: Downgrade | None = None

    @model_validator(mode="after")
    def _caps_something(self) -> Self:
        if self.usd is None and self.tokens is None:
            raise ValueError("must cap usd or tokens")
        return self


class RateLimit(_Rule):
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrency: Count | None = None

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.requests_per_minute is self.tokens_per_minute is self.concurrency is None:
            raise ValueError("must limit requests_per_minute, tokens_per_minute or concurrency")
        return self


Rank = Annotated[int, Field(ge=0, le=100)]
Names = Annotated[tuple[Name, ...], Listed, Field(max_length=1024)]


class Tier(Section):
    """The class that a request asks for by this `service_tier`. Everybody may ask to come later than by its own class;
    to come earlier, only `keys` and `teams` ("*": all)."""

    to: Name
    keys: Names = ()
    teams: Names = ()


class Priorities(Section):
    """classes: name to rank; a lower rank goes first. A request is of its key's class, else its team's, else that of
    the model that answers it, else `default`. tiers: OpenAI's `service_tier`, by its values."""

    classes: Annotated[Mapping[Name, Rank], Field(min_length=1, max_length=16)]
    default: Name
    keys: Mapping[Name, Name] = {}
    teams: Mapping[Name, Name] = {}
    models: Mapping[Name, Name] = {}
    tiers: Mapping[Literal["flex", "priority"], Tier] = {}


class ModelAdmission(Section):
    """One model's own bounds, in place of those for all."""

    max_queued: Count | None = None
    max_queued_tokens: Count | None = None
    max_queued_per_key: Count | None = None


class Admission(ModelAdmission):
    """Bounds of what may wait for a model, on all of its replicas together, before requests are refused with 503.

    deadline_s: time limit of a request that brings none; max_deadline_s: the longest that one may bring.
    """

    deadline_s: Seconds | None = None
    max_deadline_s: Seconds | None = None
    models: Mapping[Name, ModelAdmission] = {}

    @model_validator(mode="after")
    def _within_the_longest(self) -> Self:
        if self.deadline_s is not None and self.max_deadline_s is not None and self.deadline_s > self.max_deadline_s:
            raise ValueError("deadline_s must not be longer than max_deadline_s")
        return self


class Breaker(Section):
    """After `failures` in a row a replica or upstream is left alone for `cooldown_s`, then tried with one request."""

    failures: Annotated[int, Field(ge=1, le=1000)]
    cooldown_s: Annotated[float, Field(gt=0, le=3600)]


Failure = Literal["lost", "draining", "full", "failed", "timeout", "fault"]


class ModelRetries(Section):
    """attempts: of one model, the first included. wait_s: how long a replica is waited for while there is none.
    backoff_s: pause before the second attempt, doubled each time. on: the failures after which to try again."""

    attempts: Annotated[int, Field(ge=1, le=16)] | None = None
    wait_s: Annotated[float, Field(ge=0, le=3600)] | None = None
    backoff_s: Annotated[float, Field(ge=0, le=60)] | None = None
    on: Annotated[tuple[Failure, ...], Listed] | None = None


class RetryRules(ModelRetries):
    """Before the first token only. models: one model's own, in place of those for all."""

    breaker: Breaker | None = None
    models: Mapping[Name, ModelRetries] = {}


class Hedging(Section):
    """When a model has said nothing for so long, another of its replicas is asked as well, or the model `to`.

    after_s, or after_quantile of the model's own recent times to the first token. max_share: of its requests, at most.
    """

    after_s: Seconds | None = None
    after_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    max_share: Share
    to: Name | None = None

    @model_validator(mode="after")
    def _one_delay(self) -> Self:
        if (self.after_s is None) == (self.after_quantile is None):
            raise ValueError("needs exactly one of after_s and after_quantile")
        return self
