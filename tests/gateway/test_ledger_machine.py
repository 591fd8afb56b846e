"""Whatever happens in whatever order, the books equal a naive model's, and no cap is ever passed."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, text

from gateway.db.database import open_engine
from gateway.ledger.entries import Beat, Close, Ending, Record, Reserve, Spend, note
from gateway.ledger.transaction import commit, take_over
from policies.budget import Budget, Budgets, Price, Scope, Subject, Window
from replicas.protocol import BudgetExceeded, Usage
from tests.gateway.ledgers import BACKENDS, Clock, new_database

LEASE_S = 10.0
GATEWAYS = ("gw-1", "gw-2", "gw-3")
PRICE = Price(input=7, cached_input=3, output=31, request=5)
CAPS = {"key": (None, 300), "team": (20_000, None), "model": (9_000, 500)}
BUDGETS = Budgets(
    (
        Budget(scope=Scope(key="*"), window=Window.MINUTE, tokens=CAPS["key"][1]),
        Budget(scope=Scope(team="team"), window=Window.TOTAL, usd=CAPS["team"][0]),
        Budget(scope=Scope(model="*", team="team"), window=Window.HOUR, usd=CAPS["model"][0], tokens=CAPS["model"][1]),
    )
)


@dataclass
class Account:
    """The naive model's: plain sums over lists of (usd, tokens)."""

    cap: tuple[int | None, int | None]
    reserved: dict[str, tuple[int, int]] = field(default_factory=dict)
    spent: list[tuple[int, int]] = field(default_factory=list)
    overrun: list[tuple[int, int]] = field(default_factory=list)

    def sums(self) -> tuple[int, ...]:
        amounts = (self.spent, list(self.reserved.values()), self.overrun)
        return tuple(sum(pair[kind] for pair in pairs) for pairs in amounts for kind in (0, 1))

    def allows(self, usd: int, tokens: int) -> bool:
        spent_usd, spent_tokens, reserved_usd, reserved_tokens, _, _ = self.sums()
        fits_usd = self.cap[0] is None or spent_usd + reserved_usd + usd <= self.cap[0]
        return fits_usd and (self.cap[1] is None or spent_tokens + reserved_tokens + tokens <= self.cap[1])


@dataclass
class Request:
    id: str
    gateway: str
    spend: Spend
    accounts: list[Account]


