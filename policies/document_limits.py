"""Sections of the policy document about money, limits and failures. `policies.section.NOT_YET` says which are built.

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


class Priorities(Section):
    """classes: name to rank; a lower rank goes first. keys: API key's name to class; all others have `default`."""

    classes: Annotated[Mapping[Name, Annotated[int, Field(ge=0, le=100)]], Field(min_length=1, max_length=16)]
    default: Name
    keys: Mapping[Name, Name] = {}


class Admission(Section):
    """Bounds of what may wait for a model before requests are refused with 503, and deadlines."""

    max_queued: Count | None = None
    max_queued_per_key: Count | None = None
    deadline_s: Seconds | None = None
    max_deadline_s: Seconds | None = None
    models: Mapping[Name, ModelAdmission] = {}


class ModelAdmission(Section):
    """One model's own bounds, in place of those for all."""

    max_queued: Count | None = None
    max_queued_per_key: Count | None = None


class Breaker(Section):
    """After `failures` in a row a replica or upstream is left alone for `cooldown_s`."""

    failures: Count
    cooldown_s: Seconds


class RetryRules(Section):
    """Before the first token only."""

    attempts: Count | None = None
    wait_s: Seconds | None = None
    breaker: Breaker | None = None


class Hedging(Section):
    """A second replica is asked when the first has said nothing for `after_s`; at most this share of requests."""

    after_s: Seconds
    max_share: Share
