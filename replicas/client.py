"""A gateway's connection to one replica: many requests over one DEALER socket, on an asyncio loop.

    conn = await ReplicaConnection.connect(address, gateway_id="gateway-1")
    async with aclosing(conn.generate(request)) as chunks:
        async for ready in chunks: ...      # every chunk that arrived since the last turn, in one list

A connection reaches exactly one incarnation and never comes back: when the process or the link dies, `alive` turns
False, every stream raises ReplicaLost at once, and the owner connects anew. Leaving a stream early (`aclose`) aborts
the request in the engine. There is no task and no future per message: the loop watches the sockets' descriptors, and a
stream that waits costs one future.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import zmq

from replicas import wire
from replicas.protocol import (
    Chunk,
    ConfigError,
    GenerateRequest,
    KVEvent,
    ModelCard,
    ReplicaAddress,
    ReplicaLost,
    ReplicaStatus,
    SignalboxError,
)
from replicas.sockets import Context, GatewaySockets, disconnections, has_input, take

log = logging.getLogger(__name__)

# Frames taken off one socket before other callbacks of the loop get their turn.
_FRAMES_PER_TURN = 64
# Bytes read before the replica is told so; far below the replica's bound on what may be unread.
_ACK_EVERY = 256 * 1024
_HEARTBEAT_S = 0.5
# What replicas publish is read so much later: it comes right behind a request's first chunk, and must not be taken in
# before that is on its way to the client.
_PUBLISHED_AFTER_S = 0.001
# How long an acknowledgement waits for others to go with it, and how many go at once.
_ACKNOWLEDGE_S, _ACKNOWLEDGED = 0.25, 256


@dataclass(frozen=True, slots=True)
class Journaled:
    """A replica's answer about a gateway: its journal's entries, and the incarnations whose journals it holds."""

    owners: tuple[str, ...]
    entries: tuple[wire.JournalEntry, ...]


class Listener(Protocol):
    """Whoever wants to know what a replica publishes. Called on the connection's loop; must not block.

    `events` are numbered first, first + 1, … and count from 1 in each incarnation; a gap in the numbers means that some
    were lost. `snapshot` answers `ReplicaConnection.resync`: `hashes` (16 bytes each) are all blocks that were cached
    before event `next_event`.
    """

    def status(self, status: ReplicaStatus) -> None: ...
    def events(self, first: int, events: Sequence[KVEvent]) -> None: ...
    def snapshot(self, next_event: int, hashes: bytes) -> None: ...


@dataclass(slots=True, eq=False)
class _Stream:
    request_id: str
    ready: list[Chunk] = field(default_factory=list)
    error: SignalboxError | None = None
    done: bool = False
    waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class ReplicaConnection:
    """Made by `connect`. Belongs to one event loop; not thread-safe."""

    def __init__(
        self,
        address: ReplicaAddress,
        gateway_id: str,
        context: Context,
        listener: Listener | None,
    ) -> None:
        self.address = address
        self.gateway_id = gateway_id
        self.status: ReplicaStatus | None = None
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._described: asyncio.Future[ModelCard] = self._loop.create_future()
        self._closed = asyncio.Event()
        self._end_error: Callable[[], SignalboxError] = partial(ReplicaLost, "the connection is closed")
        self._card: ModelCard | None = None
        self._streams: dict[int, _Stream] = {}
        self._pings: dict[int, asyncio.Future[None]] = {}
        self._journals: dict[int, tuple[list[wire.JournalEntry], asyncio.Future[Journaled]]] = {}
        self._journaled: set[str] = set()
        self._acknowledging: list[str] = []
        self._seq = 0
        self._last_nonce = 0
        self._received = 0
        self._acknowledged = 0
        topics = (wire.TOPIC_STATUS, wire.TOPIC_EVENTS) if listener else (wire.TOPIC_STATUS,)
        self._sockets = GatewaySockets(context, address.endpoint, address.events_endpoint, topics, _HEARTBEAT_S)
        self._reading_later = False
        self._watched = {
            self._sockets.dealer.fileno(): self._read_dealer,
            self._sockets.subscriber.fileno(): self._read_published,
            self._sockets.monitor.fileno(): self._read_monitor,
        }
        for descriptor, read in self._watched.items():
            self._loop.add_reader(descriptor, read)
            self._loop.call_soon(read)  # until a socket was once read empty, its descriptor may never become readable

    @classmethod
    async def connect(
        cls,
        address: ReplicaAddress,
        *,
        gateway_id: str,
        timeout_s: float = 5.0,
        listener: Listener | None = None,
        context: Context | None = None,
    ) -> ReplicaConnection:
        """Reach the replica and learn its model card.

        Raises ReplicaLost when nothing (or another incarnation) answers there, ConfigError when it speaks another wire
        version. KV events are subscribed to only for a listener.
        """
        conn = cls(address, gateway_id, context or zmq.Context.instance(), listener)
        try:
            conn._send(wire.Describe(gateway_id, address.incarnation))
            async with asyncio.timeout(timeout_s):
                conn._card = await conn._described
        except BaseException as error:
            await conn.aclose()
            if isinstance(error, TimeoutError):
                raise ReplicaLost(f"replica {address.replica_id!r} did not answer within {timeout_s} s") from None
            raise
        return conn

    # ---------------------------------------------------------------- what it knows

    @property
    def alive(self) -> bool:
        return not self._closed.is_set()

    @property
    def card(self) -> ModelCard:
        assert self._card is not None, "a connection is handed out only after its replica described itself"
        return self._card

    @property
    def in_flight(self) -> int:
        """Requests of this gateway that were submitted and have not ended."""
        return len(self._streams)

    @property
    def next_seq(self) -> int:
        """What the next submission will be numbered; `ReplicaStatus.admitted` echoes these numbers."""
        return self._seq + 1

    async def wait_closed(self) -> None:
        """Return when the connection is lost or closed."""
        await self._closed.wait()

    # ---------------------------------------------------------------- what it does

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[Chunk], None]:
        """Submit and yield chunks until the terminal one, all that are ready in one list, never an empty one.

        Raises the error that ended the request, after what came before it was yielded.
        """
        seq, stream = self._submit(request)
        try:
            while True:
                if not stream.ready and not stream.done:
                    stream.waiter = self._loop.create_future()
                    await stream.waiter
                done = stream.done
                if stream.ready:
                    ready, stream.ready = stream.ready, []
                    yield ready
                if done:
                    break
            if stream.error is not None:
                raise stream.error
        finally:
            if self._streams.pop(seq, None) is not None:
                self._send(wire.Abort(seq))

    def resync(self) -> None:
        """Ask for a snapshot of what is cached; the listener gets it. Nothing happens on a lost connection."""
        self._send(wire.Resync())

    async def ping(self, timeout_s: float = 5.0) -> float:
        """Seconds for a round trip through the engine's thread; raises ReplicaLost or TimeoutError."""
        self._check_alive()
        self._last_nonce = nonce = self._last_nonce + 1
        self._pings[nonce] = answer = self._loop.create_future()
        begin = self._loop.time()
        try:
            self._send(wire.Ping(nonce))
            async with asyncio.timeout(timeout_s):
                await answer
        finally:
            del self._pings[nonce]
        return self._loop.time() - begin

    async def journal(self, gateway_id: str, timeout_s: float = 5.0) -> Journaled:
        """What the replica has made for a gateway and nobody has acknowledged; "" for all that has ended, of everybody.

        Raises ReplicaLost, also when there is no answer in time.
        """
        self._check_alive()
        self._last_nonce = nonce = self._last_nonce + 1
        answer: asyncio.Future[Journaled] = self._loop.create_future()
        self._journals[nonce] = [], answer
        try:
            self._send(wire.JournalAsk(nonce, gateway_id))
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise ReplicaLost(f"replica {self.address.replica_id!r} did not show its journal in time") from None
        finally:
            del self._journals[nonce]

    def acknowledge(self, request_ids: Collection[str], *, foreign: bool = False) -> None:
        """These are on the books. Of the ids only those are sent, soon, that this connection submitted with a note;
        foreign: of whomever, so all of them.
        """
        mine = list(request_ids) if foreign else [id for id in request_ids if id in self._journaled]
        if not mine or not self.alive:
            return
        self._journaled.difference_update(mine)
        if not self._acknowledging:
            self._loop.call_later(_ACKNOWLEDGE_S, self._send_acknowledgements)
        self._acknowledging += mine
        if len(self._acknowledging) >= _ACKNOWLEDGED:
            self._send_acknowledgements()

    def _send_acknowledgements(self) -> None:
        if self._acknowledging:
            self._send(wire.JournalAck(tuple(self._acknowledging)))
            self._acknowledging.clear()

    async def aclose(self) -> None:
        """Abort what is in flight and let go of the sockets; streams still read raise ReplicaLost."""
        if self.alive:
            for seq in self._streams:
                self._send(wire.Abort(seq))
            self._send_acknowledgements()
        self._lose(partial(ReplicaLost, "the connection to the replica was closed"))

    # ---------------------------------------------------------------- inside

    def _submit(self, request: GenerateRequest) -> tuple[int, _Stream]:
        self._check_alive()
        message = wire.submit(self._seq + 1, request)
        self._seq += 1
        self._streams[self._seq] = stream = _Stream(request.request_id)
        if request.note:
            self._journaled.add(request.request_id)
        self._send(message)
        return self._seq, stream

    def _check_alive(self) -> None:
        if not self.alive:
            raise self._end_error()

    def _send(self, message: wire.ToReplica) -> None:
        if self.alive:
            self._sockets.dealer.send(wire.encode(message), zmq.NOBLOCK)
            if has_input(self._sockets.dealer):  # sending may have swallowed the descriptor's edge
                self._loop.call_soon(self._read_dealer)

    def _read_dealer(self) -> None:
        if not self.alive:
            return
        for message in take(self._sockets.dealer, _FRAMES_PER_TURN):
            frame = message[-1]
            try:
                self._take(wire.decode_to_gateway(frame), len(frame))
            except wire.WireError as error:
                log.warning("dropped a frame of replica %s: %s", self.address.replica_id, error)
                if not self._described.done():
                    self._lose(partial(ConfigError, f"the replica speaks another language: {error}"))
            if self._closed.is_set():
                return
        if has_input(self._sockets.dealer):
            self._loop.call_soon(self._read_dealer)

    def _take(self, message: wire.ToGateway, size: int) -> None:
        if isinstance(message, wire.Chunks):
            self._take_chunks(message, size)
        elif isinstance(message, wire.Card):
            self._take_status(wire.status(message.status))
            if not self._described.done():
                self._described.set_result(message.card)
        elif isinstance(message, wire.Snapshot):
            if self._listener is not None and message.incarnation == self.address.incarnation:
                self._listener.snapshot(message.next_event, message.hashes)
        elif isinstance(message, wire.Pong):
            answer = self._pings.get(message.nonce)
            if answer is not None and not answer.done():
                answer.set_result(None)
        elif isinstance(message, wire.JournalPage):
            self._take_page(message)
        elif message.fatal:
            self._lose(partial(ReplicaLost, f"the replica ended the connection: {message.reason}"))
        else:
            log.warning("replica %s refused a frame: %s", self.address.replica_id, message.reason)

    def _take_chunks(self, message: wire.Chunks, size: int) -> None:
        for part in message.parts:
            self._deliver(part)
        self._received += size
        if self._received - self._acknowledged >= _ACK_EVERY:
            self._acknowledged = self._received
            self._send(wire.Ack(self._received))

    def _take_page(self, page: wire.JournalPage) -> None:
        if page.nonce in self._journals:  # else nobody waits any more
            entries, answer = self._journals[page.nonce]
            entries += page.entries
            if page.last and not answer.done():
                answer.set_result(Journaled(page.owners, tuple(entries)))

    def _deliver(self, part: wire.ChunkPart) -> None:
        stream = self._streams.get(part.seq)
        if stream is None:
            return  # left early; its abort is on the way
        if part.error is not None:
            stream.error, stream.done = wire.error(part.error), True
        else:
            stream.ready.append(wire.chunk(stream.request_id, part))
            stream.done = part.usage is not None
        if stream.done:
            del self._streams[part.seq]
        stream.wake()

    def _read_published(self) -> None:
        # Asking also clears the descriptor, which would wake the loop over and over.
        if self.alive and has_input(self._sockets.subscriber) and not self._reading_later:
            self._reading_later = True
            self._loop.call_later(_PUBLISHED_AFTER_S, self._read_subscriber)

    def _read_subscriber(self) -> None:
        self._reading_later = False
        if not self.alive:
            return
        for parts in take(self._sockets.subscriber, _FRAMES_PER_TURN):
            try:
                message = wire.decode_published(parts[-1][1:])
            except wire.WireError as error:
                log.warning("dropped a frame of replica %s: %s", self.address.replica_id, error)
                continue
            if message.incarnation != self.address.incarnation:
                continue
            if isinstance(message, wire.Status):
                self._take_status(wire.status(message))
            elif self._listener is not None:
                self._listener.events(message.first, wire.events(message))
            if self._closed.is_set():  # a hook closed the connection
                return
        if has_input(self._sockets.subscriber):
            self._read_published()

    def _take_status(self, status: ReplicaStatus) -> None:
        if status.incarnation == self.address.incarnation:
            self.status = status
            if self._listener is not None:
                self._listener.status(status)

    def _read_monitor(self) -> None:
        if self.alive and disconnections(self._sockets.monitor):
            self._read_dealer()  # what arrived before the end still counts
            self._lose(partial(ReplicaLost, f"the connection to replica {self.address.replica_id!r} broke"))

    def _lose(self, error: Callable[[], SignalboxError]) -> None:
        """The end of the connection, once: let go of the sockets, end every stream, each with an error of its own."""
        if not self.alive:
            return
        self._end_error = error
        self._closed.set()
        for descriptor in self._watched:
            self._loop.remove_reader(descriptor)
        self._sockets.close()
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.error, stream.done = error(), True
            stream.wake()
        waiting: list[asyncio.Future[Any]] = [*self._pings.values(), *(asked for _, asked in self._journals.values())]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(error())
        if not self._described.done():
            self._described.set_exception(error())
            self._described.exception()  # seen here: nobody may be waiting for it any more
