"""Policy generations in virtual time: gateways that choose model and replica, reserve, fall back and split off a canary
by the documents and the very functions that serve.

    world = World(models=(SimModel(name="small", fleet=Fleet(...), price={"output": 1.0}), ...))
    outcomes = simulate_rules(asks, world, compiled(0, document, world), canary=Canary(compiled(1, other, world), 0.05))

Beyond the document's knowledge: what a model would have answered. So a request's answer is as long whoever gives it,
a predictor's opinion is the one recorded with the request, a guarantee's shadows are left out, a cascade is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from policies import budget, limits
from policies import canary as canaries
from policies.budget import Budgets, Price, Subject, downgrade
from policies.document import PolicyDocument
from policies.fleet_view import RouteRequest
from policies.limits import RateLimits
from policies.selection import ModelGroup, Selection, Size, group_of, price_of, select_from, select_model
from policies.sim_books import Books, Held
from policies.sim_clock import Clock
from policies.sim_fleet import Fleet, SimRequest
from policies.sim_outcome import BLOCKED, COMPLETED, ENDS, LIMITED, UNKNOWN, Outcomes
from policies.sim_pool import Pool, Ticket
from policies.simulator import Arrivals
from replicas.protocol import BudgetExceeded, ConfigError, ModelNotFound, NotSupported, RateLimited, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class SimModel:
    """A model of the fleet: its replicas, and what the fleet file says of names and prices (dollars per million)."""

    name: str
    fleet: Fleet
    aliases: tuple[str, ...] = ()
    price: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class World:
    """All models. Every one has the same gateways in front of it."""

    models: tuple[SimModel, ...]

    def __post_init__(self) -> None:
        if not self.models or len({model.fleet.gateways for model in self.models}) != 1:
            raise ValueError("a world has at least one model, and the same number of gateways for all")

    @property
    def gateways(self) -> int:
        return self.models[0].fleet.gateways

    @property
    def served(self) -> dict[str, str]:
        """Models by name and alias."""
        return {name: model.name for model in self.models for name in (model.name, *model.aliases)}


@dataclass(frozen=True, slots=True)
class Ask(SimRequest):
    """A caller's request. quality: of models, as predicted when it was recorded."""

    key_id: str = ""
    key: str = ""
    team: str = ""
    asked: str = ""
    quality: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SimRules:
    """A generation made ready to serve, as `gateway.rules.Rules` is."""

    generation: int
    document: PolicyDocument
    served: Mapping[str, str]
    groups: Mapping[str, ModelGroup]
    prices: Mapping[str, Price]
    budgets: Budgets
    limits: RateLimits

    def resolve(self, name: str) -> str | ModelGroup:
        name = self.document.aliases.get(name, name)
        target = self.groups.get(name) or self.served.get(name)
        if target is None:
            raise ModelNotFound(f"the model {name!r} does not exist", param="model")
        return target

    def fallbacks(self, model: str) -> tuple[str, ...]:
        return self.document.fallbacks.get(model, ())


def compiled(generation: int, document: PolicyDocument, world: World) -> SimRules:
    """NotSupported names what of the document cannot be simulated; ConfigError a model that the world lacks."""
    priced = {model.name: price_of(model.name, model.price, document) for model in world.models}
    for name, group in document.groups.items():
        if group.cascade is not None:
            raise NotSupported(f"groups.{name}.cascade cannot be simulated: how sure a model would be is not recorded")
        if missing := [model for model in group.models if model not in priced]:
            raise ConfigError(f"groups.{name}: the simulated fleet has no model {missing[0]!r}")
    return SimRules(
        generation=generation,
        document=document,
        served=world.served,
        groups={name: group_of(name, group, document, priced, None) for name, group in document.groups.items()},
        prices=priced,
        budgets=budget.from_document(document.budgets),
        limits=limits.from_document(document.rate_limits),
    )


@dataclass(frozen=True, slots=True)
class Canary:
    rules: SimRules
    share: float
    salt: str = canaries.DEFAULT_SALT


