"""An upstream that misbehaves behind a live gateway: what callers see of it, and what is left behind.

    python -m load.check_upstreams [--requests 40] [--json FILE]

Starts `python -m replicas.mock_upstream` and an instance of two gateways whose models are that server in every mood,
once with a model of our own as fallback and once alone. Sends each of them requests, streams and whole answers in turn,
a few at a time, and judges every answer: right to the last word, or an error that says so. Afterwards the upstream's
own count of open connections and the gateways' count of open reservations must be zero.
Exit status: 0 all held · 1 something did not · 2 cannot begin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from load.http1 import parse_url
from load.live_client import Client, Reply
from load.loop import run
from load.own_instance import instance
from load.scripted import mock_upstream
from load.units import LoadError

# What goes wrong, in the mock's words, and whether it does so before anything was shown.
MOODS: Mapping[str, tuple[str, bool]] = {
    "well": ("normal:gap_ms=5", True),
    "hangs": ("hang-before-headers", True),
    "hangs after its headers": ("hang-before-first-token", True),
    "pings for ever": ("ping-forever", True),
    "hangs in the middle": ("hang-mid-stream:after=3", False),
    "is reset": ("reset:after=-1", True),
    "is reset in the middle": ("reset:after=3", False),
    "closes in the middle": ("close:after=3", False),
    "ends without an end": ("ended:after=3", False),
    "sends garbage": ("garbage:after=0,kind=json", True),
    "sends garbage in the middle": ("garbage:after=3,kind=utf8", False),
    "is busy (429)": ("status:code=429,retry_after=7", True),
    "fails (500)": ("status:code=500", True),
    "fails for a while (500)": ("status:code=500,times=7", True),
}
FALLBACK = "own"
TOKENS = 8
_AT_ONCE = 8
_PATH = "/v1/chat/completions"
_RIGHT = "".join(f"w{number} " for number in range(TOKENS))
_PATIENCE_S = 10.0


def name_of(mood: int, *, alone: bool) -> str:
    return f"{'alone' if alone else 'far'}-{mood}"


def fleet(upstream: str) -> str:
    """The fleet file's text: every mood twice and a model of our own. Tags keep their counts of requests apart."""
    models = [
        {
            "name": name_of(number, alone=alone),
            "engine": "openai",
            "base_url": upstream,
            "upstream_model": f"{behaviour}{',' if ':' in behaviour else ':'}tag={int(alone)}",
            "tokenizer": "estimate",
            "timeouts": {"connect_s": 1, "first_token_s": 0.4, "gap_s": 0.4, "keep_alive_s": 1},
            "price": {"input": 1, "output": 1},
        }
        for number, (behaviour, _) in enumerate(MOODS.values())
        for alone in (False, True)
    ]
    own = {"name": FALLBACK, "engine": "fake", "num_cpus": 0.1, "price": {"input": 1, "output": 1}}
    return json.dumps({"models": [*models, own], "gateway": {"replicas": 2, "num_cpus": 0.1}})


def policy() -> str:
    fallbacks = {name_of(number, alone=False): [FALLBACK] for number in range(len(MOODS))}
    budgets = [{"key": "*", "usd": 1000, "window": "total"}]
    return json.dumps({"fallbacks": fallbacks, "budgets": budgets, "retries": {"backoff_s": 0.01}})


# ------------------------------------------------------------------------------------------------------------- verdicts


class Wrong(ValueError):
    """An answer that no caller should be given."""


def verdict(reply: Reply, stream: bool, model: str) -> str:
    """What the answer was: "upstream", "fallback", "error event" or the code of a refusal. Wrong says what is not."""
    if reply.fault and not (stream and reply.status == 200):
        raise Wrong(reply.fault)
    if reply.status != 200:
        return _refusal(reply)
    return _streamed(reply, model) if stream else _whole(reply.fields(), model)


def _refusal(reply: Reply) -> str:
    try:
        error = reply.fields()["error"]
    except (ValueError, KeyError):
        raise Wrong(f"{reply.status} without an error object") from None
    if not error.get("message") or "127.0.0.1" in error["message"]:
        raise Wrong(f"{reply.status} says {error.get('message')!r}")
    if reply.status == 503 and int(reply.headers.get(b"retry-after", b"0")) < 1:
        raise Wrong("503 without Retry-After")
    if reply.status not in (503, 504):
        raise Wrong(f"{reply.status} for what is no fault of the caller's")
    return f"{reply.status} {error.get('code') or ''}".strip()


def _whole(answer: Mapping[str, Any], model: str) -> str:
    choice = answer["choices"][0]
    if not choice.get("finish_reason"):
        raise Wrong("a whole answer without finish_reason")
    return _answered_by(answer["model"], choice["message"]["content"], model)


def _answered_by(name: str, text: str, model: str) -> str:
    if name not in (model, FALLBACK):
        raise Wrong(f"answered by {name!r}")
    if name == model and text != _RIGHT:
        raise Wrong(f"the upstream's text came as {text!r}")
    if not text:
        raise Wrong("an empty answer")
    return "upstream" if name == model else "fallback"


