"""An OpenAI-shaped server that misbehaves on request: for tests and rehearsals of upstreams, and load on a gateway.

    python -m replicas.mock_upstream --port 9000 --behaviour "normal:tokens=64,gap_ms=5"

The model's name in a request chooses what happens (`replicas.mock_scripts`); a name that is no behaviour gets
`--behaviour`. GET /mock tells what the server has seen. Raw asyncio, because what is to be tested lies below what a web
framework can do wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from replicas.mock_scripts import SCRIPTS, Exchange

_MAX_HEAD, _MAX_BODY = 64 * 1024, 16 * 1024 * 1024
_KEEP_ALIVE_S = 75.0


@dataclass(frozen=True, slots=True)
class Received:
    """One request as it came."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


@dataclass(slots=True)
class MockUpstream:
    """Start it, point an upstream at `base_url`, read its books, stop it.

    received: the latest requests; `connections` counts sockets ever accepted, `open_connections` those open now;
    `abandoned` the requests whose client left before their answer had ended.
    """

    behaviour: str = "normal"
    received: list[Received] = field(default_factory=list)
    connections: int = 0
    open_connections: int = 0
    in_progress: int = 0
    abandoned: int = 0
    port: int = 0
    keep_received: int = 1000
    _seen: Counter[str] = field(default_factory=Counter)
    _server: asyncio.Server | None = None
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._connected, host, port, limit=_MAX_HEAD, backlog=1024, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # -------------------------------------------------------------------------------------------------- connections

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_connections += 1
        head = None
        served = 0
        try:
            head = asyncio.ensure_future(_head(reader))
            while (request := await head) is not None:
                method, path, headers = request
                body = await _body(reader, headers)
                # reading on is how a server learns that its client has left
                head = asyncio.ensure_future(_head(reader))
                if not await self._answer(writer, Received(method, path, headers, body), head, served):
                    break
                served += 1
        except (OSError, asyncio.IncompleteReadError, ValueError):
            pass  # the client broke off, or does not speak HTTP
        finally:
            if head is not None:
                head.cancel()
                await asyncio.gather(head, return_exceptions=True)
            writer.close()
            self.open_connections -= 1

    async def _answer(
        self, writer: asyncio.StreamWriter, received: Received, head: asyncio.Future[Any], served: int
    ) -> bool:
        """Play the script; whether the connection may be used again."""
        name, exchange = self._script(writer, received)
        exchange.served = served
        self.in_progress += 1
        playing = asyncio.ensure_future(SCRIPTS[name](exchange) if name else self._books(exchange))
        try:
            await asyncio.wait((playing, head), return_when=asyncio.FIRST_COMPLETED)
            if not playing.done():
                self.abandoned += 1
                return False
            await playing
            return exchange.keep
        finally:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
            self.in_progress -= 1

    def _script(self, writer: asyncio.StreamWriter, received: Received) -> tuple[str, Exchange]:
        model = str(received.body.get("model", ""))
        chosen = model if model.partition(":")[0] in SCRIPTS else self.behaviour
        name, _, rest = chosen.partition(":")
        params = dict(pair.split("=", 1) for pair in rest.split(",") if "=" in pair)
        exchange = Exchange(writer, received.path, received.headers, received.body, params, self._seen[chosen])
        if received.method != "POST":
            return "", exchange
        self._seen[chosen] += 1
        self.received.append(received)
        del self.received[: -self.keep_received]
        return name, exchange

    async def _books(self, exchange: Exchange) -> None:
        if exchange.path.endswith("/models"):
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "mock"} for name in SCRIPTS]
            return await exchange.answer(200, {"object": "list", "data": models})
        await exchange.answer(
            200,
            {
                "connections": self.connections,
                "open_connections": self.open_connections - 1,  # not the one that asks
                "in_progress": self.in_progress - 1,
                "abandoned": self.abandoned,
                "requests": dict(self._seen),
            },
        )


async def _head(reader: asyncio.StreamReader) -> tuple[str, str, dict[str, str]] | None:
    """(method, path, headers with lower-case names) of the next request; None at the end."""
    try:
        async with asyncio.timeout(_KEEP_ALIVE_S):
            raw = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, TimeoutError):
        return None
    first, *lines = raw.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return method, path, {name.strip().lower(): value.strip() for name, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> dict[str, Any]:
    length = int(headers.get("content-length", 0))
    if length > _MAX_BODY:
        raise ValueError("the body is too large")
    body = json.loads(await reader.readexactly(length) or b"{}")
    if not isinstance(body, dict):
        raise ValueError("the body is not an object")
    return body


async def _run(host: str, port: int, behaviour: str) -> None:
    mock = MockUpstream(behaviour=behaviour)
    await mock.start(host, port)
    print(f"mock upstream on http://{host}:{mock.port}/v1", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await mock.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="An OpenAI-shaped server that misbehaves on request.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one and prints it")
    parser.add_argument("--behaviour", default="normal", help=f"one of {', '.join(SCRIPTS)}, then :name=value,...")
    arguments = parser.parse_args()
    if arguments.behaviour.partition(":")[0] not in SCRIPTS:
        parser.error(f"unknown behaviour {arguments.behaviour!r}; there are {', '.join(SCRIPTS)}")
    try:
        asyncio.run(_run(arguments.host, arguments.port, arguments.behaviour))
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
