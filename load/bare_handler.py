"""The least that can answer like the gateway: one ASGI function with canned bytes, the yardstick of bench_gateway.

It reads the body and looks only for `"stream":true` in it. PACE_S in the environment is the pause between tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TOKENS = 64
_BASE = {
    "id": "chatcmpl-0123456789abcdef01234567",
    "created": 1,
    "model": "bare",
    "system_fingerprint": "fp_0123456789",
}


def _event(choice: dict[str, Any]) -> bytes:
    event = {**_BASE, "object": "chat.completion.chunk", "choices": [{"index": 0, "logprobs": None, **choice}]}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


_TOKEN = _event({"delta": {"content": "x"}, "finish_reason": None})
_END = _event({"delta": {}, "finish_reason": "length"}) + b"data: [DONE]\n\n"
_WHOLE = json.dumps(
    {**_BASE, "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}]}
).encode()


async def app(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    stream = b'"stream":true' in body
    kind = b"text/event-stream" if stream else b"application/json"
    headers = [(b"content-type", kind)] + ([] if stream else [(b"content-length", b"%d" % len(_WHOLE))])
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    if not stream:
        await send({"type": "http.response.body", "body": _WHOLE})
        return
    pace_s = float(os.environ.get("PACE_S", "0"))
    for _ in range(TOKENS):
        await send({"type": "http.response.body", "body": _TOKEN, "more_body": True})
        await asyncio.sleep(pace_s)
    await send({"type": "http.response.body", "body": _END})
