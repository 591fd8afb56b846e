"""The zmq sockets of both ends, with the options that this design needs and the traps of edge-triggered descriptors.

A zmq descriptor becomes readable once when something happens, not for as long as something is there: before sleeping on
it one must have drained the socket to EAGAIN *and* have asked EVENTS after the last send, because sending may swallow
the edge.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from replicas import wire

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

# What a closing socket may still take to hand over what was sent.
LINGER_MS = 500
# As a number: the enumeration's own & costs more than the question.
_POLLIN = int(zmq.POLLIN)


class Unreachable(Exception):
    """The peer of a ROUTER is gone."""


def heartbeats(sock: Socket, seconds: float) -> None:
    """zmq's own thread exchanges them, whatever Python does: only a dead machine or process misses three."""
    sock.set(zmq.HEARTBEAT_IVL, int(seconds * 1000))
    sock.set(zmq.HEARTBEAT_TIMEOUT, int(seconds * 3000))
    sock.set(zmq.HEARTBEAT_TTL, int(seconds * 3000))


def has_input(sock: Socket) -> bool:
    return bool(cast(int, sock.get(zmq.EVENTS)) & _POLLIN)


def take(sock: Socket, limit: int) -> Iterator[list[bytes]]:
    """Up to `limit` waiting messages, without blocking."""
    for _ in range(limit):
        if not has_input(sock):  # asking costs less than the exception
            return
        yield sock.recv_multipart(zmq.NOBLOCK)


def disconnections(monitor: Socket) -> int:
    """How many peers were lost since the last call."""
    count = 0
    while has_input(monitor):
        event = recv_monitor_message(monitor, zmq.NOBLOCK)
        count += event["event"] in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED)
    return count


class ReplicaSockets:
    """ROUTER for gateways, its monitor, PUB, and a pipe by which other threads end the wait. One thread uses it."""

    def __init__(self, context: Context, host: str, heartbeat_s: float) -> None:
        self._router = context.socket(zmq.ROUTER)
        self._publisher = context.socket(zmq.PUB)
        for sock in (self._router, self._publisher):
            sock.set(zmq.LINGER, LINGER_MS)
            sock.set(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
            sock.set(zmq.IPV6, ":" in host)
            heartbeats(sock, heartbeat_s)
        # At a high-water mark ROUTER drops without a word; the server counts unread bytes itself.
        self._router.set(zmq.SNDHWM, 0)
        self._router.set(zmq.RCVHWM, 0)
        self._router.set(zmq.ROUTER_MANDATORY, 1)
        self._publisher.set(zmq.SNDHWM, 10_000)
        self._monitor: Socket = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        address = f"[{host}]" if ":" in host else host
        for sock in (self._router, self._publisher):
            sock.bind(f"tcp://{address}:0")
        self.endpoint = _endpoint(self._router)
        self.events_endpoint = _endpoint(self._publisher)
        self._waker, self._woken = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    def wake(self) -> None:
        """From any thread."""
        with suppress(OSError):  # full: it is awake already; closed: it needs no waking
            self._waker.send(b"\0")

    def wait(self, seconds: float) -> None:
        """Return when a command, a disconnection or a wake came, at the latest after `seconds` (exact to 0.1 ms)."""
        if has_input(self._router) or has_input(self._monitor):
            return
        woken = self._woken.fileno()
        ready = select.select([self._router.fileno(), self._monitor.fileno(), woken], [], [], seconds)[0]
        if woken in ready:
            with suppress(BlockingIOError):
                self._woken.recv(4096)

    def commands(self, limit: int = 256) -> Iterator[list[bytes]]:
        """(routing id, frame); a stranger's message may have another number of parts."""
        return take(self._router, limit)

    def peers_lost(self) -> bool:
        return disconnections(self._monitor) > 0

    def send(self, routing_id: bytes, frame: bytes) -> None:
        """Raises Unreachable when that peer is gone."""
        try:
            self._router.send_multipart((routing_id, frame), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise Unreachable from None

    def publish(self, topic: bytes, frame: bytes) -> None:
        self._publisher.send(topic + frame, zmq.NOBLOCK)

    def close(self) -> None:
        self._router.disable_monitor()
        self._monitor.close(linger=0)
        self._router.close()
        self._publisher.close()
        self._waker.close()
        self._woken.close()


class GatewaySockets:
    """DEALER to one replica, its monitor, and SUB to its events. None of them ever reconnects by itself."""

    def __init__(
        self, context: Context, endpoint: str, events_endpoint: str, topics: tuple[bytes, ...], heartbeat_s: float
    ) -> None:
        self.dealer = context.socket(zmq.DEALER)
        self.subscriber = context.socket(zmq.SUB)
        for sock in (self.dealer, self.subscriber):
            sock.set(zmq.LINGER, LINGER_MS)
            sock.set(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
            sock.set(zmq.RECONNECT_IVL, -1)
            sock.set(zmq.IPV6, "[" in endpoint)
            heartbeats(sock, heartbeat_s)
        self.dealer.set(zmq.SNDHWM, 0)
        self.dealer.set(zmq.RCVHWM, 0)
        self.monitor: Socket = self.dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        for topic in topics:
            self.subscriber.set(zmq.SUBSCRIBE, topic)
        self.dealer.connect(endpoint)
        self.subscriber.connect(events_endpoint)

    def close(self) -> None:
        self.dealer.disable_monitor()
        self.monitor.close(linger=0)
        self.dealer.close()
        self.subscriber.close(linger=0)


def _endpoint(sock: Socket) -> str:
    return cast(bytes, sock.get(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
