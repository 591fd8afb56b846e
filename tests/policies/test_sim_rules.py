"""Generations in virtual time: models, money, limits, canaries, fallbacks, and what a candidate would change."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from policies import document
from policies.canary import serves
from policies.gate import GateError, parse_gate, violations
from policies.replay import FIGURES, asks_of, compare, replay, spell
from policies.score import score
from policies.sim_fleet import Fleet, Outage
from policies.sim_outcome import BLOCKED, COMPLETED, LIMITED, UNKNOWN
from policies.sim_replica import ReplicaModel
from policies.sim_rules import Ask, Canary, SimModel, SimRules, World, compiled, simulate_rules
from policies.traces import TraceRequest
from policies.traffic import Recorded
from replicas.protocol import NotSupported

FAST, SLOW = ReplicaModel(prefill_rate=8000.0, decode_s=0.0), ReplicaModel(prefill_rate=300.0, decode_s=0.0)
WORLD = World(
    (
        SimModel(
            name="small",
            fleet=Fleet(replicas=2, gateways=2, model=FAST),
            aliases=("s",),
            price={"input": 1.0, "output": 1.0},
        ),
        SimModel(name="large", fleet=Fleet(replicas=2, gateways=2, model=SLOW), price={"input": 10.0, "output": 10.0}),
    )
)
CHAT = "groups: {chat: {models: [small, large]}}\n"


def rules(text: str, generation: int = 1, world: World = WORLD) -> SimRules:
    return compiled(generation, document.parse(text), world)


def recorded(count: int, *, asked: str = "chat", rate: float = 4.0, **fields: Any) -> list[Recorded]:
    rng = random.Random(7)
    at, found = 1_700_000_000.0, []
    for number in range(count):
        at += rng.expovariate(rate)
        request = TraceRequest(at, rng.randrange(50, 200), rng.randrange(4, 30), tuple(range(12)), 16)
        name = f"key-{number % 10}"
        found.append(Recorded(request=request, key_id=name, key=name, team="acme", asked=asked, **fields))
    return found


def outcomes(text: str, count: int = 60, **fields: Any) -> Any:
    asks, _ = asks_of(recorded(count, **fields))
    return simulate_rules(asks, WORLD, rules(text), epoch=1_700_000_000.0)


def test_a_group_is_answered_by_its_first_model_and_paid_at_its_price() -> None:
    small, large = outcomes(CHAT), outcomes("groups: {chat: {models: [large, small]}}\n")
    assert set(small.ends) == set(large.ends) == {COMPLETED}
    assert set(small.model) == {0}
    assert set(large.model) == {1}
    assert sum(large.cost) == 10 * sum(small.cost)
    assert np.median(large.column("ttft_s")) > 3 * np.median(small.column("ttft_s"))


def test_an_alias_a_model_and_a_name_that_nobody_knows() -> None:
    assert set(outcomes(CHAT, asked="s").model) == {0}
    assert set(outcomes(CHAT, asked="nobody").ends) == {UNKNOWN}
    assert set(outcomes("aliases: {fast: small}\n", asked="fast").model) == {0}


def test_right_size_goes_by_the_recorded_prediction() -> None:
    text = "groups: {chat: {models: [small, large], right_size: {quality_floor: 0.5}}}\n"
    assert set(outcomes(text, quality={"small": 0.7, "large": 0.9}).model) == {0}
    assert set(outcomes(text, quality={"small": 0.3, "large": 0.9}).model) == {1}


def test_a_budget_blocks_at_its_cap_and_never_beyond() -> None:
    cap = 0.002
    found = outcomes(CHAT + f'budgets: [{{key: "*", usd: {cap}, window: day}}]\n', count=400)
    assert set(found.ends) == {COMPLETED, BLOCKED}
    spent: dict[int, int] = {}
    for number, cost in enumerate(found.cost):
        spent[number % 10] = spent.get(number % 10, 0) + cost
    assert max(spent.values()) <= cap * 1e12
    assert max(spent.values()) > 0.5 * cap * 1e12


def test_near_the_cap_a_budget_sends_callers_to_the_cheaper_model() -> None:
    budget = "{team: acme, usd: 0.05, window: total, downgrade: {at: 50%, to: small}}"
    found = outcomes("groups: {chat: {models: [large, small]}}\n" + f"budgets: [{budget}]\n", count=100)
    models = found.column("model")
    assert models[0] == 1
    assert models[-1] == 0


def test_a_rate_limit_refuses_what_comes_too_fast() -> None:
    found = outcomes(CHAT + "rate_limits: [{team: acme, requests_per_minute: 30}]\n", count=80)
    assert 30 <= found.ends.count(COMPLETED) <= 42
    assert found.ends.count(LIMITED) == 80 - found.ends.count(COMPLETED)


def test_a_canary_serves_its_keys_and_no_others() -> None:
    asks, _ = asks_of(recorded(60))
    other = Canary(rules("groups: {chat: {models: [large, small]}}\n", 2), 0.4)
    found = simulate_rules(asks, WORLD, rules(CHAT), canary=other)
    for ask, generation in zip(asks, found.generation, strict=True):
        assert generation == (2 if serves(ask.key_id, 0.4, "signalbox") else 1)
    assert set(found.generation) == {1, 2}


def test_a_fallback_answers_while_the_model_has_no_replica() -> None:
    small, large = WORLD.models
    dead = replace(small.fleet, outages=tuple(Outage(replica=n, at_s=3.0, down_s=4.0) for n in range(2)))
    world = World((replace(small, fleet=dead), large))
    asks, _ = asks_of(recorded(60, asked="small"))
    found = simulate_rules(asks, world, rules("fallbacks: {small: [large]}\n", world=world))
    assert set(found.model) == {0, 1}
    assert found.ends.count(COMPLETED) >= 58


def test_what_cannot_be_simulated_is_refused_by_name() -> None:
    text = "groups: {chat: {models: [small, large], cascade: {small: small, strong: large, min_mean_logprob: -1}}}\n"
    with pytest.raises(NotSupported, match=r"groups\.chat\.cascade"):
        rules(text)


def test_the_same_generation_changes_nothing() -> None:
    found = replay(recorded(200), WORLD, rules(CHAT), rules(CHAT))
    assert all(change.value == 0 or np.isnan(change.value) for change in found.changes)
    assert not violations(parse_gate("cost<=+0% ttft_p95<=+0% hit_rate>=+0%"), found)


def test_a_slower_and_dearer_generation_is_found_out_with_intervals() -> None:
    found = replay(recorded(300), WORLD, rules(CHAT), rules("groups: {chat: {models: [large, small]}}\n"))
    cost, ttft = found.change("cost"), found.change("ttft_p95")
    assert cost.value == pytest.approx(9.0)
    assert ttft.low <= ttft.value <= ttft.high
    assert ttft.low > 1.0
    broken = violations(parse_gate("cost<=+0% ttft_p95<=+10% rejects<=1%"), found)
    assert [bound.name for bound, _ in broken] == ["cost", "ttft_p95"]
    assert "+900.0%" in spell(cost)
    assert not violations(parse_gate("ttft_p95<=60s"), found)


def test_what_is_not_simulated_is_said() -> None:
    found = replay(recorded(20), WORLD, rules(CHAT), rules(CHAT + "admission: {max_queued: 4}\n"))
    assert found.notes[-1] == "not simulated: what the policies say of admission"
    kept = rules("groups: {chat: {models: [small, large], session: {keep_model: true}}}\n")
    assert (
        replay(recorded(20), WORLD, rules(CHAT), kept).notes[-1] == "not simulated: what the policies say of sessions"
    )


def test_a_budget_that_blocks_shows_as_blocks_and_not_as_rejects() -> None:
    tight = CHAT + 'budgets: [{key: "*", tokens: 1000, window: total}]\n'
    found = replay(recorded(200), WORLD, rules(CHAT), rules(tight))
    assert found.change("budget_blocks").value > 0.3
    assert found.change("rejects").value == 0


def test_replies_that_never_came_are_taken_to_be_as_long_as_the_others() -> None:
    some = recorded(20)
    some[3] = replace(some[3], request=replace(some[3].request, output_tokens=0), status=503)
    asks, notes = asks_of(some)
    assert asks[3].output_tokens == int(np.median([ask.output_tokens for n, ask in enumerate(asks) if n != 3]))
    assert "1 requests brought no answer" in notes[0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("cost", "no bound"),
        ("cost<+5%", "no bound"),
        ("cost<=5", "no bound"),
        ("speed<=+5%", "'speed' is none of cost"),
        ("ttft_p95<=5%", "a time"),
        ("rejects<=20ms", "a share"),
        ("cost<=5%", "a change"),
        ("cost<=+0% ttft_p95<=fast", "'ttft_p95<=fast'"),
    ],
)
def test_a_gate_that_cannot_be_read_is_refused(text: str, says: str) -> None:
    with pytest.raises(GateError, match=says):
        parse_gate(text)


def test_a_prediction_is_scored_against_the_canarys_own_keys() -> None:
    others = recorded(200, generation=1, model="small", ttft_s=0.1, e2e_s=0.4, cost=1000)
    canary = recorded(100, generation=2, model="large", ttft_s=0.3, e2e_s=0.6, cost=1500)
    told = {"cost": 0.5, "ttft_p95": 2.0, "rejects": 0.0, "e2e_p95": 4.0}
    found = {one.name: one for one in score(told, canary, others)}
    assert found["cost"].measured.value == pytest.approx(0.5)
    assert found["ttft_p95"].measured.value == pytest.approx(2.0)
    assert (found["cost"].held, found["ttft_p95"].held, found["e2e_p95"].held) == (True, True, False)
    with pytest.raises(ValueError, match="nothing to compare"):
        score(told, [], others)


def test_intervals_cover_what_chance_does() -> None:
    """Of two samples of one distribution the interval of the change holds 0 about as often as it says."""
    covered = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        sides = []
        for _ in range(2):
            size = 400
            columns = {name: np.zeros(size) for name in ("cost", "prompt_tokens", "cached_tokens", "e2e_s")}
            columns |= {"arrived": np.arange(size, dtype=float), "ends": np.full(size, COMPLETED)}
            sides.append({**columns, "ttft_s": rng.lognormal(0, 0.5, size)})
        [change] = [one for one in compare(*sides, paired=False, seed=seed) if one.name == "ttft_p50"]
        covered += change.low <= 0 <= change.high
    assert covered >= 8


def test_every_figure_has_a_name_for_gates() -> None:
    assert set(FIGURES) == {"cost", "ttft_p50", "ttft_p95", "e2e_p95", "hit_rate", "rejects", "budget_blocks"}
    assert Ask(0.0, 1, 1, (), b"").quality == {}
