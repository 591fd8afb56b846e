"""One request after another, or many at once, against a running instance: answers read whole, never an exception.

For commands that ask beside the load, or that must know of every single answer what it was. Built on `load.http1`;
times are its `clock()`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from load.http1 import Origin, Pool, clock, request_head, resolve, with_body
from load.units import BadOption, LoadError

TIMEOUT_S = 60.0


class AdminRefused(LoadError):
    """The admin API answered with another status than 200; `status` is 0 where there was no answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True)
class Reply:
    """What came of one request. `fault` is "" for an answer that came whole, whatever its status."""

    begun: float
    ended: float = float("nan")
    status: int = 0
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    fault: str = ""

    def fields(self) -> dict[str, Any]:
        """The body as a JSON object; ValueError."""
        found = json.loads(self.body)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found

    @property
    def complaint(self) -> str:
        """Why this is no good answer, in a line; "" where it is one."""
        if self.fault:
            return self.fault
        if self.status == 200:
            return ""
        try:
            message = str(self.fields()["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = self.body[:120].decode("utf-8", "replace")
        return f"{self.status}: {message}"


class _Whole:
    """A load.http1.Receiver that fills a Reply."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._parts: list[bytes] = []
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_sent(self, now: float) -> None:
        pass

    def on_head(self, status: int, headers: dict[bytes, bytes], now: float) -> None:
        self._reply.status, self._reply.headers = status, headers

    def on_body(self, data: bytes, now: float) -> None:
        self._parts.append(data)

    def on_end(self, now: float) -> None:
        self._close(now, "")

    def on_error(self, kind: str, detail: str, now: float) -> None:
        self._close(now, f"{kind}: {detail}")

    def _close(self, now: float, fault: str) -> None:
        self._reply.ended, self._reply.fault = now, fault
        self._reply.body = b"".join(self._parts)
        if not self.over.done():
            self.over.set_result(None)


class Client:
    """One server and one credential. Use as an async context manager."""

    def __init__(self, origin: Origin, credential: str) -> None:
        self.origin = origin
        self._headers = {"content-type": "application/json", "user-agent": "signalbox-load"}
        if credential:
            self._headers["authorization"] = f"Bearer {credential}"
        self._pool = Pool(origin, resolve(origin))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()

    async def ask(
        self,
        method: str,
        path: str,
        fields: Mapping[str, Any] | None = None,
        *,
        request_id: str = "",
        timeout_s: float = TIMEOUT_S,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send `fields` as JSON, with `request_id` as x-request-id where given, and wait for the whole answer."""
        headers = {**self._headers, **(headers or {}), **({"x-request-id": request_id} if request_id else {})}
        head = request_head(self.origin, method, path, headers)
        body = json.dumps(fields, separators=(",", ":")).encode() if fields is not None else b""
        reply = Reply(begun=clock())
        whole = _Whole(reply)
        exchange = self._pool.send(with_body(head, body), whole)
        try:
            async with asyncio.timeout(timeout_s):
                await whole.over
        except TimeoutError:
            reply.ended, reply.fault = clock(), f"timeout: no end within {timeout_s:g} s"
        finally:
            exchange.cancel()
        return reply


@dataclass(frozen=True, slots=True)
class Published:
    """A change of policies as the admin API reported it. asked, answered: our `clock()` around it."""

    generation: int
    asked: float
    answered: float
    gateways: tuple[str, ...]
    unanswered: tuple[str, ...]
    late_ms: float

    @property
    def seconds(self) -> float:
        return self.answered - self.asked


class Admin:
    """The part of /admin/v1 that rehearsals need. Every method raises AdminRefused."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def publish(self, document: str, why: str) -> Published:
        return await self._change("/admin/v1/policies", {"document": document, "why": why})

    async def rollback(self, why: str, to: int | None = None) -> Published:
        """To the active generation's parent, or to the one that is named."""
        fields = {"why": why} if to is None else {"why": why, "to": to}
        return await self._change("/admin/v1/policies/rollback", fields)

    async def newest(self) -> tuple[int, int]:
        """(the active generation, the newest one). LoadError while a canary serves: a rehearsal would end it."""
        found = _accepted(await self._client.ask("GET", "/admin/v1/policies?limit=1")).fields()
        if found["canary"] is not None:
            raise LoadError(f"generation {found['canary']} is a canary: promote or cancel it before a rehearsal")
        return int(found["active"]), int(found["data"][0]["number"])

    async def explain(self, request_id: str) -> list[dict[str, Any]]:
        """What the gateways know of a request, newest first."""
        reply = _accepted(await self._client.ask("GET", f"/admin/v1/requests/{request_id}"))
        data: list[dict[str, Any]] = reply.fields()["data"]
        return data

    async def _change(self, path: str, fields: Mapping[str, Any]) -> Published:
        reply = _accepted(await self._client.ask("POST", path, fields))
        found = reply.fields()
        return Published(
            generation=int(found["active"]),
            asked=reply.begun,
            answered=reply.ended,
            gateways=tuple(found["gateways"]),
            unanswered=tuple(found["unanswered"]),
            late_ms=float(found["late_ms"]),
        )


async def publish(origin: Origin, token: str, document: str, why: str) -> Published:
    """One change on a connection of its own."""
    async with Client(origin, token) as client:
        return await Admin(client).publish(document, why)


def _accepted(reply: Reply) -> Reply:
    if reply.complaint:
        raise AdminRefused(0 if reply.fault else reply.status, reply.complaint)
    return reply


def credential(variable: str, what: str) -> str:
    """From the environment, so that it shows in no process list. Raises BadOption."""
    found = os.environ.get(variable, "")
    if not found:
        raise BadOption(f"the environment variable {variable} holds no {what}")
    return found
