"""Money is exact, windows have the borders they say, and a request falls under the budgets that concern it."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import budget, document_limits
from policies.budget import Budget, Budgets, Downgrade, Price, Scope, Subject, Window, downgrade, pico_usd, usd
from replicas.protocol import Usage

ALICE = Subject("alice", "team-a", "small")


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize("rate", ["0.1", "0.075", "0.00375", "0.01875", "2.5", "15", "0.000001"])
def test_one_token_at_a_quoted_price_costs_exactly_a_millionth_of_it(rate: str) -> None:
    price = Price.per_million(input=rate)
    assert usd(price.cost(Usage(prompt_tokens=1, completion_tokens=0))) == Decimal(rate) / 1_000_000


def test_a_float_price_is_read_as_it_is_written() -> None:
    assert Price.per_million(input=0.1) == Price.per_million(input="0.1") == Price(input=100_000, cached_input=100_000)


def test_cached_tokens_are_part_of_the_prompt_at_their_own_price() -> None:
    price = Price.per_million(input=1, cached_input="0.1", output=2, request="0.5")
    usage = Usage(prompt_tokens=100, completion_tokens=10, cached_tokens=60)
    assert usd(price.cost(usage)) == Decimal("0.5") + (40 * Decimal(1) + 60 * Decimal("0.1") + 10 * 2) / 1_000_000


@given(
    rates=st.tuples(*[st.integers(0, 10**9)] * 4),
    prompt=st.integers(0, 10**6),
    cached=st.integers(0, 2 * 10**6),
    completion=st.integers(0, 10**6),
    unused=st.integers(0, 10**6),
)
def test_no_usage_within_a_reservation_costs_more_than_it(
    rates: tuple[int, int, int, int], prompt: int, cached: int, completion: int, unused: int
) -> None:
    price = Price(input=rates[0], cached_input=rates[1], output=rates[2], request=rates[3])
    usage = Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached)
    assert 0 <= price.cost(usage) <= price.most(prompt, completion + unused)


@pytest.mark.parametrize(
    ("window", "now", "start", "end"),
    [
        (Window.MINUTE, "2026-11-24T03:02:59.999", "2026-11-24T03:02:00", "2026-11-24T03:03:00"),
        (Window.MINUTE, "2026-11-24T03:03:00", "2026-11-24T03:03:00", "2026-11-24T03:04:00"),
        (Window.HOUR, "2026-11-24T03:59:59", "2026-11-24T03:00:00", "2026-11-24T04:00:00"),
        (Window.DAY, "2026-11-24T23:59:59", "2026-11-24T00:00:00", "2026-11-25T00:00:00"),
        (Window.MONTH, "2028-02-29T12:00:00", "2028-02-01T00:00:00", "2028-03-01T00:00:00"),
        (Window.MONTH, "2026-12-31T23:59:59", "2026-12-01T00:00:00", "2027-01-01T00:00:00"),
    ],
)
def test_windows_begin_at_borders_of_utc(window: Window, now: str, start: str, end: str) -> None:
    assert window.start(at(now)) == at(start)
    assert window.end(at(now)) == at(end)


def test_the_total_never_ends() -> None:
    assert Window.TOTAL.start(at("2026-11-24T00:00:00")) == 0
    assert Window.TOTAL.end(at("2026-11-24T00:00:00")) is None


@given(st.sampled_from([w for w in Window if w is not Window.TOTAL]), st.floats(0, 4e9))
def test_windows_tile_time(window: Window, now: float) -> None:
    start, end = window.start(now), window.end(now)
    assert end is not None
    assert start <= now < end
    assert window.start(end - 0.001) == start
    assert window.start(end) == end


def test_only_budgets_that_concern_a_subject_apply() -> None:
    day = {"window": Window.DAY, "tokens": 1}
    mine = [Budget(scope=Scope(key="alice"), **day), Budget(scope=Scope(team="team-a", model="small"), **day)]
    others = [Budget(scope=Scope(key="bob"), **day), Budget(scope=Scope(team="team-a", model="large"), **day)]
    accounts = Budgets((*others, *mine)).accounts(ALICE)
    assert {account.budget.scope for account in accounts} == {budget.scope for budget in mine}


def test_a_star_gives_each_an_account_of_its_own() -> None:
    budgets = Budgets((Budget(scope=Scope(key="*", model="small"), window=Window.DAY, tokens=5),))
    (alice,), (bob,) = budgets.accounts(ALICE), budgets.accounts(Subject("bob", "team-a", "small"))
    assert alice.id != bob.id
    assert budgets.accounts(Subject("alice", "team-b", "small")) == (alice,)
    assert budgets.accounts(Subject("alice", "team-a", "large")) == ()


def test_budgets_over_one_account_merge_into_the_stricter() -> None:
    everybody = Budget(scope=Scope(key="*"), window=Window.DAY, usd=5, tokens=100, alerts=(8000,))
    alice = Budget(scope=Scope(key="alice"), window=Window.DAY, usd=9, tokens=50, alerts=(5000,))
    (account,) = Budgets((everybody, alice)).accounts(ALICE)
    assert (account.budget.usd, account.budget.tokens, account.budget.alerts) == (5, 50, (5000, 8000))


def test_an_account_outlives_a_change_of_its_cap() -> None:
    def account(cap: int) -> str:
        return Budgets((Budget(scope=Scope(key="*"), window=Window.DAY, usd=cap),)).accounts(ALICE)[0].id

    assert account(1) == account(2)


@given(st.lists(st.tuples(*[st.sampled_from([None, "*", "a", "b"])] * 3).filter(any), max_size=8))
def test_the_index_finds_what_a_scan_finds(scopes: list[tuple[str | None, str | None, str | None]]) -> None:
    budgets = [Budget(scope=Scope(key=k, team=t, model=m), window=Window.DAY, tokens=1) for k, t, m in scopes]
    for subject in (Subject("a", "a", "a"), Subject("a", "b", "c"), Subject("c", "c", "c")):
        scanned = {bound for budget in budgets if (bound := budget.scope.bind(subject))}
        assert {account.budget.scope for account in Budgets(tuple(budgets)).accounts(subject)} == scanned


def test_names_with_odd_characters_do_not_share_accounts() -> None:
    budgets = Budgets((Budget(scope=Scope(key="*", team="*"), window=Window.DAY, tokens=1),))
    a, b = (budgets.accounts(Subject(k, t, "m"))[0].id for k, t in (('x","y', "z"), ("x", 'y","z')))
    assert a != b


def test_the_budget_that_is_used_up_most_chooses_the_cheaper_model() -> None:
    budgets = Budgets(
        (
            Budget(scope=Scope(key="*"), window=Window.DAY, usd=100, downgrade=Downgrade(at=8000, to="medium")),
            Budget(scope=Scope(team="*"), window=Window.DAY, tokens=100, downgrade=Downgrade(at=5000, to="small")),
        )
    )
    key, team = budgets.accounts(ALICE)
    assert downgrade((key, team), {}) is None
    assert downgrade((key, team), {key.id: (79, 0), team.id: (0, 49)}) is None
    assert downgrade((key, team), {key.id: (80, 0), team.id: (0, 60)}) == "medium"
    assert downgrade((key, team), {key.id: (80, 0), team.id: (0, 90)}) == "small"


def test_the_documents_budgets_become_ours() -> None:
    rule = document_limits.Budget.model_validate(
        {
            "key": "*",
            "usd": 0.1,
            "window": "day",
            "alerts": {"at": ("50%", 0.8), "webhook": "http://127.0.0.1/x"},
        }
    )
    (found,) = budget.from_document([rule]).budgets
    assert found == Budget(
        scope=Scope(key="*"),
        window=Window.DAY,
        usd=pico_usd("0.1"),
        alerts=(5000, 8000),
        webhook="http://127.0.0.1/x",
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"usd": -1},
        {"usd": 10**30},
        {"tokens": -1},
        {"tokens": 1, "alerts": (0,)},
        {"tokens": 1, "alerts": (10_001,)},
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"budget|alerts"):
        Budget(scope=Scope(key="*"), window=Window.DAY, **wrong)  # type: ignore[arg-type]
