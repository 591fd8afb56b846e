"""The one table from our errors to HTTP, in the shape of OpenAI's API.

{"error": {"message": str, "type": str, "param": str | null, "code": str | null}}
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from gateway.explain import UnknownRequest
from gateway.ledger.entries import LimitReached
from gateway.policy_errors import PolicyConflict, PublishRefused, UnknownGeneration
from policies import limits
from policies.yaml_text import DocumentError
from replicas.protocol import (
    AuthenticationFailed,
    BudgetExceeded,
    ConfigError,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFault,
    InvalidRequest,
    ModelNotFound,
    NoReplica,
    NotSupported,
    PayloadTooLarge,
    QueueFull,
    RateLimited,
    ReplicaDraining,
    ReplicaLost,
    RequestError,
    SignalboxError,
    Unavailable,
)
from replicas.upstream_errors import UpstreamFailed, UpstreamTimeout


@dataclass(frozen=True, slots=True)
class HttpError:
    status: int
    type: str
    code: str | None


TABLE: dict[type[SignalboxError], HttpError] = {
    InvalidRequest: HttpError(400, "invalid_request_error", None),
    ContextLengthExceeded: HttpError(400, "invalid_request_error", "context_length_exceeded"),
    NotSupported: HttpError(400, "invalid_request_error", "unsupported_parameter"),
    AuthenticationFailed: HttpError(401, "invalid_request_error", "invalid_api_key"),
    ModelNotFound: HttpError(404, "invalid_request_error", "model_not_found"),
    BudgetExceeded: HttpError(429, "insufficient_quota", "insufficient_quota"),
    RateLimited: HttpError(429, "rate_limit_error", "rate_limit_exceeded"),
    PayloadTooLarge: HttpError(413, "invalid_request_error", "request_too_large"),
    DeadlineExceeded: HttpError(504, "timeout_error", "deadline_exceeded"),
    DocumentError: HttpError(400, "invalid_request_error", "invalid_policy"),
    UnknownGeneration: HttpError(404, "invalid_request_error", "generation_not_found"),
    UnknownRequest: HttpError(404, "invalid_request_error", "request_not_found"),
    PolicyConflict: HttpError(409, "invalid_request_error", "policy_conflict"),
    PublishRefused: HttpError(422, "invalid_request_error", "publish_refused"),
    RequestError: HttpError(400, "invalid_request_error", None),
    QueueFull: HttpError(503, "service_unavailable_error", "queue_full"),
    ReplicaDraining: HttpError(503, "service_unavailable_error", "replica_draining"),
    ReplicaLost: HttpError(503, "service_unavailable_error", "replica_lost"),
    UpstreamTimeout: HttpError(503, "service_unavailable_error", "upstream_timeout"),
    UpstreamFailed: HttpError(503, "service_unavailable_error", "upstream_failed"),
    NoReplica: HttpError(503, "service_unavailable_error", "no_replica"),
    Unavailable: HttpError(503, "service_unavailable_error", None),
    EngineFault: HttpError(500, "server_error", "engine_fault"),
    ConfigError: HttpError(500, "server_error", None),
    SignalboxError: HttpError(500, "server_error", None),
}

INTERNAL = EngineFault("the server had an error while processing your request")
_ROUTING = {404: "not_found", 405: "method_not_allowed"}


def http_error(error: SignalboxError) -> HttpError:
    """The row of the nearest class of the error; SignalboxError itself ends the search."""
    return next(TABLE[cls] for cls in type(error).__mro__ if cls in TABLE)


def error_body(error: SignalboxError) -> bytes:
    row = http_error(error)
    return _encode(error.message, row.type, error.param, row.code)


def routing_error_body(status: int, message: str) -> bytes:
    """For answers that the router gives before any of our code runs: no such path, wrong method."""
    return _encode(message, "invalid_request_error", None, _ROUTING.get(status))


def error_headers(error: SignalboxError) -> list[tuple[bytes, bytes]]:
    row = http_error(error)
    headers = [(b"content-type", b"application/json")]
    if row.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if row.status == 503 or error.retry_after_s is not None:
        # whole seconds (RFC 9110 section 10.2.3), never 0: that would invite a tight loop
        headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s or 1.0))))
    if isinstance(error, DeadlineExceeded):  # OpenAI's clients would try twice more, for nobody
        headers.append((b"x-should-retry", b"false"))
    if isinstance(error, LimitReached):
        headers += limits.headers(error.standings)
    return headers


def _encode(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()
