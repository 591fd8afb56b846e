"""Puts a TokenEngine on a socket: one thread owns the engine and every zmq socket, and goes round one loop.

    drain commands ─► engine.step() ─► one Chunks frame per gateway ─► status and KV events on PUB

Sockets: a ROUTER for gateways (commands in, chunks out), its monitor (a gateway that vanished has its requests aborted)
and a PUB for what everybody may know. Every request accepted ends in exactly one terminal chunk, unless its gateway
aborted it or is gone. Knows no Ray and no event loop; `submit`-side methods (`drain`, `stop`, `healthy`) may be called
from any thread.

ROUTER drops silently at its high-water mark, so there is none; instead each gateway acknowledges the bytes it took, and
one that lets more than `max_unread_bytes` pile up is cut off.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import zmq

from replicas import wire
from replicas.journal import Journal
from replicas.protocol import (
    Chunk,
    EngineFault,
    EngineStats,
    GenerateRequest,
    InvalidRequest,
    ModelCard,
    ReplicaAddress,
    ReplicaDraining,
    ReplicaLost,
    ReplicaState,
    ReplicaStatus,
    SignalboxError,
    TokenEngine,
)
from replicas.recorder import Recorder
from replicas.sockets import Context, ReplicaSockets, Unreachable
from replicas.streams import Peer, Stream, Streams

log = logging.getLogger(__name__)


class ThreadState(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Seconds and bytes.

    stall_s: a thread that has work and went so long without finishing a round is stuck.
    status_s: least time between two status messages while busy. idle_status_s: time between them when idle.
    heartbeat_s: a gateway's machine that is silent for three of these is gone.
    """

    stall_s: float = 60.0
    status_s: float = 0.02
    idle_status_s: float = 1.0
    heartbeat_s: float = 0.5
    max_unread_bytes: int = 64 * 2**20


