"""Policies published while traffic flows: nothing fails, nothing is mixed, everything is explained.

    python -m load.check_publish --base-url URL --publishes 50 --rate 100

Sends requests to a group of two models in an open loop, streams and whole answers in turn, and publishes generations
through the admin API meanwhile; each prescribes another model and another replica policy than the one before. Then it
rolls back with one command and publishes documents that must be refused, with traffic still flowing. Afterwards every
request's explanation is fetched and held against what was active by this process' own clock (load.live_publish).

For the time of the check the instance serves by these documents; at the end the generation that it found serves again.
deploy/fleets/rehearsal.yaml has what is needed: two fake models, two gateways. Exit status: 0 all held · 1 something
did not · 2 cannot begin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import secrets
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from load.http1 import clock, parse_url
from load.live_client import Admin, AdminRefused, Client, Published, credential
from load.live_publish import (
    Asked,
    Prescription,
    Violation,
    check_request,
    document,
    mistakes,
    overlap_ms,
    possible,
)
from load.loop import run
from load.units import LoadError

_PATH = "/v1/chat/completions"
_TOKENS = 8
_LEAD_S = 1.0  # of traffic before the first publication and after the last change
_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What is to be done. pause_s: between the answer to a publication and the next one. gateways: at least so many
    must take part. fetches: explanations asked for at once."""

    models: tuple[str, ...]
    group: str = "auto"
    publishes: int = 50
    rate: float = 100.0
    pause_s: float = 0.25
    gateways: int = 2
    fetches: int = 16


@dataclass
class Outcome:
    """What happened. records: explanations by request id, as far as there are any."""

    switches: list[Published] = field(default_factory=list)
    prescribed: dict[int, Prescription] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    publish_s: list[float] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    fetched_s: float = 0.0

    def violated(self, what: str, detail: str) -> None:
        self.violations.append(Violation(what, detail))


# ------------------------------------------------------------------------------------------------------------ traffic


async def traffic(client: Client, plan: Rehearsal, stop: asyncio.Event, asked: list[Asked]) -> None:
    """An open loop until `stop`; returns when the last request has ended."""
    prefix = f"check-publish-{secrets.token_hex(6)}"
    began = clock()
    running: set[asyncio.Task[None]] = set()

    async def one(number: int, due: float) -> None:
        stream = number % 2 == 0
        request_id = f"{prefix}-{number}"
        fields = {
            "model": plan.group,
            "messages": [{"role": "user", "content": f"Request {number}: what is published now?"}],
            "max_tokens": _TOKENS,
            "stream": stream,
        }
        asked.append(Asked(request_id, stream, due, await client.ask("POST", _PATH, fields, request_id=request_id)))

    number = 0
    while not stop.is_set():
        due = began + number / plan.rate
        if (wait := due - clock()) > 0:
            await asyncio.sleep(min(wait, 0.1))
            continue
        task = asyncio.create_task(one(number, due))
        running.add(task)
        task.add_done_callback(running.discard)
        number += 1
        await asyncio.sleep(0)
    await asyncio.gather(*running)


# ------------------------------------------------------------------------------------------------------------ changes


async def publish(admin: Admin, plan: Rehearsal, number: int, outcome: Outcome) -> None:
    text, prescription = document(number, plan.group, plan.models)
    try:
        published = await admin.publish(text, f"load.check_publish, document {number}")
    except AdminRefused as error:
        outcome.violated("a publication was refused", f"document {number}: {error}")
        return
    outcome.switches.append(published)
    outcome.prescribed[published.generation] = prescription
    if published.unanswered:
        outcome.violated("a gateway did not confirm", f"generation {published.generation}: {published.unanswered}")


async def change(admin: Admin, plan: Rehearsal, outcome: Outcome) -> None:
    """Everything that is done to the policies while requests come."""
    await asyncio.sleep(_LEAD_S)
    for number in range(1, plan.publishes + 1):
        before = len(outcome.switches)
        await publish(admin, plan, number, outcome)
        outcome.publish_s += [switch.seconds for switch in outcome.switches[before:]]
        await asyncio.sleep(plan.pause_s)
    await roll_back(admin, outcome)
    await refuse(admin, plan, outcome)
    await asyncio.sleep(_LEAD_S)


