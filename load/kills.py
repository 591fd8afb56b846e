"""Gateways killed under load, and a recount: what the engines made, against the books, request by request.

The engines' own count is a file to which the fake engine writes every token as it is made (`tally`), so it owes nothing
to the journals that the books were settled from.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from load.books import Books, Row
from load.http1 import clock
from load.instance import Instance, kill
from load.live_client import Client, Reply
from load.units import LoadError

PATH = "/v1/completions"
_LONGEST = 60
# Of load from the moment that both gateways are at work to the latest kill, and after it.
_LATEST_S, _AFTER_S = 1.0, 0.6
_GATEWAYS = 2
_BACK_S, _CLOSED_S, _COMPARED_S = 60.0, 60.0, 60.0
# Who dies in a round.
GATEWAY, WITH_REPLICA, WITH_JOURNAL = "gateway", "and replica", "and journal"


@dataclass(frozen=True, kw_only=True)
class Kills:
    """How a round is done. callers: at once. victims: who dies."""

    model: str
    callers: int
    victims: str = GATEWAY


@dataclass
class Round:
    """One kill and what came of it. marked: attempts cut short that no journal could tell of, so more may be made.

    unwritten: tokens of the step in which a replica died. It writes a step's down when the step is over.
    """

    victims: str = GATEWAY
    complete: int = 0
    refused: int = 0
    cut: int = 0
    open_after_s: float = 0.0
    made: int = 0
    billed: int = 0
    unbilled: int = 0
    by_gateway: int = 0
    by_journal: int = 0
    as_reserved: int = 0
    released: int = 0
    marked: int = 0
    unwritten: int = 0
    violations: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Answered:
    stream: bool
    max_tokens: int
    reply: Reply

    @property
    def clean(self) -> bool:
        """Whether a client takes this for a whole answer."""
        return self.reply.status == 200 and not self.reply.fault

    def last(self) -> dict[str, object]:
        """The answer, or the event of a stream that has the usage; ValueError where there is none."""
        if not self.stream:
            return self.reply.fields()
        events = [line[6:] for line in self.reply.body.split(b"\n") if line.startswith(b"data: ")]
        if len(events) < 2 or events[-1] != b"[DONE]":
            raise ValueError("the stream has no [DONE]")
        found: dict[str, object] = json.loads(events[-2])
        return found


async def traffic(client: Client, plan: Kills, stop: asyncio.Event, dice: random.Random) -> list[Answered]:
    """So many callers, one request after another, streamed and whole in turn, until told to stop."""
    answered: list[Answered] = []

    async def caller(number: int) -> None:
        count = 0
        while not stop.is_set():
            count += 1
            stream, most = (number + count) % 2 == 0, dice.randint(5, _LONGEST)
            body = {"model": plan.model, "prompt": f"caller {number}, {count}", "max_tokens": most, "stream": stream}
            if stream:
                body["stream_options"] = {"include_usage": True}
            reply = await client.ask("POST", PATH, body)
            answered.append(Answered(stream, most, reply))
            if not answered[-1].clean:
                await asyncio.sleep(0.1)

    await asyncio.gather(*map(caller, range(plan.callers)))
    return answered


async def until(condition: Callable[[], bool], limit_s: float, what: str) -> None:
    """Wait until `condition()`; LoadError after `limit_s`."""
    began = clock()
    while not await asyncio.to_thread(condition):
        if clock() - began > limit_s:
            raise LoadError(f"{what} within {limit_s:g} s")
        await asyncio.sleep(0.05)


async def one_round(instance: Instance, client: Client, tally: Path, plan: Kills, dice: random.Random) -> Round:
    """Load, a kill at a random moment, and the recount of every request of this round."""
    found = Round(plan.victims)
    books = Books(instance.database)
    try:
        await until(lambda: not books.reserving(), _CLOSED_S, "the books were not closed")
        before = {row.id for row in await asyncio.to_thread(books.requests)}
        await asyncio.to_thread(tally.write_bytes, b"")
        stop = asyncio.Event()
        flowing = asyncio.create_task(traffic(client, plan, stop, dice))
        try:
            await until(lambda: len(books.reserving()) == _GATEWAYS, _BACK_S, "two gateways were not at work")
            await asyncio.sleep(dice.uniform(0, _LATEST_S))
            await asyncio.to_thread(strike, instance, dice, plan.victims)
            killed = clock()
            await asyncio.sleep(_AFTER_S)
        finally:
            stop.set()
            answers = await flowing
        await until(lambda: not books.reserving(), _CLOSED_S, "reserved was not 0")
        found.open_after_s = clock() - killed
        if plan.victims != WITH_JOURNAL:
            await until(lambda: not _short(books, before, tally), _COMPARED_S, "what was cut short was not compared")
        rows = [row for row in await asyncio.to_thread(books.requests) if row.id not in before]
    finally:
        books.close()
    judge(found, answers, rows, await asyncio.to_thread(_tallied, tally))
    return found


def _short(books: Books, before: Collection[str], tally: Path) -> bool:
    """Whether of something that was cut short less is on the books than was made and written: a journal has to tell."""
    made = _tallied(tally)
    rows = [row for row in books.requests() if row.source == "cut" and row.id not in before]
    return any(row.completion_tokens + row.unbilled < made[row.id] - 1 for row in rows)


def _tallied(tally: Path) -> Counter[str]:
    return Counter(tally.read_text().split())


def strike(instance: Instance, dice: random.Random, victims: str) -> None:
    """SIGKILL for a gateway, and as `victims` says for a replica too, whose journal may go first."""
    gateway = dice.choice(instance.gateways())
    replica = dice.choice(instance.replicas()) if victims != GATEWAY else None
    journal = instance.journal(replica) if replica is not None and victims == WITH_JOURNAL else None
    if journal is not None:
        journal.unlink()
    kill(gateway)
    if replica is not None:
        kill(replica)


def judge(found: Round, answers: Sequence[Answered], rows: Sequence[Row], made: Mapping[str, int]) -> None:
    """Hold the books against what clients saw and what the engines made."""
    for answer in answers:
        _judge_answer(found, answer)
    known = {row.id: row for row in rows}
    for row in rows:
        _judge_row(found, row, made.get(row.id, 0))
    for id in made.keys() - known.keys():
        found.violations.append(f"{id}: {made[id]} tokens were made and are not on the books")
    found.made, found.billed = sum(made.values()), sum(row.completion_tokens for row in rows)
    found.unbilled = sum(row.unbilled for row in rows)


def _judge_answer(found: Round, answer: Answered) -> None:
    if not answer.clean:
        found.refused += answer.reply.status not in (0, 200)
        found.cut += answer.reply.status in (0, 200)
        if answer.reply.status not in (0, 200, 500, 502, 503, 504):
            found.violations.append(f"an answer of {answer.reply.status}: {answer.reply.complaint}")
        return
    found.complete += 1
    try:
        usage = answer.last()["usage"]
        tokens = usage["completion_tokens"] if isinstance(usage, dict) else None
    except (ValueError, KeyError) as error:
        found.violations.append(f"a clean end of an answer that is not whole: {error}")
        return
    if tokens != answer.max_tokens:
        found.violations.append(f"a clean end after {tokens} of {answer.max_tokens} tokens")


def _judge_row(found: Round, row: Row, made: int) -> None:
    found.by_gateway += row.source in ("gateway", "compared", "cut") and row.state == "settled"
    found.by_journal += row.source == "journal" and row.state == "settled"
    found.as_reserved += row.source == "reserved"
    found.released += row.state == "released"
    found.marked += row.source == "cut"
    noted = row.completion_tokens + row.unbilled
    if row.source == "reserved":
        as_reserved = row.estimated and row.cost == row.reserved and noted == row.max_tokens
        if found.victims != WITH_JOURNAL or not as_reserved:
            found.violations.append(f"{row.id}: charged as reserved, {row}")
    elif row.estimated:
        found.violations.append(f"{row.id}: marked as estimated, {row}")
    elif row.source == "cut" and found.victims == WITH_JOURNAL:
        # marked: what had come is on the books, and the journal that would know of more is gone
        if noted > made:
            found.violations.append(f"{row.id}: {made} tokens were made, {noted} are on the books, {row}")
    elif found.victims == WITH_REPLICA and row.source in ("journal", "compared", "cut") and made - noted == 1:
        found.unwritten += 1
    elif noted != made:
        found.violations.append(f"{row.id}: {made} tokens were made, {noted} are on the books, {row}")