def _streamed(reply: Reply, model: str) -> str:
    events = [part[6:] for part in reply.body.split(b"\n\n") if part.startswith(b"data: ")]
    done = bool(events) and events[-1] == b"[DONE]"
    parsed = [json.loads(event) for event in events if event != b"[DONE]"]
    chunks = [one for one in parsed if "error" not in one]
    names = {one["model"] for one in chunks}
    text = "".join(choice["delta"].get("content") or "" for one in chunks for choice in one["choices"])
    ended = any(choice.get("finish_reason") for one in chunks for choice in one["choices"])
    if len(names) != 1:
        raise Wrong(f"one stream names the models {sorted(names)}")
    if done and not reply.fault and ended and len(chunks) == len(parsed):
        return _answered_by(names.pop(), text, model)
    if done or ended or not reply.fault or "error" not in (parsed or [{}])[-1]:
        raise Wrong("a stream that was cut off looks as if it had ended, or says nothing of it")
    if not text or not _RIGHT.startswith(text):
        raise Wrong(f"before the error came {text!r}")
    return "error event"


# --------------------------------------------------------------------------------------------------------------- asking


@dataclass
class Found:
    """What came of one model's requests. wrong: what was wrong with those that were."""

    model: str
    mood: str
    verdicts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def judge(self, reply: Reply, stream: bool, early: bool, alone: bool) -> None:
        try:
            found = verdict(reply, stream, self.model)
            if found == "error event" and early:
                raise Wrong("an error event although nothing had to be shown yet")
            if found not in ("upstream", "fallback", "error event") and not alone:
                raise Wrong(f"refused ({found}) although there is a fallback")
        except (Wrong, ValueError, KeyError, TypeError, IndexError) as error:
            self.wrong.append(f"{type(error).__name__}: {error}")
        else:
            self.verdicts[found] += 1


async def ask_all(client: Client, requests: int) -> list[Found]:
    """Every mood, with a fallback and alone, one model after another."""
    found = []
    for number, (mood, (_, early)) in enumerate(MOODS.items()):
        for alone in (False, True):
            one = Found(name_of(number, alone=alone), mood + (", alone" if alone else ""))
            await _ask(client, one, requests, early, alone)
            found.append(one)
    return found


async def _ask(client: Client, found: Found, requests: int, early: bool, alone: bool) -> None:
    seats = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int) -> None:
        stream = number % 2 == 0
        body = {"model": found.model, "messages": [{"role": "user", "content": f"number {number}"}]}
        async with seats:
            reply = await client.ask("POST", _PATH, {**body, "max_tokens": TOKENS, "stream": stream}, timeout_s=20)
        found.judge(reply, stream, early, alone)

    await asyncio.gather(*(one(number) for number in range(requests)))


async def left_behind(gateway: Client, mock: Client) -> dict[str, float]:
    """Open sockets and running requests as the upstream counts them, open reservations as the gateways do: all that is
    left once it has had time to go away."""
    until = time.monotonic() + _PATIENCE_S
    while True:
        books = (await mock.ask("GET", "/mock")).fields()
        text = (await gateway.ask("GET", "/metrics")).body.decode()
        left = {
            "connections at the upstream": float(books["open_connections"]),
            "requests at the upstream": float(books["in_progress"]),
            "reservations": _metric(text, "signalbox_ledger_reservations"),
        }
        if not any(left.values()) or time.monotonic() > until:
            return left
        await asyncio.sleep(0.2)


def _metric(text: str, name: str) -> float:
    found = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(f"{name} ")]
    if not found:
        raise LoadError(f"/metrics does not show {name}")
    return float(found[0])


# -------------------------------------------------------------------------------------------------------------- command


async def check(base_url: str, key: str, upstream: str, requests: int) -> tuple[list[Found], dict[str, float]]:
    async with Client(parse_url(base_url), key) as gateway, Client(parse_url(upstream), "") as mock:
        found = await ask_all(gateway, requests)
        return found, await left_behind(gateway, mock)


def table(found: Sequence[Found]) -> Table:
    codes = sorted({name for one in found for name in one.verdicts} - {"upstream", "fallback", "error event"})
    columns = ["upstream", "fallback", "error event", *codes]
    shown = Table("the upstream", *columns, "wrong", title="what callers saw")
    for one in found:
        counts = [str(one.verdicts[name] or "") for name in columns]
        shown.add_row(one.mood, *counts, f"[red]{len(one.wrong)}[/red]" if one.wrong else "")
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What callers see of an upstream that misbehaves.")
    parser.add_argument("--requests", type=int, default=40, help="for every mood, with a fallback and without")
    parser.add_argument("--json", type=Path, help="write what was found")
    options = parser.parse_args(arguments)
    try:
        with mock_upstream() as upstream, instance(fleet(upstream)) as served:
            path = Path(served.environment["SIGNALBOX_HOME"]) / "policy.yaml"
            path.write_text(policy())
            served.signalbox("policy", "publish", str(path), "--why", "check_upstreams")
            found, left = run(check(served.base_url, served.key, upstream, options.requests))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console(width=150)
    console.print(table(found))
    for one in found:
        for what in sorted(set(one.wrong)):
            console.print(f"WRONG  {one.mood}: {one.wrong.count(what)}x {what}", markup=False)
    console.print("left behind: " + ", ".join(f"{value:g} {name}" for name, value in left.items()))
    if options.json:
        facts = [{"mood": one.mood, "verdicts": one.verdicts, "wrong": one.wrong} for one in found]
        options.json.write_text(json.dumps({"moods": facts, "left": left}, indent=2))
    return int(any(one.wrong for one in found) or any(left.values()))


if __name__ == "__main__":
    sys.exit(main())