async def roll_back(admin: Admin, outcome: Outcome) -> None:
    """One command, and the generation before the last one serves."""
    wanted = outcome.switches[-2].generation
    switch = await admin.rollback("load.check_publish")
    outcome.switches.append(switch)
    if switch.generation != wanted:
        outcome.violated("rollback", f"generation {switch.generation} serves, the one before was {wanted}")


async def refuse(admin: Admin, plan: Rehearsal, outcome: Outcome) -> None:
    """Documents with a mistake are refused with its line, and change nothing."""
    before = await admin.newest()
    for mistake in mistakes(plan.group, plan.models):
        try:
            switch = await admin.publish(mistake.document, "load.check_publish: must be refused")
        except AdminRefused as error:
            outcome.refusals.append(str(error))
            line = re.search(r"\bpolicy:(\d+):", str(error))
            if error.status != 400 or line is None or int(line[1]) != mistake.line:
                outcome.violated("a refusal that does not name the line", f"{mistake.what}, {mistake.line}: {error}")
        else:
            outcome.violated("an invalid document was published", f"{mistake.what}: {switch.generation}")
    if (after := await admin.newest()) != before:
        outcome.violated("an invalid document changed something", f"(active, newest) was {before}, is {after}")


# ----------------------------------------------------------------------------------------------------------- judgement


async def explain(admin: Admin, plan: Rehearsal, outcome: Outcome) -> None:
    """Fetch the explanation of every request; one that is not known has none."""
    began = clock()
    room = asyncio.Semaphore(plan.fetches)

    async def fetch(request_id: str) -> None:
        async with room:
            try:
                outcome.records[request_id] = await admin.explain(request_id)
            except AdminRefused as error:
                outcome.records[request_id] = []
                if error.status != 404:
                    outcome.violated("an explanation could not be fetched", f"{request_id}: {error}")

    await asyncio.gather(*(fetch(one.request_id) for one in outcome.asked))
    outcome.fetched_s = clock() - began


def judge(plan: Rehearsal, outcome: Outcome) -> None:
    for one in outcome.asked:
        records = outcome.records[one.request_id]
        if found := check_request(one, records, outcome.switches, outcome.prescribed):
            outcome.violations.append(found)
    gateways = {record["gateway"] for records in outcome.records.values() for record in records}
    if len(gateways) < plan.gateways:
        outcome.violated("gateways", f"{len(gateways)} answered requests, {plan.gateways} were wanted")


def figures(plan: Rehearsal, outcome: Outcome) -> dict[str, Any]:
    """For people and for --json; seconds and milliseconds as named."""
    records = [record for records in outcome.records.values() for record in records]
    waits = np.array([one.reply.ended - one.due for one in outcome.asked])
    lags = np.array([one.reply.begun - one.due for one in outcome.asked])
    publish_s = np.array(outcome.publish_s or [float("nan")])
    mixed = [possible(one.reply.begun, one.reply.ended, outcome.switches) for one in outcome.asked]
    return {
        "requests": len(outcome.asked),
        "streamed": sum(one.stream for one in outcome.asked),
        "failed": sum(found.what == "failed request" for found in outcome.violations),
        "requests_during_a_switch": sum(len(found) > 1 for found in mixed),
        "request_ms": _percentiles(waits * 1e3),
        "client_lag_ms": _percentiles(lags * 1e3),
        "publications": len(outcome.publish_s),
        "publish_ms": _percentiles(publish_s * 1e3),
        "late_ms_max": max((switch.late_ms for switch in outcome.switches), default=0.0),
        "overlap_ms": overlap_ms(records, outcome.switches),
        "by_gateway": dict(Counter(record["gateway"] for record in records)),
        "by_model": dict(Counter(record["steps"][0]["model"] for record in records if record["steps"])),
        "generations_seen": len({record["generation"] for record in records}),
        "explained": len(records),
        "explanations_per_s": len(outcome.asked) / max(outcome.fetched_s, 1e-9),
        "refusals": outcome.refusals,
        "violations": [asdict(violation) for violation in outcome.violations],
    }


def _percentiles(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "max": float(values.max())}


