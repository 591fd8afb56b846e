"""What crosses a socket between a gateway and a replica: msgpack frames behind one version byte.

    frame = VERSION (1 byte) | msgpack array [tag, field, field, ...]

    gateway DEALER ──► replica ROUTER    Describe · Submit · Abort · Ack · Ping · Resync · JournalAsk · JournalAck
    gateway DEALER ◄── replica ROUTER    Card · Chunks · Pong · Refused · Snapshot · JournalPage
    gateway SUB    ◄── replica PUB       TOPIC_STATUS + Status · TOPIC_EVENTS + Events

A stream is named by its submission's sequence number, which counts up from 1 on each connection, so a token costs a few
bytes. All chunks that one engine step brings for one gateway travel in one Chunks frame. Token ids of a prompt are raw
little-endian int32. Floats travel as float64. `decode_*` raise WireError for anything that is not a whole, known frame
of this version; the receiver drops such a frame and lives on.

Knows msgspec and the protocol; knows no socket, no engine and no event loop.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from replicas.protocol import (
    Chunk,
    EngineStats,
    FinishReason,
    GenerateRequest,
    KVEvent,
    ModelCard,
    ReplicaState,
    ReplicaStatus,
    SamplingParams,
    SignalboxError,
    Timing,
    TokenLogprob,
    Usage,
    error_from_name,
)

VERSION = 1
TOPIC_STATUS = b"S"
TOPIC_EVENTS = b"K"
# A larger frame is cut off by the receiving socket before it is allocated.
MAX_FRAME_BYTES = 64 * 2**20

_PREFIX = bytes([VERSION])

M = TypeVar("M")


class WireError(Exception):
    """A frame that is garbled, of another version or of an unknown kind."""


class _Frame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    pass


class Describe(_Frame, tag=1, frozen=True):
    """First frame of a connection: who speaks, and which incarnation it believes to have reached."""

    gateway_id: str
    incarnation: str


class Submit(_Frame, tag=2, frozen=True):
    seq: int
    request_id: str
    tenant: str
    prompt: bytes
    sampling: SamplingParams
    priority: int = 0
    fair_key: str = ""
    deadline_s: float | None = None
    max_queued: int | None = None
    max_queued_per_key: int | None = None
    note: str = ""
    max_queued_tokens: int | None = None


class Abort(_Frame, tag=3, frozen=True):
    seq: int


class Ack(_Frame, tag=4, frozen=True):
    """Bytes of Chunks frames that this gateway has taken off its socket since the connection began."""

    received_bytes: int


class Ping(_Frame, tag=5, frozen=True):
    nonce: int


class Card(_Frame, tag=6, frozen=True):
    incarnation: str
    card: ModelCard
    status: Status


class ErrorPart(_Frame, frozen=True):
    name: str
    message: str
    param: str | None
    retry_after_s: float | None


class LogprobPart(_Frame, frozen=True):
    token_id: int
    token: bytes
    logprob: float
    top: tuple[LogprobPart, ...]


class ChunkPart(_Frame, frozen=True):
    """One Chunk without its request id. `finish` is an index into _FINISH; usage is (prompt, completion, cached) and
    timing (queued, prefill, decode) in seconds, with the cached tokens.
    """

    seq: int
    index: int
    text: str
    token_ids: tuple[int, ...]
    finish: int = -1
    usage: tuple[int, int, int] | None = None
    logprobs: tuple[LogprobPart, ...] = ()
    error: ErrorPart | None = None
    timing: tuple[float, float, float, int] | None = None


class Chunks(_Frame, tag=7, frozen=True):
    parts: tuple[ChunkPart, ...]


class Pong(_Frame, tag=8, frozen=True):
    nonce: int


class Refused(_Frame, tag=9, frozen=True):
    """The replica could not use a frame. After a fatal one it serves this connection no more."""

    reason: str
    fatal: bool


class Status(_Frame, tag=10, frozen=True):
    replica_id: str
    incarnation: str
    model: str
    state: ReplicaState
    stats: EngineStats
    admitted: dict[str, int]


class EventPart(_Frame, frozen=True):
    kind: str
    hashes: tuple[bytes, ...]
    parent: bytes


class Events(_Frame, tag=11, frozen=True):
    """`first` numbers the first event; the others follow without a gap. Events of an incarnation count from 1."""

    incarnation: str
    first: int
    events: tuple[EventPart, ...]


class Resync(_Frame, tag=12, frozen=True):
    """Asks for a Snapshot: events were lost, or happened before this gateway listened."""


class Snapshot(_Frame, tag=13, frozen=True):
    """Everything that was cached before event `next_event`: blocks' hashes of 16 bytes, one after another."""

    incarnation: str
    next_event: int
    hashes: bytes


