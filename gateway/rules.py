"""A policy generation made ready to serve: every name resolved, prices in whole pico-dollars, predictors loaded.

Immutable. A request takes the `Rules` it begins with and keeps them to its end, whatever is published meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gateway.config import GatewayConfig, Retries, ServedModel
from gateway.policy_follower import PolicyFollower
from policies import budget, limits, priority
from policies.admission import Bounds, bounds
from policies.budget import Budgets, Price, Subject
from policies.document import FleetNames, PolicyDocument, load_predictors
from policies.document_limits import RetryRules
from policies.limits import RateLimits
from policies.selection import ModelGroup, group_of, price_of
from replicas.protocol import ModelNotFound


@dataclass(frozen=True, kw_only=True)
class Rules:
    """`served` holds the fleet's models by name and alias; `aliases` are the document's own, to models and groups."""

    generation: int
    document: PolicyDocument
    served: Mapping[str, ServedModel]
    groups: Mapping[str, ModelGroup]
    prices: Mapping[str, Price]
    budgets: Budgets
    limits: RateLimits
    bounds: Mapping[str, Bounds]
    retries: Mapping[str, Retries]

    @property
    def policy(self) -> str:
        """The name of the algorithm that chooses replicas."""
        return self.document.affinity.policy

    def resolve(self, name: str) -> ServedModel | ModelGroup:
        """What a caller's `model` stands for; ModelNotFound."""
        name = self.document.aliases.get(name, name)
        target = self.groups.get(name) or self.served.get(name)
        if target is None:
            raise ModelNotFound(f"the model {name!r} does not exist", param="model")
        return target

    def fallbacks(self, model: str) -> tuple[str, ...]:
        return self.document.fallbacks.get(model, ())

    def priority(self, subject: Subject, tier: str | None, later_by: int | None) -> int:
        """The engine's priority of a request; see `policies.priority.rank`."""
        return priority.rank(subject, self.document.priorities, tier, later_by or 0)

    def names(self) -> Iterator[str]:
        """Everything that a caller may ask for."""
        yield from self.served
        yield from self.groups
        yield from self.document.aliases


async def rules_for(follower: PolicyFollower[Rules], key_id: str) -> Rules:
    """By what a request of this key is served from here to its end. Unavailable while that cannot be known."""
    if follower.stale:
        await follower.refresh()
    return follower.generation_for(key_id).compiled


def fleet_names(config: GatewayConfig) -> FleetNames:
    return FleetNames(
        tuple(model.name for model in config.models),
        tuple(alias for model in config.models for alias in model.aliases),
        tuple(upstream.name for upstream in config.upstreams),
    )


def predictor_folder(config: GatewayConfig) -> Path:
    """Below it lie the predictors that a document names by relative paths."""
    return Path(config.state_dir or ".") / "predictors"


def compiler(config: GatewayConfig) -> Callable[[int, PolicyDocument], Rules]:
    """(number, document) -> Rules for this gateway's fleet. Blocking: predictors are read from disk.

    Raises ConfigError for what the document names and this gateway does not have.
    """
    served = {name: model for model in config.models for name in (model.name, *model.aliases)}
    folder = predictor_folder(config)

    def compile_rules(generation: int, document: PolicyDocument) -> Rules:
        predictors = load_predictors(document, folder)
        priced = {model.name: price_of(model.name, model.price, document) for model in config.models}
        groups = {
            name: group_of(name, group, document, priced, predictors.get(name))
            for name, group in document.groups.items()
        }
        return Rules(
            generation=generation,
            document=document,
            served=served,
            groups=groups,
            prices=priced,
            budgets=budget.from_document(document.budgets),
            limits=limits.from_document(document.rate_limits),
            bounds={name: found for name in priced if (found := bounds(document.admission, name)) is not None},
            retries={name: _retries(config.retries, document.retries, name) for name in priced},
        )

    return compile_rules


def _retries(configured: Retries, rules: RetryRules | None, model: str) -> Retries:
    """The fleet file's, then the document's for all models, then those for this one."""
    if rules is None:
        return configured
    given: dict[str, Any] = rules.model_dump(exclude_none=True, include={"attempts", "wait_s", "backoff_s", "on"})
    if (own := rules.models.get(model)) is not None:
        given |= own.model_dump(exclude_none=True)
    if rules.breaker is not None:
        given |= {"breaker_failures": rules.breaker.failures, "breaker_cooldown_s": rules.breaker.cooldown_s}
    return replace(configured, **given)