async def rehearse(client: Client, admin: Admin, plan: Rehearsal) -> Outcome:
    """The whole check. LoadError when it cannot begin; what goes wrong later is in the outcome."""
    outcome = Outcome()
    before, _ = await admin.newest()
    try:
        await publish(admin, plan, 0, outcome)
        if not outcome.switches:
            raise LoadError(f"{outcome.violations[0].what}: {outcome.violations[0].detail}")
        stop = asyncio.Event()
        flowing = asyncio.create_task(traffic(client, plan, stop, outcome.asked))
        try:
            await change(admin, plan, outcome)
        except AdminRefused as error:
            outcome.violated("the admin API failed", str(error))
        finally:
            stop.set()
            await flowing
        await explain(admin, plan, outcome)
    finally:
        await admin.rollback("load.check_publish is over", to=before)
    judge(plan, outcome)
    return outcome


# ------------------------------------------------------------------------------------------------------------ command


def show(found: dict[str, Any], console: Console) -> None:
    def spread(name: str) -> str:
        return "p50 {p50:.0f}, p99 {p99:.0f}, max {max:.0f} ms".format(**found[name])

    console.print(f"publications   {found['publications']}, each {spread('publish_ms')}")
    console.print(f"requests       {found['requests']}, {found['streamed']} streamed, {found['failed']} failed")
    console.print(
        f"               {spread('request_ms')} from the due time; client's own lag {spread('client_lag_ms')}"
    )
    console.print(f"               {found['requests_during_a_switch']} of them while a switch was under way")
    console.print(f"explained      {found['explained']}, by {found['generations_seen']} generations")
    console.print(f"               {found['explanations_per_s']:.0f} explanations a second")
    console.print(f"by model       {found['by_model']}")
    console.print(f"by gateway     {found['by_gateway']}")
    console.print(
        f"skew           {found['overlap_ms']:.1f} ms in which two generations were seen to begin requests; latest "
        f"news of a switch {found['late_ms_max']:.0f} ms late"
    )
    for refusal in found["refusals"]:
        console.print(f"refused        {refusal}", markup=False)
    for what, count in Counter(one["what"] for one in found["violations"]).items():
        console.print(f"VIOLATED       {count}x {what}", markup=False)
    for one in found["violations"][:_SHOWN]:
        console.print(f"  {one['what']}: {one['detail']}", markup=False)


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load.check_publish", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key-env", default="SIGNALBOX_API_KEY", metavar="NAME")
    parser.add_argument("--admin-token-env", default="SIGNALBOX_ADMIN_TOKEN", metavar="NAME")
    parser.add_argument("--publishes", type=int, default=Rehearsal.publishes, help="publications (default 50)")
    parser.add_argument("--rate", type=float, default=Rehearsal.rate, help="requests a second (default 100)")
    parser.add_argument("--pause", type=float, default=Rehearsal.pause_s, help="seconds between publications")
    parser.add_argument("--model", action="append", metavar="NAME", help="of the group; twice (default: small, large)")
    parser.add_argument("--group", default=Rehearsal.group, help="the group's name (default auto)")
    parser.add_argument("--gateways", type=int, default=Rehearsal.gateways, help="that must take part (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    chosen = parser.parse_args(arguments)
    if chosen.publishes < 1 or not chosen.rate > 0 or chosen.pause < 0:
        parser.error("--publishes must be at least 1, --rate above 0, --pause not below 0")
    if len(set(chosen.model or ("small", "large"))) < 2:
        parser.error("--model: two different ones, or no mixing could be seen")
    return chosen


async def check(chosen: argparse.Namespace) -> dict[str, Any]:
    origin = parse_url(chosen.base_url)
    plan = Rehearsal(
        models=tuple(dict.fromkeys(chosen.model or ("small", "large"))),
        group=chosen.group,
        publishes=chosen.publishes,
        rate=chosen.rate,
        pause_s=chosen.pause,
        gateways=chosen.gateways,
    )
    key = credential(chosen.api_key_env, "API key")
    token = credential(chosen.admin_token_env, "admin token")
    async with Client(origin, key) as client, Client(origin, token) as steering:
        return figures(plan, await rehearse(client, Admin(steering), plan))


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = options(arguments)
    try:
        found = run(check(chosen))
    except LoadError as error:
        print(f"check_publish: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    show(found, Console(width=None if sys.stdout.isatty() else 140, highlight=False))
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if found["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
