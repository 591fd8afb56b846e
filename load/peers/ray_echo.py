"""Ray Serve's plain echo: one deployment behind Serve's own HTTP proxy, nothing of Signalbox.

    python load/peers/ray_echo.py --port 8001 --scratch DIRECTORY

Answers OpenAI-shaped chat completions with the prompt's own words, as many as max_tokens asks for, one a chunk. A file
of its own without imports of ours: it is what somebody would write who wanted the least that Serve can do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any


def _words(body: dict[str, Any]) -> Iterator[str]:
    words = str(body["messages"][-1]["content"]).split() or ["echo"]
    for number in range(int(body.get("max_tokens") or len(words))):
        yield words[number % len(words)] + " "


def _usage(body: dict[str, Any]) -> dict[str, int]:
    prompt = sum(len(str(message["content"]).split()) for message in body["messages"])
    completion = sum(1 for _ in _words(body))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _said(body: dict[str, Any], kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"id": "echo", "object": kind, "created": 0, "model": body.get("model"), "choices": choices, **more}


async def _events(body: dict[str, Any]) -> AsyncIterator[str]:
    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps(_said(body, 'chat.completion.chunk', choices, **more))}\n\n"

    for word in _words(body):
        yield event([{"index": 0, "delta": {"content": word}, "finish_reason": None}])
    yield event([{"index": 0, "delta": {}, "finish_reason": "length"}])
    if (body.get("stream_options") or {}).get("include_usage"):
        yield event([], usage=_usage(body))
    yield "data: [DONE]\n\n"


class Echo:
    async def __call__(self, request: Any) -> Any:
        responses = importlib.import_module("starlette.responses")
        body = await request.json()
        if body.get("stream"):
            return responses.StreamingResponse(_events(body), media_type="text/event-stream")
        message = {"role": "assistant", "content": "".join(_words(body))}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        return responses.JSONResponse(_said(body, "chat.completion", [choice], usage=_usage(body)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--scratch", required=True, help="Ray's files; a short path, sockets lie in it")
    options = parser.parse_args()
    ray, serve = importlib.import_module("ray"), importlib.import_module("ray.serve")
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    # an instance of its own, whatever else of Ray runs on this machine
    ray.init(address="local", include_dashboard=False, _temp_dir=options.scratch, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    # the default of 5 requests at once would be a queue, not an echo
    serve.run(serve.deployment(Echo, max_ongoing_requests=1000).bind(), route_prefix="/")
    over.wait()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
