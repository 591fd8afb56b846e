"""What an upstream's refusal means here: one table from its status to the protocol's errors.

    Unavailable
    ├── UpstreamTimeout     no connection, no first token or no next event in time (`phase`)
    ├── UpstreamFailed      5xx, or an error event in its stream
    ├── QueueFull
    │   └── UpstreamBusy    429, 402, or our own bound on requests at a time (`retry_after_s`)
    └── ReplicaLost
        └── UpstreamLost    not reachable, cut off, or not speaking the protocol

Credentials, addresses and model names are our configuration, so 401, 403, 404, 405 and redirects are ConfigError and
their texts stay here. Of a 400 the caller gets message and param, since the mistake is in what the caller sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from replicas.protocol import (
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    PayloadTooLarge,
    QueueFull,
    ReplicaLost,
    SignalboxError,
    Unavailable,
)
from replicas.upstream_config import Upstream


class UpstreamTimeout(Unavailable):
    """phase: "connect", "first_token" or "gap"."""

    def __init__(self, message: str, *, phase: str) -> None:
        super().__init__(message)
        self.phase = phase


class UpstreamFailed(Unavailable):
    pass


class UpstreamBusy(QueueFull):
    pass


class UpstreamLost(ReplicaLost):
    pass


@dataclass(frozen=True, slots=True)
class Complaint:
    """What an error body says, whichever server wrote it."""

    message: str = ""
    param: str | None = None
    code: str = ""
    kind: str = ""


_CONTEXT = re.compile(r"context[ _](?:length|window|size)|too many tokens", re.IGNORECASE)
_CREDENTIAL = re.compile(r"\bsk-[\w-]{6,}|\bBearer\s+\S+", re.IGNORECASE)
_WORD = re.compile(r"[\w.-]{1,64}")
_MAX_MESSAGE, _MAX_PARAM = 1000, 200
# How long to leave an upstream alone whose account is out of money.
_NO_CREDIT_S = 30.0


class Refusals:
    """Reads one upstream's errors. `key` is known only to be cut out of what others may see."""

    def __init__(self, upstream: Upstream, key: str | None) -> None:
        self._name = upstream.name
        self._who = f"the upstream of {upstream.name!r}"
        host = upstream.origin.partition("://")[2]
        hosts = [host] if "." in host or ":" in host else []  # a bare "vllm" is an ordinary word too
        self._secrets = [secret for secret in (key, upstream.base_url, upstream.origin, *hosts) if secret]
        # a name that may be an ordinary word ("small") is no secret, and replacing it would garble sentences
        told = upstream.model == upstream.name or upstream.model.isalpha()
        model = re.escape(upstream.model)
        self._model = None if told else re.compile(rf"(?<![\w./-]){model}(?![\w/-])")

    def shown(self, text: str) -> str:
        """`text` fit for callers: no key, no address, the model by the name they used, of bounded length."""
        for secret in self._secrets:
            text = text.replace(secret, "[upstream]")
        text = _CREDENTIAL.sub("[credential]", text)
        if self._model is not None:
            text = self._model.sub(lambda _: self._name, text)
        return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"

    def of_status(self, status: int, headers: Mapping[str, str], body: bytes, now: float) -> SignalboxError:
        """The error for an answer other than 200. `now` is Unix time, for a Retry-After that is a date."""
        return self._of(status, complaint(body), retry_after_s(headers, now))

    def of_event(self, event: Mapping[str, Any]) -> SignalboxError:
        """The error for an error event within a stream; its code may be what would have been the status."""
        said = _read(event)
        if said.kind in ("invalid_request_error", "BadRequestError"):
            return self._callers(400, said)
        if re.fullmatch(r"[45]\d\d", said.code):
            return self._of(int(said.code), said, None)
        return UpstreamFailed(f"{self._who} failed while it answered")

    def _of(self, status: int, said: Complaint, wait_s: float | None) -> SignalboxError:
        if status in (429, 402):
            if status == 402 or "insufficient_quota" in (said.code, said.kind):
                return UpstreamBusy(f"{self._who} has no credit left", retry_after_s=wait_s or _NO_CREDIT_S)
            return UpstreamBusy(f"{self._who} is at its rate limit", retry_after_s=wait_s)
        if status in (400, 413, 422):
            return self._callers(status, said)
        if status in (401, 403):
            return ConfigError(f"{self._who} refused the gateway's credentials ({status})")
        if status in (404, 405):
            return ConfigError(f"{self._who} does not know the model or the endpoint that it was asked for ({status})")
        if 300 <= status < 400:
            return ConfigError(f"{self._who} answered with a redirect ({status}); base_url must be its final address")
        return UpstreamFailed(f"{self._who} answered {status}", retry_after_s=wait_s)

    def _callers(self, status: int, said: Complaint) -> SignalboxError:
        message = self.shown(said.message) or f"{self._who} refused the request"
        param = self.shown(said.param)[:_MAX_PARAM] if said.param else None
        if status == 413:
            return PayloadTooLarge(message, param=param)
        if "context" in said.code or "context" in said.kind or _CONTEXT.search(message):
            return ContextLengthExceeded(message, param=param)
        return InvalidRequest(message, param=param)


def complaint(body: bytes) -> Complaint:
    """What a body says in any of the shapes that servers use; empty when it is none of them."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return Complaint()
    return _read(parsed) if isinstance(parsed, dict) else Complaint()


def short(text: str) -> str:
    """`text` if it is a plain identifier, fit for a log that must hold no prompt; else ""."""
    return text if _WORD.fullmatch(text) else ""


def _read(body: Mapping[str, Any]) -> Complaint:
    """{"error": {...}} (OpenAI), {"error": "..."} (TGI), {"object": "error", ...} (vLLM), {"detail": ...} (FastAPI)."""
    error = body.get("error") or body
    if isinstance(error, str):
        return Complaint(message=error, kind=_text(body.get("error_type") or body.get("type")))
    if not isinstance(error, dict):
        return Complaint()
    if isinstance(detail := error.get("detail"), list) and detail and isinstance(detail[0], dict):
        place = detail[0].get("loc")
        param = ".".join(str(part) for part in place if part != "body") if isinstance(place, list) else None
        return Complaint(message=_text(detail[0].get("msg")), param=param or None)
    return Complaint(
        message=_text(error.get("message") or detail),
        param=_text(error.get("param")).removeprefix("body.") or None,  # vLLM's way to say where in the request
        code=_text(error.get("code")),
        kind=_text(error.get("type")),
    )


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds from Retry-After (RFC 9110 section 10.2.3: seconds or a date) or OpenAI's retry-after-ms, if there."""
    try:
        if (given := headers.get("retry-after-ms")) is not None:
            return _seconds(float(given) / 1000)
        given = headers.get("retry-after", "").strip()
        if not given:
            return None
        if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", given):
            return _seconds(float(given))
        return _seconds(parsedate_to_datetime(given).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _seconds(value: float) -> float | None:
    return max(0.0, value) if value < 1e9 else None
