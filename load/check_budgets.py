"""Budgets under fire: exactly what a cap allows is served, and what a killed gateway left is billed exactly once.

    python -m load.check_budgets                      # SQLite and PostgreSQL, 20 kills on each
    python -m load.check_budgets --database sqlite --kills 3

Starts an instance of its own for each database: two gateways, two replicas with fake engines. First 200 requests come
at once, each of which uses its whole reservation, against keys whose budgets allow exactly 50: streamed and whole, in
tokens and in dollars. Then gateways are killed with SIGKILL at random moments under load; in every fourth round a
replica as well, in another a replica whose journal was deleted before. After each kill the books are held against the
engines' own count of every request's tokens, and against what its client saw. All the time a watch reads every account:
spent + reserved must be within the cap.

A PostgreSQL server is started from Debian's package or the wheel `pgserver`, unless --postgres-url names one.
Exit status: 0 all held · 1 something did not · 2 cannot begin.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from load.books import Books, Watch
from load.http1 import clock, parse_url
from load.instance import Instance
from load.kills import GATEWAY, PATH, WITH_JOURNAL, WITH_REPLICA, Kills, Round, one_round
from load.live_client import Admin, Client, Reply
from load.loop import run
from load.units import LoadError

MODEL, TOKENS, PROMPT = "fake", 16, "How much may I spend today, and who is going to pay for it?"
PRICE = {"input": 1.0, "output": 3.0}  # USD per million tokens
BURST, ALLOWED = 200, 50
# In turn.
_VICTIMS = (GATEWAY, WITH_REPLICA, GATEWAY, WITH_JOURNAL)
_COUNTS = {
    "kills": "",
    "whole": "complete",
    "cut": "cut",
    "5xx": "refused",
    "made": "made",
    "billed": "billed",
    "unbilled": "unbilled",
    "unwritten": "unwritten",
    "gateway": "by_gateway",
    "journal": "by_journal",
    "reserved": "as_reserved",
    "released": "released",
    "marked": "marked",
}
_LEGEND = """\
whole, cut, 5xx: answers as clients saw them. made: tokens by the engines' count; billed, unbilled: on the books.
unwritten: of steps in which a replica died. gateway, journal, reserved, released: attempts by how they ended there;
reserved ones are estimated. marked: cut short, and no journal has told more of them. open: longest of a round.
"""
FLEET = """
models:
  - name: {model}
    engine: fake
    num_cpus: 0.1
    replicas: {{min: 2, max: 2}}
    price: {price}
    engine_settings: {{tokens_per_s: {rate}, tally: "{tally}"}}