class Books(RuleBasedStateMachine):
    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        with self.engine.begin() as connection:
            for table in ("accounts", "requests", "usage", "gateways", "events", "gates"):
                connection.execute(text(f"DELETE FROM ledger_{table}"))
        self.clock = Clock()
        self.accounts: dict[tuple[str, ...], Account] = {}
        self.open: dict[str, Request] = {}
        self.known: set[str] = set()
        self.used: list[Usage] = []
        self.cost = 0
        self.leases: dict[str, float] = {}
        self.count = 0

    requests = Bundle("requests")
    small = st.integers(0, 60)

    def _commit(self, gateway: str, *operations: Any) -> list[Any]:
        with self.engine.begin() as connection:
            outcome = commit(connection, (Beat(), *operations), gateway_id=gateway, now=self.clock.now, lease_s=LEASE_S)
        self.leases[gateway] = self.clock.now + LEASE_S
        return outcome.results[1:]

    def _concerned(self, subject: Subject) -> list[Account]:
        moment = datetime.fromtimestamp(self.clock.now, UTC)
        names = {
            ("key", subject.key, moment.strftime("%H:%M")): CAPS["key"],
            ("team", "team"): CAPS["team"],
            ("model", subject.model, moment.strftime("%H")): CAPS["model"],
        }
        return [self.accounts.setdefault(name, Account(cap)) for name, cap in names.items()]

    def _charge(self, request: Request, usage: Usage | None, cost: int | None = None) -> None:
        reserved = request.spend.most_usd, request.spend.most_tokens
        for account in request.accounts:
            del account.reserved[request.id]
        if usage is None:
            return
        cached = min(usage.cached_tokens, usage.prompt_tokens)
        price = (usage.prompt_tokens - cached) * 7 + cached * 3 + usage.completion_tokens * 31 + 5
        charged = (price if cost is None else cost, usage.prompt_tokens + usage.completion_tokens)
        for account in request.accounts:
            account.spent.append(charged)
            account.overrun.append((max(0, charged[0] - reserved[0]), max(0, charged[1] - reserved[1])))
        self.used.append(usage)
        self.cost += charged[0]

    def _spend(self, key: str, model: str, prompt: int, most: int) -> Spend:
        self.count += 1
        subject = Subject(key, "team", model)
        return Spend(request_id=f"r{self.count}", subject=subject, prompt_tokens=prompt, max_tokens=most, price=PRICE)

    @rule(
        target=requests,
        gateway=st.sampled_from(GATEWAYS),
        wanted=st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), small, small), min_size=1, max_size=4),
    )
    def reserve_together(self, gateway: str, wanted: list[tuple[str, str, int, int]]) -> Any:
        """All in one transaction, in order: each is granted exactly if the naive model has room for it."""
        spends = [self._spend(*each) for each in wanted]
        results = self._commit(gateway, *(Reserve(s, BUDGETS.accounts(s.subject), ()) for s in spends))
        granted = []
        for spend, result in zip(spends, results, strict=True):
            concerned = self._concerned(spend.subject)
            expected = all(account.allows(spend.most_usd, spend.most_tokens) for account in concerned)
            assert isinstance(result, BudgetExceeded) != expected
            if expected:
                for account in concerned:
                    account.reserved[spend.id] = (spend.most_usd, spend.most_tokens)
                self.open[spend.id] = Request(spend.id, gateway, spend, concerned)
                self.known.add(spend.id)
                granted.append(spend.id)
        return granted

    @rule(ids=requests, prompt=small, cached=small, completion=st.integers(0, 90), twice=st.booleans())
    def settle(self, ids: list[str], prompt: int, cached: int, completion: int, twice: bool) -> None:
        """With whatever usage, even more than was reserved; a second time, or after another end, nothing happens."""
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=min(cached, prompt))
        for id in ids:
            closes = [Close(id, Ending(usage=usage))] * (2 if twice else 1)
            request = self.open.pop(id, None)
            results = self._commit(request.gateway if request else "gw-1", *closes)
            assert results == [request is not None, False][: len(closes)]
            if request is not None:
                self._charge(request, usage)

    @rule(ids=consumes(requests))
    def release(self, ids: list[str]) -> None:
        for id in ids:
            request = self.open.pop(id, None)
            assert self._commit("gw-2", Close(id, Ending(usage=None))) == [request is not None]
            if request is not None:
                self._charge(request, None)

    @rule(key=st.sampled_from("ab"), prompt=small, completion=small, again=st.booleans())
    def record(self, key: str, prompt: int, completion: int, again: bool) -> None:
        spend = self._spend(key, "free", prompt, completion)
        usage = Usage(prompt_tokens=prompt, completion_tokens=completion)
        entry = Record(spend, Ending(usage=usage), self.clock.now)
        assert self._commit("gw-1", entry) == [True]
        if again:
            assert self._commit("gw-2", entry) == [False]
        self.known.add(spend.id)
        self.used.append(usage)
        self.cost += PRICE.cost(usage)

    @rule(seconds=st.sampled_from([0.5, 5.0, 11.0, 31.0, 1800.0]), alive=st.sets(st.sampled_from(GATEWAYS)))
    def wait(self, seconds: float, alive: set[str]) -> None:
        self.clock.now += seconds
        for gateway in alive & self.leases.keys():
            self._commit(gateway)

    @rule(
        dead=st.sampled_from(GATEWAYS),
        by=st.sampled_from(GATEWAYS),
        journal=st.dictionaries(st.integers(0, 20), st.tuples(small, small), max_size=8),
        lost=st.integers(0, 3),
        complete=st.booleans(),
    )
    def take_over(self, dead: str, by: str, journal: dict[int, tuple[int, int]], lost: int, complete: bool) -> None:
        """Twice, as two gateways would. `lost`: requests without a reservation that only the journal knows."""
        left = [request for request in self.open.values() if request.gateway == dead]
        usages = {
            left[n].id: (Usage(prompt_tokens=p if c else 0, completion_tokens=c), "")
            for n, (p, c) in journal.items()
            if n < len(left)
        }
        for _ in range(lost):
            spend = self._spend("a", "free", 3, 4)
            usages[spend.id] = (Usage(prompt_tokens=3, completion_tokens=4), note(spend))
        lives = self.leases.get(dead, 0.0) >= self.clock.now
        for again in (False, True):
            with self.engine.begin() as connection:
                taken = take_over(connection, dead, usages, complete=complete, by=by, now=self.clock.now)
            if lives:
                assert taken is None
            elif again:
                assert taken is not None
                assert (taken.settled, taken.charged, taken.released, taken.recorded) == (0, 0, 0, 0)
        if lives:
            return
        self.leases.pop(dead, None)
        for request in left:
            del self.open[request.id]
            usage = usages.get(request.id, (None, ""))[0]
            if usage == Usage(prompt_tokens=0, completion_tokens=0) or (usage is None and complete):
                self._charge(request, None)
            elif usage is not None:
                self._charge(request, usage)
            else:
                most = Usage(prompt_tokens=request.spend.prompt_tokens, completion_tokens=request.spend.max_tokens)
                self._charge(request, most, cost=request.spend.most_usd)
        for id in usages.keys() - self.known:
            self.known.add(id)
            self.used.append(usages[id][0])
            self.cost += 3 * 7 + 4 * 31 + 5

    @invariant()
    def books_are_the_naive_models(self) -> None:
        with self.engine.begin() as connection:
            rows = connection.execute(
                text(
                    "SELECT spent_usd, spent_tokens, reserved_usd, reserved_tokens, overrun_usd, overrun_tokens,"
                    " cap_usd, cap_tokens FROM ledger_accounts"
                )
            ).all()
            still_open = connection.execute(text("SELECT id FROM ledger_requests WHERE state='open'")).scalars().all()
            totals = connection.execute(
                text(
                    "SELECT COALESCE(SUM(requests), 0), COALESCE(SUM(prompt_tokens), 0),"
                    " COALESCE(SUM(completion_tokens), 0), COALESCE(SUM(cost_usd), 0) FROM ledger_usage"
                )
            ).one()
        assert sorted(tuple(row[:6]) for row in rows) == sorted(account.sums() for account in self.accounts.values())
        for spent, spent_tokens, reserved, reserved_tokens, overrun, overrun_tokens, cap, cap_tokens in rows:
            assert cap is None or spent + reserved - overrun <= cap
            assert cap_tokens is None or spent_tokens + reserved_tokens - overrun_tokens <= cap_tokens
        assert set(still_open) == self.open.keys()
        prompt, completion = (sum(getattr(u, f"{kind}_tokens") for u in self.used) for kind in ("prompt", "completion"))
        assert tuple(map(int, totals)) == (len(self.used), prompt, completion, self.cost)


@pytest.mark.parametrize("backend", BACKENDS)
def test_books_equal_the_naive_models(backend: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(new_database(backend, Path(folder)))
        try:
            machine = type("Machine", (Books,), {"engine": engine})
            run_state_machine_as_test(  # type: ignore[no-untyped-call]
                machine,
                settings=settings(
                    max_examples=60 if backend == "sqlite" else 15,
                    stateful_step_count=30,
                    deadline=None,
                    suppress_health_check=list(HealthCheck),
                ),
            )
        finally:
            engine.dispose()