class JournalAsk(_Frame, tag=14, frozen=True):
    """Asks what was made for a gateway and not acknowledged; "" asks for all that has ended, of every gateway."""

    nonce: int
    gateway_id: str


class JournalEntry(_Frame, frozen=True):
    """usage: what is to be paid, as (prompt, completion, cached); of one that runs, until now."""

    request_id: str
    usage: tuple[int, int, int]
    running: bool
    note: str


class JournalPage(_Frame, tag=15, frozen=True):
    """A part of the answer. owners: the incarnations whose journals are here; none where no journal is kept."""

    nonce: int
    owners: tuple[str, ...]
    entries: tuple[JournalEntry, ...]
    last: bool


class JournalAck(_Frame, tag=16, frozen=True):
    """The usage of these is on the books."""

    request_ids: tuple[str, ...]


Command = Submit | Abort | Ack | Ping | Resync | JournalAsk | JournalAck
ToReplica = Describe | Command
ToGateway = Card | Chunks | Pong | Refused | Snapshot | JournalPage
Published = Status | Events

_FINISH: tuple[FinishReason, ...] = tuple(FinishReason)
_FINISH_INDEX: Mapping[FinishReason | None, int] = {None: -1} | {reason: i for i, reason in enumerate(_FINISH)}

_encoder = msgspec.msgpack.Encoder()
_to_replica: msgspec.msgpack.Decoder[ToReplica] = msgspec.msgpack.Decoder(ToReplica)
_to_gateway: msgspec.msgpack.Decoder[ToGateway] = msgspec.msgpack.Decoder(ToGateway)
_published: msgspec.msgpack.Decoder[Published] = msgspec.msgpack.Decoder(Published)


def encode(message: ToReplica | ToGateway | Published) -> bytes:
    return _PREFIX + _encoder.encode(message)


def decode_to_replica(frame: bytes) -> ToReplica:
    return _decode(_to_replica.decode, frame)


def decode_to_gateway(frame: bytes) -> ToGateway:
    return _decode(_to_gateway.decode, frame)


def decode_published(frame: bytes) -> Published:
    """`frame` without its topic byte."""
    return _decode(_published.decode, frame)


def _decode(decode: Callable[[Any], M], frame: bytes) -> M:
    if not frame or frame[0] != VERSION:
        found = frame[0] if frame else "nothing"
        raise WireError(f"frame of wire version {found}, this side speaks {VERSION}")
    try:
        return decode(memoryview(frame)[1:])
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"unreadable frame of {len(frame)} bytes: {error}") from error


def submit(seq: int, request: GenerateRequest) -> Submit:
    """Raises OverflowError for a token id outside int32."""
    return Submit(
        seq,
        request.request_id,
        request.tenant,
        _pack_ids(request.prompt_token_ids),
        request.sampling,
        request.priority,
        request.fair_key,
        request.deadline_s,
        request.max_queued,
        request.max_queued_per_key,
        request.note,
        request.max_queued_tokens,
    )


def request(message: Submit) -> GenerateRequest:
    """Raises WireError when the prompt is not a whole number of int32."""
    return GenerateRequest(
        request_id=message.request_id,
        prompt_token_ids=_unpack_ids(message.prompt),
        sampling=message.sampling,
        tenant=message.tenant,
        priority=message.priority,
        fair_key=message.fair_key,
        deadline_s=message.deadline_s,
        max_queued=message.max_queued,
        max_queued_per_key=message.max_queued_per_key,
        note=message.note,
        max_queued_tokens=message.max_queued_tokens,
    )