gateway: {{replicas: 2, num_cpus: 0.25, lease_s: {lease_s}}}
"""


@dataclass(frozen=True, kw_only=True)
class Plan:
    kills: int = 20
    callers: int = 24
    lease_s: float = 2.0
    tokens_per_s: float = 60.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Burst:
    """200 at once against a budget for 50. answers: counts by status and error code."""

    what: str
    answers: dict[str, int]
    seconds: float
    violations: tuple[str, ...]


@dataclass
class Found:
    """What happened on one database."""

    database: str
    bursts: list[Burst] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    looks: int = 0
    violations: list[str] = field(default_factory=list)


class Told(Protocol):
    """What came of something on one database, for who watches; done: so many bursts and kills more."""

    def __call__(self, text: str, *, done: int = 0) -> None: ...


@contextlib.contextmanager
def watched(console: Console, kind: str, plan: Plan) -> Iterator[Told]:
    """A line for everything that is told and, on a terminal, a bar that says how much is left."""
    columns = (TextColumn(kind), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(kind, total=len(_kinds()) + plan.kills)

        def told(text: str, *, done: int = 0) -> None:
            progress.update(bar, advance=done)
            console.print(f"{kind}: {text}", style="dim")

        yield told


# -------------------------------------------------------------------------------------------------------------- bursts


def _kinds() -> list[tuple[str, bool, str]]:
    """(key, streamed, unit)"""
    return [
        (f"{'streamed' if stream else 'whole'}-{unit}", stream, unit)
        for unit in ("tokens", "usd")
        for stream in (True, False)
    ]


def document(prompt_tokens: int) -> str:
    """A budget for each key of the bursts that allows exactly 50 requests, and a wide one for the kills."""
    rules: list[dict[str, Any]] = [{"key": "kills", "usd": 1000.0, "window": "total"}]
    tokens = ALLOWED * (prompt_tokens + TOKENS)
    micro_usd = ALLOWED * (prompt_tokens * PRICE["input"] + TOKENS * PRICE["output"])
    for key, _, unit in _kinds():
        cap: dict[str, Any] = {"tokens": tokens} if unit == "tokens" else {"usd": round(micro_usd / 1e6, 12)}
        rules.append({"key": key, "window": "total", **cap})
    return json.dumps({"budgets": rules})


def _body(stream: bool) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "stream": stream}


async def burst(instance: Instance, key: str, token: str, stream: bool) -> Burst:
    async with Client(parse_url(instance.base_url), token) as client:
        began = clock()
        replies = await asyncio.gather(*(client.ask("POST", PATH, _body(stream)) for _ in range(BURST)))
        seconds = clock() - began
    answers = Counter(_kind(reply, stream) for reply in replies)
    wanted = {"200": ALLOWED, "429 insufficient_quota": BURST - ALLOWED}
    violations = [] if answers == wanted else [f"{key}: {dict(answers)}, wanted {wanted}"]
    books = await asyncio.to_thread(_spent, instance.database, key)
    if books and books[0] != books[1]:
        violations.append(f"{key}: {books[0]} of {books[1]} are spent although 50 requests were served")
    return Burst(key, dict(answers), seconds, tuple(violations))


def _kind(reply: Reply, stream: bool) -> str:
    if reply.fault:
        return reply.fault
    if reply.status != 200:
        return f"{reply.status} {reply.fields()['error']['code']}"
    return "200" if not stream or reply.body.endswith(b"data: [DONE]\n\n") else "200 without its end"


def _spent(database: str, key: str) -> tuple[int, int] | None:
    """(spent, cap) of a key's account, in the unit of its cap, once nothing is reserved there."""
    books, deadline = Books(database), clock() + 10
    try:
        while True:
            rows = [row for row in books.accounts() if json.loads(row[0])[1] == key]
            if rows and not rows[0][2] and not rows[0][5]:
                _, spent, _, cap, spent_tokens, _, cap_tokens = rows[0]
                return (spent, cap) if cap is not None else (spent_tokens, cap_tokens or 0)
            if clock() > deadline:
                return None
    finally:
        books.close()


# --------------------------------------------------------------------------------------------------------- an instance


async def check(instance: Instance, plan: Plan, tally: Path, found: Found, told: Told) -> None:
    """Everything on one running instance."""
    keys = {key: await asyncio.to_thread(instance.key, key) for key, _, _ in _kinds()}
    spender = await asyncio.to_thread(instance.key, "kills")
    admin_token = await asyncio.to_thread(instance.admin_token)
    origin = parse_url(instance.base_url)
    async with Client(origin, spender) as client, Client(origin, admin_token) as steering:
        probe = (await client.ask("POST", PATH, _body(False))).fields()
        await Admin(steering).publish(document(probe["usage"]["prompt_tokens"]), "load.check_budgets")
        watch = Watch(instance.database)
        with watch:
            for key, stream, _ in _kinds():
                found.bursts.append(await burst(instance, key, keys[key], stream))
                told(f"{key}: {found.bursts[-1].answers}", done=1)
            await kills(instance, client, plan, tally, found, told)
    found.looks = watch.looks
    found.violations += watch.breaches[:10]
    found.violations += [violation for each in found.bursts for violation in each.violations]
    found.violations += [violation for each in found.rounds for violation in each.violations]


