"""Another server as an upstream, put through what its callers will put it through.

    python -m load.check_server http://127.0.0.1:8080/v1 --model NAME [--api-key-env VARIABLE] [--json FILE]

Starts an instance whose only model is that server and asks it through the gateway: whole answers, streams, completions,
several choices, callers who leave and who have no time, prompts that are too long, wrong fields, four at once. It says
of each what came. What a server cannot do may be refused by name; what must never be is a wrong answer, a cut stream
that ends cleanly, or a server that is still busy with somebody who has left.
Exit status: 0 nothing wrong · 1 something is · 2 cannot begin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from load.http1 import parse_url
from load.live_client import Client, Reply
from load.loop import run
from load.own_instance import instance
from load.units import LoadError

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_NAME = "far"
_PATIENCE_S = 60.0


class Wrong(ValueError):
    """What no caller should see."""


class Asker:
    """Asks the one model; `chat` and `complete` take the fields to change."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def chat(self, timeout_s: float = _PATIENCE_S, limit_ms: int = 0, **changes: Any) -> Reply:
        messages = [{"role": "user", "content": "Name the capital of France in one word."}]
        fields = {"model": _NAME, "messages": messages, "max_tokens": 16, "temperature": 0, **changes}
        headers = {"x-request-timeout-ms": str(limit_ms)} if limit_ms else {}
        return await self._client.ask("POST", _CHAT, fields, timeout_s=timeout_s, headers=headers)

    async def complete(self, **changes: Any) -> Reply:
        fields = {"model": _NAME, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, **changes}
        return await self._client.ask("POST", _COMPLETIONS, fields, timeout_s=_PATIENCE_S)


def answer(reply: Reply) -> Mapping[str, Any]:
    """The body of a 200 with a finish_reason for every choice."""
    if reply.complaint:
        raise Wrong(reply.complaint)
    found = reply.fields()
    if not found["choices"] or not all(choice.get("finish_reason") for choice in found["choices"]):
        raise Wrong("a choice without finish_reason")
    return found


def events(reply: Reply) -> list[dict[str, Any]]:
    """The events of a stream that ended well."""
    if reply.complaint:
        raise Wrong(reply.complaint)
    lines = [part[6:] for part in reply.body.split(b"\n\n") if part.startswith(b"data: ")]
    if not lines or lines[-1] != b"[DONE]":
        raise Wrong("the stream ended without [DONE]")
    return [json.loads(line) for line in lines[:-1]]


def refusal(reply: Reply, *statuses: int) -> str:
    if reply.fault or reply.status not in statuses:
        raise Wrong(reply.complaint or "it was answered")
    error = reply.fields()["error"]
    return f"{reply.status} {error.get('code') or ''} {error.get('param') or ''}: {error['message']}"[:90]


# --------------------------------------------------------------------------------------------------------------- checks


async def whole(ask: Asker) -> str:
    found = answer(await ask.chat())
    usage = found["usage"]
    if not found["choices"][0]["message"]["content"] or usage["completion_tokens"] < 1 or usage["prompt_tokens"] < 1:
        raise Wrong(f"no text or no usage: {usage}")
    return f"{usage['completion_tokens']} tokens{', usage estimated' if usage.get('estimated') else ''}"


async def stream(ask: Asker) -> str:
    once = answer(await ask.chat())["choices"][0]["message"]["content"]
    chunks = events(await ask.chat(stream=True, stream_options={"include_usage": True}))
    text = "".join(choice["delta"].get("content") or "" for one in chunks for choice in one["choices"])
    if not text or chunks[-1].get("usage") is None:
        raise Wrong("no text or no usage")
    return "the text of the whole answer" if text == once else f"another text than the whole answer's: {text[:40]!r}"


async def completion(ask: Asker) -> str:
    reply = await ask.complete()
    return repr(answer(reply)["choices"][0]["text"][:40]) if reply.status == 200 else refusal(reply, 400, 500)


