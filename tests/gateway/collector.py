"""A collector that speaks OTLP over HTTP: it keeps what it is sent, or refuses it, or never answers."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

KINDS = {1: "internal", 2: "server", 3: "client"}


@dataclass(frozen=True)
class Seen:
    """One span. Times in Unix nanoseconds; ids in hex, parent "" for none; error: its status is one."""

    trace_id: str
    span_id: str
    parent: str
    name: str
    kind: str
    began: int
    ended: int
    error: bool
    message: str
    state: str
    attributes: dict[str, Any]
    events: list[str]
    resource: dict[str, Any] = field(repr=False)

    @property
    def seconds(self) -> float:
        return (self.ended - self.began) / 1e9


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(one) for one in value.array_value.values]
    return getattr(value, kind)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _plain(pair.value) for pair in pairs}


class Collector:
    """`with Collector() as collector:` listens on a port of its own until the end."""

    def __init__(self) -> None:
        self.spans: list[Seen] = []
        self.bodies: list[bytes] = []
        self.status = 200
        self.delay_s = 0.0
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                assert self.headers["content-type"] == "application/x-protobuf"
                time.sleep(collector.delay_s)
                if collector.status == 200 and self.path == "/v1/traces":
                    collector.take(body)
                self.send_response(collector.status if self.path == "/v1/traces" else 404)
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def take(self, body: bytes) -> None:
        self.bodies.append(body)
        for batch in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _attributes(batch.resource.attributes)
            for span in (span for scope in batch.scope_spans for span in scope.spans):
                self.spans.append(
                    Seen(
                        trace_id=span.trace_id.hex(),
                        span_id=span.span_id.hex(),
                        parent=span.parent_span_id.hex(),
                        name=span.name,
                        kind=KINDS[span.kind],
                        began=span.start_time_unix_nano,
                        ended=span.end_time_unix_nano,
                        error=span.status.code == 2,
                        message=span.status.message,
                        state=span.trace_state,
                        attributes=_attributes(span.attributes),
                        events=[event.name for event in span.events],
                        resource=resource,
                    )
                )

    def wait(self, enough: Callable[[list[Seen]], bool], timeout_s: float = 10.0) -> list[Seen]:
        """All spans, once they are `enough`."""
        deadline = time.monotonic() + timeout_s
        while not enough(self.spans):
            assert time.monotonic() < deadline, f"only these came: {[(s.name, s.parent) for s in self.spans]}"
            time.sleep(0.01)
        return list(self.spans)

    def trace(self, name: str, count: int) -> dict[str, Seen]:
        """The spans of the only trace, by name, once one of that name and `count` in all are there."""
        spans = self.wait(lambda spans: len(spans) >= count and any(s.name == name for s in spans))
        assert len(spans) == count, [span.name for span in spans]
        assert len({span.trace_id for span in spans}) == 1
        return {span.name: span for span in spans}
