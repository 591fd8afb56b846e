"""How many tokens a text is for a model whose tokenizer we do not have: tiktoken's count, or a guess from its bytes.

Both are estimates and only ever stand in: before a request for its reservation, after it where the upstream reports no
usage. A guess errs on the high side for English and code, because it holds money back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

log = logging.getLogger(__name__)

Count = Callable[[str], int]

ESTIMATE = "estimate"
# English is near 4 bytes a token, code near 3, most other scripts 2 to 4.
_BYTES_PER_TOKEN = 3
# What OpenAI's chat format adds: three tokens a message, one for a name, three to open the answer.
_PER_MESSAGE, _PER_NAME, _OPENING = 3, 1, 3
# The most that OpenAI's tile rule gives one image: 85 and eight tiles of 170.
_PER_IMAGE = 85 + 8 * 170
# tiktoken's time grows faster than the length of a text without spaces; pieces keep it straight.
_PIECE_CHARS = 4096


def estimate(text: str) -> int:
    """Tokens by the number of bytes, rounded up."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)


async def counter(tokenizer: str, timeout_s: float = 10.0) -> Count:
    """Counts by the named tiktoken encoding; by bytes for "estimate", and, said in the log, where it cannot be had.

    tiktoken fetches an encoding over the network the first time and keeps it where TIKTOKEN_CACHE_DIR says. That has no
    time-out of its own, so it happens on a daemon thread that is left behind after `timeout_s`.
    """
    if tokenizer == ESTIMATE:
        return estimate
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[Count | None] = loop.create_future()

    def done(count: Count | None) -> None:
        if not loaded.done():
            loaded.set_result(count)

    def load() -> None:
        count = _tiktoken(tokenizer)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(done, count)

    threading.Thread(target=load, name="tiktoken", daemon=True).start()
    try:
        count = await asyncio.wait_for(loaded, timeout_s)
    except TimeoutError:
        count = None
    if count is None:
        log.warning("the encoding %r cannot be had; tokens of upstreams are estimated from bytes", tokenizer)
    return count or estimate


def _tiktoken(name: str) -> Count | None:
    import tiktoken

    try:
        return counting(tiktoken.get_encoding(name).encode_ordinary)
    except Exception as error:  # ValueError, OSError, whatever the HTTP library raises: all mean that there is none
        log.info("tiktoken has no encoding %r: %s", name, type(error).__name__)
        return None


def counting(encode: Callable[[str], list[int]]) -> Count:
    """A Count from an encoder."""

    def count(text: str) -> int:
        return sum(len(encode(text[at : at + _PIECE_CHARS])) for at in range(0, len(text), _PIECE_CHARS))

    return count


def prompt_tokens(body: Mapping[str, Any], count: Count) -> int:
    """Tokens of the prompt of an OpenAI body: of its messages and tools, or of all its prompts together."""
    if "messages" not in body:
        return sum(len(prompt) if isinstance(prompt, list) else count(prompt) for prompt in _prompts(body["prompt"]))
    total = _OPENING + sum(_message(message, count) for message in body["messages"])
    for name in ("tools", "functions", "response_format"):
        if body.get(name):
            total += count(_json(body[name]))
    return total


def _prompts(prompt: Any) -> Iterable[Any]:
    one = isinstance(prompt, str) or (bool(prompt) and isinstance(prompt[0], int))
    return [prompt] if one else prompt


def _message(message: Mapping[str, Any], count: Count) -> int:
    total = _PER_MESSAGE + (_PER_NAME if message.get("name") else 0)
    for name, value in message.items():
        if isinstance(value, str):
            total += count(value)
        elif name == "content" and isinstance(value, list):
            total += sum(_part(part, count) for part in value)
        elif value is not None:
            total += count(_json(value))
    return total


def _part(part: Any, count: Count) -> int:
    if not isinstance(part, Mapping):
        return count(_json(part))
    if part.get("type") == "image_url":
        return _PER_IMAGE
    text = part.get("text")
    return count(text if isinstance(text, str) else _json(part))


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str)
