"""Money and tokens: prices, windows, budgets and which of them a request falls under. Pure; the time is an argument.

Money is counted in whole pico-dollars (10^-12 USD), never in floats: a price of 0.000001 USD per million tokens is one
unit per token, so every price that is quoted anywhere is exact per token, and 64 bits still hold 9.2 million dollars.

A budget caps what is spent under a *scope* within a *window*. What it counts is kept in an account, which is named by
scope and window alone. So a budget keeps its count when its cap is changed, and two budgets over the same scope and
window are one account under the stricter cap. "*" in a scope stands for each value by itself.

Knows no database: `gateway.ledger` keeps the accounts.
"""

from __future__ import annotations

import calendar
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar

from replicas.protocol import Usage

if TYPE_CHECKING:
    from policies import document_limits

PICO = 10**12
EACH = "*"
# Half of what a signed 64-bit column holds, so that spent + reserved + one request cannot overflow.
MOST_USD = Decimal(4_000_000)
MOST_TOKENS = 2**61
BASIS_POINTS = 10_000
# Subjects whose applicable rules are remembered; then the memory starts afresh.
_REMEMBERED = 10_000

Number = Decimal | float | int | str


def pico_usd(usd: Number) -> int:
    """Dollars as whole pico-dollars, rounded up. A float counts as its shortest decimal spelling: 0.1 is a tenth."""
    return int((Decimal(str(usd)) * PICO).to_integral_value(ROUND_CEILING))


