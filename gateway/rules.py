"""A policy generation made ready to serve: every name resolved, prices in whole pico-dollars, predictors loaded.

Immutable. A request takes the `Rules` it begins with and keeps them to its end, whatever is published meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.config import GatewayConfig, ServedModel
from gateway.policy_follower import PolicyFollower
from policies import budget, limits
from policies.budget import Budgets, Price
from policies.document import FleetNames, PolicyDocument, load_predictors
from policies.limits import RateLimits
from policies.selection import ModelGroup, group_of, price_of
from replicas.protocol import ConfigError, ModelNotFound


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
        tuple(model.name for model in config.models), tuple(alias for model in config.models for alias in model.aliases)
    )


def predictor_folder(config: GatewayConfig) -> Path:
    """Below it lie the predictors that a document names by relative paths."""
    return Path(config.state_dir or ".") / "predictors"


def compiler(config: GatewayConfig) -> Callable[[int, PolicyDocument], Rules]:
    """(number, document) -> Rules for this gateway's fleet. Blocking: predictors are read from disk.

    Raises ConfigError for what the document names and this gateway does not have.
    """
    served = {name: model for model in config.models for name in (model.name, *model.aliases)}
    elsewhere = {upstream.name for upstream in config.upstreams}
    folder = predictor_folder(config)

    def compile_rules(generation: int, document: PolicyDocument) -> Rules:
        predictors = load_predictors(document, folder)
        priced = {model.name: price_of(model.name, model.price, document) for model in config.models}
        for name, group in document.groups.items():
            if group.cascade is not None and group.cascade.small in elsewhere:
                raise ConfigError(
                    f"groups.{name}.cascade.small: {group.cascade.small!r} is an upstream: how sure it is is not known"
                )
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
        )

    return compile_rules