@dataclass(frozen=True, slots=True)
class _Recorded:
    """Stands for the predictor: what was predicted of this request when it came."""

    quality: Mapping[str, float]
    name: str = "recorded"

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self.quality)

    def predict(self, text: str) -> NDArray[np.float32]:
        return np.array(list(self.quality.values()), np.float32)


@dataclass(slots=True, eq=False)
class _Order:
    """A request on its way through the models of its selection. models: those still to be tried."""

    number: int
    ask: Ask
    rules: SimRules
    gateway: int
    models: list[str]
    model: str = ""
    held: Held | None = None


def simulate_rules(
    asks: Iterable[Ask],
    world: World,
    active: SimRules,
    *,
    canary: Canary | None = None,
    epoch: float = 0.0,
    rate_scale: float = 1.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Outcomes:
    """Run all requests, in the order of time, to their ends. epoch: Unix seconds of their time 0."""
    desk = _Desk(world, active, canary, epoch, seed)
    return desk.run(asks, rate_scale, progress)


class _Desk:
    """All gateways: from a request to a model's pool, and back."""

    def __init__(self, world: World, active: SimRules, canary: Canary | None, epoch: float, seed: int) -> None:
        self._active, self._canary, self._gateways = active, canary, world.gateways
        self._clock, self._outcomes, self._books = Clock(), Outcomes(), Books(epoch)
        self._arrivals: Arrivals | None = None
        self._orders: dict[int, _Order] = {}
        self._numbers = {model.name: number for number, model in enumerate(world.models)}
        algorithms = {rules.document.affinity.policy for rules in (active, *((canary.rules,) if canary else ()))}
        self._pools = {
            model.name: Pool(self._clock, model.fleet, tuple(algorithms), self, seed=seed, busy=self._more)
            for model in world.models
        }
        self._cards = {model.name: _Card(model.fleet.model.max_model_len) for model in world.models}

    def run(self, asks: Iterable[Ask], rate_scale: float, progress: Callable[[int], None] | None) -> Outcomes:
        self._arrivals = Arrivals(self._clock, asks, self._arrive, rate_scale=rate_scale, progress=progress)
        self._clock.run()
        self._outcomes.check()
        self._books.check()
        for pool in self._pools.values():
            pool.check(self._clock.now)
        return self._outcomes

    def _more(self) -> bool:
        return self._arrivals is not None and self._arrivals.more

    # ---------------------------------------------------------------- policies.selection.Present, at the first gateway

    def ready(self, model: str) -> int:
        return self._pools[model].ready()

    def card(self, model: str) -> _Card:
        return self._cards[model]

    # ---------------------------------------------------------------- a request comes

    def _arrive(self, ask: SimRequest, now: float) -> None:
        assert isinstance(ask, Ask), "a world with policies is asked by somebody"
        if not len(self._outcomes):
            for pool in self._pools.values():
                pool.start(now)
        number = self._outcomes.arrive(now, ask.prompt_tokens)
        rules = self._rules_of(ask)
        self._outcomes.generation[number] = rules.generation
        try:
            models = self._select(ask, rules, now)
        except ModelNotFound:
            self._outcomes.end(number, UNKNOWN)
            return
        order = self._orders[number] = _Order(number, ask, rules, number % self._gateways, list(models))
        self._next(order, now)

    def _rules_of(self, ask: Ask) -> SimRules:
        canary = self._canary
        if canary is not None and canaries.serves(ask.key_id, canary.share, canary.salt):
            return canary.rules
        return self._active

    def _select(self, ask: Ask, rules: SimRules, now: float) -> Sequence[str]:
        target = rules.resolve(ask.asked)
        if isinstance(target, ModelGroup):
            if target.trade is not None and _covers(ask.quality, target):
                target = replace(target, predictor=_Recorded(ask.quality))
            size = Size(text="", prompt_tokens=ask.prompt_tokens, max_tokens=ask.max_tokens or ask.output_tokens)
            selection = select_from(target, rules, self, size, 1.0)
        else:
            selection = select_model(target, rules)
        return self._downgraded(ask, rules, selection, now).models

    def _downgraded(self, ask: Ask, rules: SimRules, selection: Selection, now: float) -> Selection:
        accounts = rules.budgets.accounts(Subject(key=ask.key, team=ask.team, model=selection.models[0]))
        if not any(account.budget.downgrade for account in accounts):
            return selection
        to = downgrade(accounts, self._books.used(accounts, now))
        if to is None or to == selection.models[0]:
            return selection
        return replace(selection, models=(to, *(name for name in selection.models if name != to)))

    def _next(self, order: _Order, now: float) -> None:
        """The next model that has a replica is asked; the last one is waited for."""
        ask, rules = order.ask, order.rules
        while order.models:
            order.model = model = order.models.pop(0)
            pool = self._pools[model]
            if order.models and not pool.ready():
                continue
            subject = Subject(key=ask.key, team=ask.team, model=model)
            most = ask.max_tokens or ask.output_tokens
            accounts, gates = rules.budgets.accounts(subject), rules.limits.applying(subject)
            try:
                order.held = self._books.reserve(accounts, gates, rules.prices[model], ask.prompt_tokens, most, now)
            except (BudgetExceeded, RateLimited) as error:
                self._end(order, BLOCKED if isinstance(error, BudgetExceeded) else LIMITED)
                return
            self._outcomes.model[order.number] = self._numbers[model]
            ticket = self._ticket(order, pool)
            if pool.fleet.gateway_s:
                self._clock.at(now + pool.fleet.gateway_s, pool.ask, ticket)
            else:
                pool.ask(ticket, now)
            return
        raise AssertionError("a selection names at least one model, and the last is always asked")

    def _ticket(self, order: _Order, pool: Pool) -> Ticket:
        route = RouteRequest(
            request_id=str(order.number),
            prompt_tokens=order.ask.prompt_tokens,
            hashes=order.ask.hashes,
            block_size=pool.fleet.model.block_size,
            max_tokens=order.ask.max_tokens or order.ask.output_tokens,
        )
        policy = order.rules.document.affinity.policy
        return Ticket(order.number, order.ask, order.gateway, policy, route, patient=not order.models)

    # ---------------------------------------------------------------- policies.sim_pool.Desk

    def first(self, ticket: Ticket, now: float) -> None:
        self._outcomes.first(ticket, now)

    def done(self, ticket: Ticket, now: float) -> None:
        order = self._orders[ticket.number]
        cached = max(ticket.cached, 0)
        usage = Usage(
            prompt_tokens=order.ask.prompt_tokens, completion_tokens=order.ask.output_tokens, cached_tokens=cached
        )
        self._settle(order, usage, now)
        self._outcomes.done(ticket, now)
        del self._orders[ticket.number]

    def failed(self, ticket: Ticket, why: str, now: float) -> None:
        order = self._orders[ticket.number]
        # of an answer that was cut at least the prompt and a token were made
        cut = Usage(prompt_tokens=order.ask.prompt_tokens, completion_tokens=1) if why == "cut" else None
        self._settle(order, cut, now)
        if why == "unavailable" and order.models:
            self._next(order, now)
        else:
            self._end(order, ENDS[why])

    def _settle(self, order: _Order, usage: Usage | None, now: float) -> None:
        assert order.held is not None, "it was reserved before it was asked"
        self._outcomes.cost[order.number] += self._books.settle(order.held, usage, now)
        order.held = None

    def _end(self, order: _Order, how: int) -> None:
        assert how != COMPLETED, "who completes has been told"
        self._outcomes.end(order.number, how)
        del self._orders[order.number]


@dataclass(frozen=True, slots=True)
class _Card:
    max_model_len: int


def _covers(quality: Mapping[str, float], group: ModelGroup) -> bool:
    names: Collection[str] = [model.name for model in group.models]
    return all(name in quality for name in names)