def _pack_ids(ids: Sequence[int]) -> bytes:
    packed = array("i", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack_ids(packed: bytes) -> tuple[int, ...]:
    if len(packed) % 4:
        raise WireError(f"prompt of {len(packed)} bytes is not a whole number of int32")
    ids = array("i", packed)
    if sys.byteorder == "big":
        ids.byteswap()
    return tuple(ids)


def chunk_part(seq: int, chunk: Chunk) -> ChunkPart:
    if chunk.error is not None:
        return error_part(seq, chunk.error)
    usage, timing = chunk.usage, chunk.timing
    return ChunkPart(
        seq,
        chunk.index,
        chunk.text,
        chunk.token_ids,
        _FINISH_INDEX[chunk.finish_reason],
        None if usage is None else (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        tuple(map(_logprob_part, chunk.logprobs)) if chunk.logprobs else (),
        timing=None if timing is None else _timing_parts(timing),
    )


def error_part(seq: int, error: SignalboxError) -> ChunkPart:
    packed = ErrorPart(type(error).__name__, error.message, error.param, error.retry_after_s)
    return ChunkPart(seq, 0, "", (), error=packed)


def chunk(request_id: str, part: ChunkPart) -> Chunk:
    usage = part.usage
    return Chunk(
        request_id=request_id,
        index=part.index,
        text=part.text,
        token_ids=part.token_ids,
        logprobs=tuple(map(_logprob, part.logprobs)) if part.logprobs else (),
        finish_reason=_FINISH[part.finish] if 0 <= part.finish < len(_FINISH) else None,
        usage=None if usage is None else _usage(*usage),
        error=None if part.error is None else error(part.error),
        timing=None if part.timing is None else _timing(*part.timing),
    )


def _timing_parts(timing: Timing) -> tuple[float, float, float, int]:
    return timing.queued_s, timing.prefill_s, timing.decode_s, timing.cached_tokens


def _timing(queued_s: float, prefill_s: float, decode_s: float, cached_tokens: int) -> Timing:
    return Timing(queued_s=queued_s, prefill_s=prefill_s, decode_s=decode_s, cached_tokens=cached_tokens)


def journal_entry(request_id: str, usage: Usage, running: bool, note: str) -> JournalEntry:
    counts = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
    return JournalEntry(request_id, counts, running, note)


def journaled_usage(entry: JournalEntry) -> Usage:
    return _usage(*entry.usage)


def _usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    return Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, cached_tokens=cached_tokens)


def error(part: ErrorPart) -> SignalboxError:
    return error_from_name(part.name, part.message, param=part.param, retry_after_s=part.retry_after_s)


def _logprob_part(entry: TokenLogprob) -> LogprobPart:
    return LogprobPart(entry.token_id, entry.token, entry.logprob, tuple(map(_logprob_part, entry.top)))


def _logprob(part: LogprobPart) -> TokenLogprob:
    return TokenLogprob(part.token_id, part.token, part.logprob, tuple(map(_logprob, part.top)))


def status_message(status: ReplicaStatus) -> Status:
    return Status(
        status.replica_id, status.incarnation, status.model, status.state, status.stats, dict(status.admitted)
    )


def status(message: Status) -> ReplicaStatus:
    return ReplicaStatus(
        replica_id=message.replica_id,
        incarnation=message.incarnation,
        model=message.model,
        state=message.state,
        stats=message.stats,
        admitted=message.admitted,
    )


def events_message(incarnation: str, first: int, events: Sequence[KVEvent]) -> Events:
    return Events(incarnation, first, tuple(EventPart(event.kind, event.hashes, event.parent) for event in events))


def events(message: Events) -> list[KVEvent]:
    return [KVEvent(kind=part.kind, hashes=part.hashes, parent=part.parent) for part in message.events]
