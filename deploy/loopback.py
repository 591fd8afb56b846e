"""Keeps Serve's replicas of a one-machine instance off the network.

Serve opens a plaintext gRPC server for handle calls on every interface of every replica, with no setting to say where.
`confine` runs in those processes before that happens; RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH makes Serve call it in
gateways, and model replicas call it themselves.
"""

from __future__ import annotations

from typing import Any


def confine() -> list[Any]:
    """Bind Serve's inter-deployment server to 127.0.0.1. Returns Serve's expected list of HTTP middlewares: none.

    Raises AttributeError when Serve no longer has what this replaces: better no start than an open port.
    """
    from ray.serve._private import replica

    original = replica.add_port_to_grpc_server
    if getattr(original, "is_confined", False):
        return []

    def on_loopback(server: Any, address: str) -> int:
        port: int = original(server, address.replace("[::]", "127.0.0.1"))
        return port

    setattr(on_loopback, "is_confined", True)  # noqa: B010 - a function has no such attribute of its own
    replica.add_port_to_grpc_server = on_loopback
    return []