def usd(pico: int) -> Decimal:
    """The exact amount in dollars."""
    return Decimal(pico) / PICO


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Pico-dollars per token, and per request whatever its length.

    `cached_input` is for prompt tokens found in the prefix cache; they are part of the prompt, not added to it.
    """

    input: int = 0
    cached_input: int = 0
    output: int = 0
    request: int = 0

    def __post_init__(self) -> None:
        if min(self.input, self.cached_input, self.output, self.request) < 0:
            raise ValueError("a price must not be negative")

    @classmethod
    def per_million(
        cls, *, input: Number = 0, cached_input: Number | None = None, output: Number = 0, request: Number = 0
    ) -> Price:
        """From dollars per million tokens (and dollars per request). Cached input costs as input where not given."""
        million = Decimal(1_000_000)
        rates = [
            Decimal(str(rate)) / million for rate in (input, input if cached_input is None else cached_input, output)
        ]
        return cls(
            input=pico_usd(rates[0]),
            cached_input=pico_usd(rates[1]),
            output=pico_usd(rates[2]),
            request=pico_usd(request),
        )

    @property
    def free(self) -> bool:
        return not (self.input or self.cached_input or self.output or self.request)

    def cost(self, usage: Usage) -> int:
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        return (
            (usage.prompt_tokens - cached) * self.input
            + cached * self.cached_input
            + usage.completion_tokens * self.output
            + self.request
        )

    def most(self, prompt_tokens: int, completion_tokens: int) -> int:
        """What a request can cost at most, whatever part of its prompt turns out to be cached."""
        return prompt_tokens * max(self.input, self.cached_input) + completion_tokens * self.output + self.request


class Window(StrEnum):
    """Whole minutes, hours, days and months of UTC; TOTAL never ends. A window holds its first instant, not its end."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"

    def start(self, now: float) -> int:
        """Unix seconds at which the window that holds `now` began; 0 for TOTAL."""
        second = int(now // 1)
        if self is Window.TOTAL:
            return 0
        if self is Window.MONTH:
            day = datetime.fromtimestamp(second, UTC)
            return calendar.timegm((day.year, day.month, 1, 0, 0, 0))
        return second - second % _SECONDS[self]

    def end(self, now: float) -> int | None:
        """Unix seconds at which the next window begins; None for TOTAL."""
        if self is Window.TOTAL:
            return None
        start = self.start(now)
        if self is Window.MONTH:
            day = datetime.fromtimestamp(start, UTC)
            return calendar.timegm((day.year + day.month // 12, day.month % 12 + 1, 1, 0, 0, 0))
        return start + _SECONDS[self]


_SECONDS = {Window.MINUTE: 60, Window.HOUR: 3600, Window.DAY: 86400}


@dataclass(frozen=True, slots=True)
class Subject:
    """Who spends on what: an API key's name, its tenant and the model that answers."""

    key: str
    team: str
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Whom a rule concerns: a value must be met, "*" is met by each value with an account of its own, None by all."""

    key: str | None = None
    team: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if self.key is None and self.team is None and self.model is None:
            raise ValueError("a scope must name a key, a team or a model ('*' for each by itself)")

    def bind(self, subject: Subject) -> Scope | None:
        """The scope with the subject's values in place of each "*", or None where the subject is not concerned."""
        values: dict[str, str | None] = {}
        for name in ("key", "team", "model"):
            wanted, actual = getattr(self, name), getattr(subject, name)
            if wanted is not None and wanted != EACH and wanted != actual:
                return None
            values[name] = None if wanted is None else actual
        return Scope(**values)

    def __str__(self) -> str:
        return ", ".join(f"{n} {v!r}" for n in ("key", "team", "model") if (v := getattr(self, n)) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Downgrade:
    """From `at` basis points of the budget on, requests that may choose are answered by the model `to`."""

    at: int
    to: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Hard caps over one scope and window; None caps nothing.

    usd: pico-dollars. tokens: prompt (cached ones too) and completion together. alerts: basis points of either cap at
    which an event is raised once a window, when that much is *spent*; `webhook` is where it is sent.
    """

    scope: Scope
    window: Window
    usd: int | None = None
    tokens: int | None = None
    alerts: tuple[int, ...] = ()
    webhook: str | None = None
    downgrade: Downgrade | None = None

    def __post_init__(self) -> None:
        if self.usd is None and self.tokens is None:
            raise ValueError("a budget must cap usd or tokens")
        if not 0 <= (self.usd or 0) <= MOST_USD * PICO or not 0 <= (self.tokens or 0) <= MOST_TOKENS:
            raise ValueError(f"a budget must lie between 0 and {MOST_USD} USD or {MOST_TOKENS} tokens")
        if any(not 0 < at <= BASIS_POINTS for at in self.alerts):
            raise ValueError("alerts are shares above 0 and up to 1 (1 to 10000 basis points)")

    def merged(self, other: Budget) -> Budget:
        """Both at once, for the same scope and window: the stricter cap of each kind, the alerts of both."""
        assert (self.scope, self.window) == (other.scope, other.window), "only budgets over one account merge"
        return replace(
            self,
            usd=_least(self.usd, other.usd),
            tokens=_least(self.tokens, other.tokens),
            alerts=tuple(sorted({*self.alerts, *other.alerts})),
            webhook=self.webhook or other.webhook,
            downgrade=min(filter(None, (self.downgrade, other.downgrade)), key=lambda d: d.at, default=None),
        )

    def share(self, usd: int, tokens: int) -> int:
        """How much of the tighter cap these amounts are, in basis points, rounded down; a cap of 0 is used up."""
        amounts = ((usd, self.usd), (tokens, self.tokens))
        return max(amount * BASIS_POINTS // cap if cap else BASIS_POINTS for amount, cap in amounts if cap is not None)


@dataclass(frozen=True, slots=True)
class Account:
    """One applicable budget, bound to a subject: where its counts are kept and what caps them."""

    id: str
    budget: Budget


def account_id(scope: Scope, window: Window) -> str:
    return json.dumps([window.value, scope.key, scope.team, scope.model], separators=(",", ":"), ensure_ascii=False)


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)


R = TypeVar("R")


class Scoped(Generic[R]):
    """Rules by scope. Looking up a subject takes time in the number of scope *shapes*, not of rules."""

    def __init__(self, rules: Iterable[tuple[Scope, R]]) -> None:
        self._by_shape: dict[tuple[str, ...], dict[tuple[str, ...], list[R]]] = {}
        for scope, rule in rules:
            given = {n: v for n in ("key", "team", "model") if (v := getattr(scope, n)) is not None and v != EACH}
            self._by_shape.setdefault(tuple(given), {}).setdefault(tuple(given.values()), []).append(rule)

    def concerning(self, subject: Subject) -> list[R]:
        found: list[R] = []
        for shape, rules in self._by_shape.items():
            found += rules.get(tuple(getattr(subject, name) for name in shape), ())
        return found


@dataclass(frozen=True)
class Budgets:
    """All budgets of one policy generation."""

    budgets: tuple[Budget, ...] = ()
    _known: dict[Subject, tuple[Account, ...]] = field(default_factory=dict, compare=False, repr=False)

    def accounts(self, subject: Subject) -> tuple[Account, ...]:
        """What a request of this subject is charged to, in a fixed order; empty where no budget applies."""
        return remembered(self._known, subject, self._find)

    @cached_property
    def _scoped(self) -> Scoped[Budget]:
        return Scoped((budget.scope, budget) for budget in self.budgets)

    def _find(self, subject: Subject) -> tuple[Account, ...]:
        found: dict[str, Budget] = {}
        for budget in self._scoped.concerning(subject):
            scope = budget.scope.bind(subject)
            assert scope is not None, "the index found a rule that does not concern the subject"
            bound, name = replace(budget, scope=scope), account_id(scope, budget.window)
            found[name] = found[name].merged(bound) if name in found else bound
        return tuple(Account(name, found[name]) for name in sorted(found))


V = TypeVar("V")


def remembered(known: dict[Subject, V], subject: Subject, find: Callable[[Subject], V]) -> V:
    """`find(subject)`, kept in `known`, which never grows beyond a bound."""
    if subject not in known:
        if len(known) >= _REMEMBERED:
            known.clear()
        known[subject] = find(subject)
    return known[subject]


def downgrade(accounts: Sequence[Account], used: Mapping[str, tuple[int, int]]) -> str | None:
    """The model that the policy prefers now, by `used`: account id to (pico-USD, tokens), spent and reserved together.

    Where several budgets ask for one, the one that is used up most decides.
    """
    wanted: list[tuple[int, str]] = []
    for account in accounts:
        share = account.budget.share(*used.get(account.id, (0, 0)))
        if account.budget.downgrade is not None and share >= account.budget.downgrade.at:
            wanted.append((share, account.budget.downgrade.to))
    return max(wanted)[1] if wanted else None


def from_document(rules: Iterable[document_limits.Budget]) -> Budgets:
    """The policy document's section `budgets`."""
    return Budgets(tuple(_from_rule(rule) for rule in rules))


def _from_rule(rule: document_limits.Budget) -> Budget:
    lower = rule.downgrade
    return Budget(
        scope=Scope(key=rule.key, team=rule.team, model=rule.model),
        window=Window(rule.window),
        usd=None if rule.usd is None else pico_usd(rule.usd),
        tokens=rule.tokens,
        alerts=tuple(map(basis_points, rule.alerts.at)) if rule.alerts else (),
        webhook=rule.alerts.webhook if rule.alerts else None,
        downgrade=Downgrade(at=basis_points(lower.at), to=lower.to) if lower else None,
    )


def basis_points(share: float) -> int:
    return max(1, round(share * BASIS_POINTS))