async def kills(instance: Instance, client: Client, plan: Plan, tally: Path, found: Found, told: Told) -> None:
    dice = random.Random(plan.seed)
    for number in range(1, plan.kills + 1):
        began = clock()
        kills_ = Kills(model=MODEL, callers=plan.callers, victims=_VICTIMS[(number - 1) % len(_VICTIMS)])
        made = await one_round(instance, client, tally, kills_, dice)
        found.rounds.append(made)
        told(f"kill {number}: {clock() - began:.1f} s, {len(made.violations)} violations", done=1)
    if plan.kills and not any(made.by_journal for made in found.rounds):
        found.violations.append("no kill left anything for a journal to settle: nothing was shown")


def check_database(kind: str, url: str, plan: Plan, told: Told) -> Found:
    """Starts an instance on that database and takes it down. LoadError when it cannot begin or go on."""
    found = Found(kind)
    with contextlib.ExitStack() as stack:
        instance = Instance("", url)
        tally = instance.home / "tally"
        instance.fleet = FLEET.format(
            model=MODEL, price=json.dumps(PRICE), rate=plan.tokens_per_s, tally=tally, lease_s=plan.lease_s
        )
        told("starting an instance")
        stack.enter_context(instance)
        run(check(instance, plan, tally, found, told))
    return found


# ------------------------------------------------------------------------------------------------------------- command


def show(found: Sequence[Found], console: Console) -> None:
    table = Table("database", "key", "served", "refused", "s", title="200 at once, a budget for 50")
    for one in found:
        for each in one.bursts:
            refused = str(each.answers.get("429 insufficient_quota", 0))
            table.add_row(one.database, each.what, str(each.answers.get("200", 0)), refused, f"{each.seconds:.1f}")
    console.print(table)
    for one in found:
        table = Table("killed", *_COUNTS, "open", title=f"kill -9, {one.database}")
        for victims in dict.fromkeys(_VICTIMS):
            table.add_row(victims, *_summed([made for made in one.rounds if made.victims == victims]))
        table.add_row("all", *_summed(one.rounds))
        console.print(table)
    console.print(_LEGEND)
    for one in found:
        console.print(f"{one.database}: caps looked at {one.looks} times; {len(one.violations)} violations")
        for violation in one.violations[:10]:
            console.print(f"  VIOLATED {violation}", markup=False)


def _summed(rounds: Sequence[Round]) -> list[str]:
    sums = [sum(getattr(made, name) for made in rounds) for name in _COUNTS.values() if name]
    return [str(len(rounds)), *map(str, sums), f"{max((made.open_after_s for made in rounds), default=0.0):.1f} s"]


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load.check_budgets", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--database", action="append", choices=("sqlite", "postgresql"), help="default: both")
    parser.add_argument("--postgres-url", metavar="URL", help="an empty database on a running server")
    parser.add_argument("--kills", type=int, default=Plan.kills, help=f"on each database (default {Plan.kills})")
    parser.add_argument("--callers", type=int, default=Plan.callers, help=f"at once (default {Plan.callers})")
    parser.add_argument("--seed", type=int, default=Plan.seed, help="of the moments and victims")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything here")
    chosen = parser.parse_args(arguments)
    if chosen.kills < 0 or chosen.callers < 1:
        parser.error("--kills must not be negative, --callers at least 1")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    plan = Plan(kills=chosen.kills, callers=chosen.callers, seed=chosen.seed)
    console, found = Console(highlight=False, width=150), []
    try:
        with contextlib.ExitStack() as stack:
            for kind in chosen.database or ("sqlite", "postgresql"):
                url = "" if kind == "sqlite" else chosen.postgres_url or _server(stack)
                with watched(console, kind, plan) as told:
                    found.append(check_database(kind, url, plan, told))
    except LoadError as error:
        print(f"check_budgets: {error}", file=sys.stderr)
        return 2
    show(found, console)
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(one) for one in found], indent=2))
    return 1 if any(one.violations for one in found) else 0


def _server(stack: contextlib.ExitStack) -> str:
    from load.postgres import running_postgres

    try:
        return stack.enter_context(running_postgres()).new_database()
    except RuntimeError as error:
        raise LoadError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