class ReplicaServer:
    """Serves `engine` until `stop`. The engine is touched by the server's thread only, from `start` on."""

    def __init__(
        self,
        engine: TokenEngine,
        *,
        card: ModelCard | None = None,
        replica_id: str,
        incarnation: str,
        host: str = "127.0.0.1",
        limits: ServerLimits | None = None,
        context: Context | None = None,
        journal: Journal | None = None,
    ) -> None:
        """`card` replaces the engine's own, for instance to give the model another name. `journal` is the server's from
        here on.
        """
        self._engine = engine
        self._card = card or engine.card
        self._limits = limits or ServerLimits()
        self._recorder = Recorder(journal)
        self._streams = Streams()
        self._peers: dict[bytes, Peer] = {}
        self._sockets = ReplicaSockets(context or zmq.Context.instance(), host, self._limits.heartbeat_s)
        self.address = ReplicaAddress(
            replica_id=replica_id,
            incarnation=incarnation,
            model=self._card.model,
            endpoint=self._sockets.endpoint,
            events_endpoint=self._sockets.events_endpoint,
        )
        self._thread = threading.Thread(target=self._run, name=f"engine-{replica_id}", daemon=True)
        self._state = ThreadState.STARTING
        self._progress = time.monotonic()
        self._stopping = False
        self._drain_until: float | None = None
        self._drained = threading.Event()
        self._published_at = 0.0
        self._status_due = True
        self._next_event = 1
        self._probes: list[float] = []
        self._last_stats = EngineStats()
        self.unreadable_frames = 0

    # ---------------------------------------------------------------- any thread

    def start(self) -> ReplicaAddress:
        self._state = ThreadState.RUNNING
        self._progress = time.monotonic()
        self._thread.start()
        return self.address

    def healthy(self) -> bool:
        """False once the engine broke, its thread ended or it has not come round (idle, too, it does) for `stall_s`."""
        running = self._state is ThreadState.RUNNING and self._thread.is_alive()
        return running and time.monotonic() - self._progress < self._limits.stall_s

    @property
    def state(self) -> ThreadState:
        return self._state

    @property
    def stats(self) -> EngineStats:
        """As last published."""
        return self._last_stats

    def adopt(self) -> None:
        """Take over journals that dead replicas have left beside this one's. It reads files: not for event loops."""
        if self._recorder.adopt():
            self._sockets.wake()

    def drain(self, timeout_s: float) -> bool:
        """Take no new work and wait for what runs; True if all of it finished in time.

        At the deadline requests without a token are handed back as ReplicaDraining, the others end in ReplicaLost.
        """
        deadline = time.monotonic() + timeout_s
        self._drain_until = deadline
        self._status_due = True
        self._sockets.wake()
        finished = self._drained.wait(timeout_s)
        if not finished and self._thread.is_alive():
            self._drained.wait(5.0)  # the engine thread ends the rest after the step it is in
        return finished

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the thread and close the sockets; what still runs ends in ReplicaLost."""
        self._stopping = True
        self._sockets.wake()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        elif self._state is ThreadState.STARTING:
            self._sockets.close()
            self._recorder.close()

    # ---------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._receive()
                self._step()
                self._flush()
                self._publish()
                self._check_drain()
                self._progress = time.monotonic()
        except Exception:
            self._state = ThreadState.FAILED
            log.exception("the engine thread of %s died", self.address.replica_id)
        finally:
            self._end_all(lambda stream: ReplicaLost("the replica stopped"), abort=False)
            self._flush()
            self._sockets.close()
            self._recorder.close()
            if self._state is ThreadState.RUNNING:
                self._state = ThreadState.STOPPED
            self._drained.set()

    def _step(self) -> None:
        if self._state is ThreadState.FAILED or not self._engine.has_work() or self._engine.wait_s() > 0:
            return
        try:
            chunks = self._engine.step()
        except Exception as error:
            self._fail(error)
            return
        for chunk in chunks:
            self._deliver(chunk)
        if self._streams and not self._engine.has_work():
            # A request that the engine forgot would otherwise leave its client waiting for ever.
            log.error("the engine is idle but owes %d requests their end", len(self._streams))
            self._end_all(lambda stream: EngineFault("the engine lost the request"))

    def _fail(self, error: Exception) -> None:
        """The engine's state is unknown from here on: end everything, refuse the rest, let the health check tell."""
        log.error("engine step failed", exc_info=error)
        self._state = ThreadState.FAILED
        self._end_all(lambda stream: EngineFault("the engine failed while it computed this request"), abort=False)

    def _deliver(self, chunk: Chunk) -> None:
        stream = self._streams.get(chunk.request_id)
        if stream is None:
            return  # aborted in the meantime: nobody listens
        self._recorder.saw(chunk)
        stream.peer.outbox.append(wire.chunk_part(stream.seq, chunk))
        if chunk.terminal:
            self._close(stream)
        else:
            self._streams.mark_started(stream)

    def _close(self, stream: Stream, *, abort: bool = False) -> None:
        self._streams.close(stream)
        self._recorder.ended(stream.request_id)
        self._status_due = self._status_due or not self._streams
        if abort and self._state is not ThreadState.FAILED:
            self._engine.abort(stream.request_id)

    def _end_all(self, error: Callable[[Stream], SignalboxError], *, abort: bool = True) -> None:
        for stream in self._streams:
            stream.peer.outbox.append(wire.error_part(stream.seq, error(stream)))
            self._close(stream, abort=abort)

    # ---------------------------------------------------------------- commands

    def _receive(self) -> None:
        wait_s = self._wait_s()
        if wait_s > 0:
            self._sockets.wait(wait_s)
        for message in self._sockets.commands():
            self._handle(message)
        now = time.monotonic()
        if self._sockets.peers_lost():
            # zmq may forget the peer a moment after it reports the loss, so ask more than once.
            self._probes = [now, now + 0.05, now + 0.5]
        if self._probes and now >= self._probes[0]:
            del self._probes[0]
            for peer in list(self._peers.values()):
                self._send(peer, wire.encode(wire.Pong(0)))

    def _wait_s(self) -> float:
        limits, now = self._limits, time.monotonic()
        idle = self._state is ThreadState.FAILED or not self._engine.has_work()
        wait_s = min(limits.idle_status_s, limits.stall_s / 4)
        if not idle:
            wait_s = min(wait_s, self._engine.wait_s())
        if self._status_due:
            wait_s = min(wait_s, self._published_at + limits.status_s - now)
        if self._probes:
            wait_s = min(wait_s, self._probes[0] - now)
        return wait_s

    def _handle(self, message: list[bytes]) -> None:
        routing_id = message[0]
        try:
            if len(message) != 2:
                raise wire.WireError(f"message of {len(message) - 1} parts")
            command = wire.decode_to_replica(message[1])
            if isinstance(command, wire.Describe):
                self._describe(routing_id, command)
                return
            peer = self._peers.get(routing_id)
            if peer is None:
                self._refuse(routing_id, "this connection was closed or never described itself", fatal=True)
            else:
                self._obey(peer, command)
        except wire.WireError as error:
            self.unreadable_frames += 1
            log.warning("refused a frame: %s", error)
            self._refuse(routing_id, str(error), fatal=False)

    def _refuse(self, routing_id: bytes, reason: str, *, fatal: bool) -> None:
        with suppress(Unreachable):
            self._sockets.send(routing_id, wire.encode(wire.Refused(reason, fatal)))

    def _describe(self, routing_id: bytes, command: wire.Describe) -> None:
        incarnation = self.address.incarnation
        if command.incarnation != incarnation:
            self._refuse(routing_id, f"this is incarnation {incarnation}, not {command.incarnation}", fatal=True)
            return
        peer = self._peers.setdefault(routing_id, Peer(routing_id, command.gateway_id))
        card = wire.Card(incarnation, self._card, wire.status_message(self._status()))
        self._send(peer, wire.encode(card))

    def _obey(self, peer: Peer, command: wire.Command) -> None:
        if isinstance(command, wire.Submit):
            self._submit(peer, command)
        elif isinstance(command, wire.Abort):
            stream = self._streams.find(peer, command.seq)
            if stream is not None:  # else it ended while the abort was on its way
                self._close(stream, abort=True)
        elif isinstance(command, wire.Ack):
            peer.read = max(peer.read, min(command.received_bytes, peer.sent))
        elif isinstance(command, wire.Resync):
            self._send_snapshot(peer)
        elif isinstance(command, wire.JournalAsk):
            for page in self._recorder.pages(command):
                self._send(peer, wire.encode(page))
        elif isinstance(command, wire.JournalAck):
            self._recorder.acknowledge(command)
        else:
            self._send(peer, wire.encode(wire.Pong(command.nonce)))

    def _submit(self, peer: Peer, command: wire.Submit) -> None:
        if command.seq <= peer.last_seq:
            raise wire.WireError(f"submission {command.seq} came after {peer.last_seq}")
        request = wire.request(command)
        peer.last_seq = command.seq
        self._status_due = True
        try:
            self._admit(request)
        except SignalboxError as error:
            peer.outbox.append(wire.error_part(command.seq, error))
            return
        self._streams.open(request.request_id, peer, command.seq)
        self._recorder.began(peer.gateway_id, request)

    def _admit(self, request: GenerateRequest) -> None:
        if self._state is ThreadState.FAILED:
            raise ReplicaLost("the replica's engine has failed")
        if self._drain_until is not None:
            raise ReplicaDraining("the replica is draining")
        if request.request_id in self._streams:
            raise InvalidRequest(f"request {request.request_id!r} is already running")
        try:
            self._engine.add(request)
        except SignalboxError:
            raise
        except Exception as error:
            log.exception("the engine could not take request %s", request.request_id)
            raise EngineFault("the engine could not take the request") from error

    def _send_snapshot(self, peer: Peer) -> None:
        self._publish_events()  # so that the snapshot and the number of the next event belong together
        hashes = [] if self._state is ThreadState.FAILED else self._engine.cached_hashes()
        self._send(peer, wire.encode(wire.Snapshot(self.address.incarnation, self._next_event, b"".join(hashes))))

    # ---------------------------------------------------------------- what goes out

    def _flush(self) -> None:
        self._recorder.flush()  # before anybody is told
        for peer in list(self._peers.values()):
            if peer.outbox:
                frame = wire.encode(wire.Chunks(tuple(peer.outbox)))
                peer.outbox.clear()
                peer.sent += len(frame)
                self._send(peer, frame)
                if peer.sent - peer.read > self._limits.max_unread_bytes:
                    self._cut_off(peer)

    def _send(self, peer: Peer, frame: bytes) -> None:
        try:
            self._sockets.send(peer.routing_id, frame)
        except Unreachable:
            self._lose(peer)

    def _cut_off(self, peer: Peer) -> None:
        log.error("gateway %s leaves %d bytes unread: cut off", peer.gateway_id, peer.sent - peer.read)
        self._lose(peer)
        self._refuse(peer.routing_id, "too many unread bytes", fatal=True)

    def _lose(self, peer: Peer) -> None:
        """Forget a gateway that nobody can reach; what it asked for leaves the engine."""
        if self._peers.pop(peer.routing_id, None) is None:
            return
        lost = [stream for stream in self._streams if stream.peer is peer]
        for stream in lost:
            self._close(stream, abort=True)
        log.info("gateway %s is gone, %d requests aborted", peer.gateway_id, len(lost))

    def _status(self) -> ReplicaStatus:
        if self._state is not ThreadState.FAILED:
            self._last_stats = self._engine.stats()
        draining = self._drain_until is not None or self._state is ThreadState.FAILED
        return ReplicaStatus(
            replica_id=self.address.replica_id,
            incarnation=self.address.incarnation,
            model=self.address.model,
            state=ReplicaState.DRAINING if draining else ReplicaState.READY,
            stats=self._last_stats,
            admitted={peer.gateway_id: peer.last_seq for peer in self._peers.values()},
        )

    def _publish_events(self) -> None:
        events = self._engine.take_events() if self._state is not ThreadState.FAILED else []
        if events:
            message = wire.events_message(self.address.incarnation, self._next_event, events)
            self._next_event += len(events)
            self._sockets.publish(wire.TOPIC_EVENTS, wire.encode(message))

    def _publish(self) -> None:
        self._publish_events()
        limits, now = self._limits, time.monotonic()
        if now - self._published_at >= (limits.status_s if self._status_due or self._streams else limits.idle_status_s):
            self._published_at, self._status_due = now, False
            self._sockets.publish(wire.TOPIC_STATUS, wire.encode(wire.status_message(self._status())))

    def _check_drain(self) -> None:
        if self._drain_until is None or self._drained.is_set():
            return
        if self._streams and time.monotonic() < self._drain_until:
            return
        self._end_all(self._handed_back)
        self._flush()
        self._drained.set()

    def _handed_back(self, stream: Stream) -> SignalboxError:
        if self._streams.has_started(stream):
            return ReplicaLost("the replica shut down before the answer was complete")
        return ReplicaDraining("the replica is draining")
