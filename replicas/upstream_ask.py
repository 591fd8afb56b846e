"""How a request to an upstream is worded: body, headers, and what to leave out where a server refuses it so."""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any

from replicas.upstream_errors import Complaint
from replicas.upstream_messages import UpstreamRequest

# Ours to set, whatever the caller's body holds.
_OWN = ("model", "stream", "stream_options")
# W3C Trace Context; anything else is not sent on.
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_HEADER = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,510}[\x21-\x7e])?")
_NO_STREAM = re.compile(r"\bstream(ing)?\b.*\bnot\b.*\b(supported|allowed)\b", re.IGNORECASE)


class Mode(Enum):
    """How an upstream is asked, best first."""

    USAGE = "a stream that reports usage"
    PLAIN = "a stream"
    WHOLE = "an answer in one piece"


def body(request: UpstreamRequest, model: str, mode: Mode) -> bytes:
    """The caller's body under the upstream's name of the model. In ASCII: half a surrogate pair has no UTF-8."""
    fields: dict[str, Any] = {name: value for name, value in request.body.items() if name not in _OWN}
    fields["model"] = model
    if mode is not Mode.WHOLE:
        fields["stream"] = True
    if mode is Mode.USAGE:
        fields["stream_options"] = {"include_usage": True}
    return json.dumps(fields, separators=(",", ":"), allow_nan=False).encode()


def headers(key: str | None) -> dict[str, str]:
    """What every request to one upstream repeats."""
    common = {
        "accept": "text/event-stream, application/json",
        "accept-encoding": "identity",  # compressors hold tokens back, and a small answer could unpack to a huge one
        "content-type": "application/json",
        "user-agent": "signalbox",
    }
    return common if key is None else {**common, "authorization": f"Bearer {key}"}


def trace_headers(request: UpstreamRequest) -> dict[str, str]:
    """The request's own id and the caller's trace, as far as they are fit for headers.

    The id goes by OpenAI's name for a client's own: as x-request-id llama-cpp-python refuses all that are not UUIDs.
    """
    given: dict[str, str] = {}
    if _HEADER.fullmatch(request.request_id):
        given["x-client-request-id"] = request.request_id
    if request.traceparent is not None and _TRACEPARENT.fullmatch(request.traceparent):
        given["traceparent"] = request.traceparent
        if request.tracestate is not None and _HEADER.fullmatch(request.tracestate):
            given["tracestate"] = request.tracestate
    return given


def plainer(mode: Mode, said: Complaint, unary: bool) -> Mode | None:
    """How to ask instead, when a refusal is about the way we ask; None when it is about what the caller wants.

    Without stream_options a stream may not report usage, so a caller who wants one whole answer is given that.
    """
    if mode is Mode.USAGE and "stream_options" in f"{said.param or ''} {said.message}":
        return Mode.WHOLE if unary else Mode.PLAIN
    if mode is not Mode.WHOLE and (said.param == "stream" or _NO_STREAM.search(said.message)):
        return Mode.WHOLE
    return None
