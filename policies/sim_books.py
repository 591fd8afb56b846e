"""Budgets and rate limits in virtual time: what `gateway.ledger` keeps in a database, by the same rules in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from policies import limits as rate_limits
from policies.budget import Account, Price
from policies.limits import Gate, RateLimit
from replicas.protocol import BudgetExceeded, RateLimited, Usage

_Window = tuple[str, int]


@dataclass(slots=True)
class _Counts:
    """Of one account in one window: pico-dollars and tokens."""

    spent_usd: int = 0
    spent_tokens: int = 0
    reserved_usd: int = 0
    reserved_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """What a request has reserved. usd, tokens: the most that it can come to."""

    price: Price
    usd: int
    tokens: int
    windows: tuple[_Window, ...]
    limits: tuple[RateLimit, ...]


class Books:
    """`epoch`: Unix seconds of virtual time 0, for windows are of the calendar. Nothing is spent at the beginning."""

    def __init__(self, epoch: float = 0.0) -> None:
        self._epoch = epoch
        self._counts: dict[_Window, _Counts] = {}
        self._gates: dict[str, Gate] = {}

    def used(self, accounts: Sequence[Account], now: float) -> dict[str, tuple[int, int]]:
        """Spent and reserved together, by account id, as `policies.budget.downgrade` wants it."""
        counts = {account.id: self._of(self._window(account, now)) for account in accounts}
        return {
            id: (one.spent_usd + one.reserved_usd, one.spent_tokens + one.reserved_tokens) for id, one in counts.items()
        }

    def reserve(
        self,
        accounts: Sequence[Account],
        limits: Sequence[RateLimit],
        price: Price,
        prompt_tokens: int,
        max_tokens: int,
        now: float,
    ) -> Held:
        """Room for the most that a request can cost, in every account or in none. BudgetExceeded, RateLimited.

        Who is refused does not come again by himself: recorded traffic holds his second try if he made one.
        """
        usd, tokens = price.most(prompt_tokens, max_tokens), prompt_tokens + max_tokens
        windows = tuple(self._window(account, now) for account in accounts)
        for account, window in zip(accounts, windows, strict=True):
            counts, budget = self._of(window), account.budget
            over_usd = budget.usd is not None and counts.spent_usd + counts.reserved_usd + usd > budget.usd
            over = budget.tokens is not None and counts.spent_tokens + counts.reserved_tokens + tokens > budget.tokens
            if over_usd or over:
                raise BudgetExceeded(f"the budget of {budget.scope} for this {budget.window} is used up")
        gates = [(limit, self._gates.setdefault(str(limit.scope), Gate())) for limit in limits]
        if gates:
            refusal = rate_limits.admit(gates, self._us(now), tokens, b"", fresh=True)
            if refusal is not None:
                raise RateLimited(f"too many {refusal.kind} of {refusal.limit.scope}")
        for window in windows:
            counts = self._of(window)
            counts.reserved_usd += usd
            counts.reserved_tokens += tokens
        return Held(price, usd, tokens, windows, tuple(limits))

    def settle(self, held: Held, usage: Usage | None, now: float) -> int:
        """Charge what was used, or nothing where usage is None; pico-dollars."""
        cost = held.price.cost(usage) if usage is not None else 0
        tokens = usage.prompt_tokens + usage.completion_tokens if usage is not None else 0
        for window in held.windows:
            counts = self._of(window)
            counts.reserved_usd -= held.usd
            counts.reserved_tokens -= held.tokens
            counts.spent_usd += cost
            counts.spent_tokens += tokens
        for limit in held.limits:
            gate = self._gates[str(limit.scope)]
            rate_limits.finish(limit, gate, self._us(now), held.tokens - tokens, ran=usage is not None)
        return cost

    def check(self) -> None:
        """At the end nothing is reserved."""
        for window, counts in self._counts.items():
            assert counts.reserved_usd == counts.reserved_tokens == 0, f"{window} still holds a reservation"

    def _window(self, account: Account, now: float) -> _Window:
        return account.id, account.budget.window.start(self._epoch + now)

    def _of(self, window: _Window) -> _Counts:
        counts = self._counts.get(window)
        if counts is None:
            counts = self._counts[window] = _Counts()
        return counts

    def _us(self, now: float) -> int:
        return int((self._epoch + now) * 1e6)