async def choices(ask: Asker) -> str:
    reply = await ask.chat(n=2, temperature=1)
    if reply.status != 200:
        return refusal(reply, 400)
    found = answer(reply)["choices"]
    if sorted(choice["index"] for choice in found) != [0, 1]:
        raise Wrong(f"{len(found)} choices for n: 2")
    return "two"


async def leaving(ask: Asker) -> str:
    """Callers who hang up in the middle must leave the server free: whoever comes next is served."""
    for _ in range(3):
        await ask.chat(timeout_s=0.3, max_tokens=2000, stream=True)
    began = asyncio.get_running_loop().time()
    answer(await ask.chat(max_tokens=1))
    return f"the next one waited {asyncio.get_running_loop().time() - began:.2f} s"


async def deadline(ask: Asker) -> str:
    reply = await ask.chat(limit_ms=300, max_tokens=2000)
    if reply.status == 200:
        return "was quicker than 300 ms"
    said = refusal(reply, 504)
    answer(await ask.chat(max_tokens=1))
    return said


async def too_long(ask: Asker) -> str:
    reply = await ask.chat(messages=[{"role": "user", "content": "word " * 200_000}])
    return "answered" if reply.status == 200 else refusal(reply, 400, 413, 503)


async def wrong_field(ask: Asker) -> str:
    return refusal(await ask.chat(temperature="hot"), 400)


async def four(ask: Asker) -> str:
    replies = await asyncio.gather(*(ask.chat(stream=number % 2 == 0) for number in range(4)))
    for number, reply in enumerate(replies):
        (events if number % 2 == 0 else answer)(reply)
    return "all answered"


CHECKS: tuple[tuple[str, Callable[[Asker], Awaitable[str]]], ...] = (
    ("a whole answer", whole),
    ("a stream", stream),
    ("a completion", completion),
    ("two choices", choices),
    ("callers who leave", leaving),
    ("a time limit", deadline),
    ("a prompt that is too long", too_long),
    ("a wrong field", wrong_field),
    ("four at once", four),
)


async def check(base_url: str, key: str) -> list[tuple[str, bool, str]]:
    """(what was tried, whether it held, what came) for every check."""
    found = []
    async with Client(parse_url(base_url), key) as client:
        for name, one in CHECKS:
            try:
                found.append((name, True, await one(Asker(client))))
            except (Wrong, ValueError, KeyError, TypeError, IndexError) as error:
                found.append((name, False, f"{type(error).__name__}: {error}"))
    return found


# -------------------------------------------------------------------------------------------------------------- command


def fleet(upstream: str, model: str, key_env: str | None) -> str:
    far = {"name": _NAME, "engine": "openai", "base_url": upstream, "upstream_model": model, "tokenizer": "estimate"}
    return json.dumps({"models": [{**far, "api_key_env": key_env} if key_env else far]})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Another server, put through what its callers will put it through.")
    parser.add_argument("url", help="its base URL, up to and including the version")
    parser.add_argument("--model", required=True, help="what it calls its model")
    parser.add_argument("--api-key-env", help="the environment variable with its key")
    parser.add_argument("--json", type=Path, help="write what was found")
    options = parser.parse_args(arguments)
    try:
        with instance(fleet(options.url, options.model, options.api_key_env)) as served:
            found = run(check(served.base_url, served.key))
    except LoadError as error:
        print(error, file=sys.stderr)
        return 2
    shown = Table("what", "", "what came", title=options.url)
    for name, held, said in found:
        shown.add_row(name, "" if held else "WRONG", said)
    Console(width=140, markup=False).print(shown)
    if options.json:
        options.json.write_text(
            json.dumps([{"what": n, "held": held, "came": said} for n, held, said in found], indent=2)
        )
    return int(not all(held for _, held, _ in found))


if __name__ == "__main__":
    sys.exit(main())
