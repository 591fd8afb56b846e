from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas import wire
from replicas.protocol import (
    Chunk,
    DeadlineExceeded,
    EngineFault,
    EngineStats,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    KVEvent,
    QueueFull,
    ReplicaState,
    ReplicaStatus,
    SamplingParams,
    TokenLogprob,
    Usage,
)

int32 = st.integers(-(2**31), 2**31 - 1)
logprobs = st.builds(
    TokenLogprob,
    int32,
    st.binary(max_size=8),
    st.floats(max_value=0, allow_nan=False),
    st.tuples(st.builds(TokenLogprob, int32, st.binary(max_size=8), st.floats(max_value=0, allow_nan=False))),
)
chunks = st.builds(
    Chunk,
    request_id=st.just("r"),
    index=st.integers(0, 127),
    text=st.text(),
    token_ids=st.lists(int32, max_size=4).map(tuple),
    logprobs=st.lists(logprobs, max_size=2).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    usage=st.none()
    | st.builds(
        Usage, prompt_tokens=st.integers(0), completion_tokens=st.integers(0), cached_tokens=st.integers(0)
    ).filter(lambda usage: max(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) < 2**63),
)


@given(chunks)
def test_a_chunk_survives_the_wire(chunk: Chunk) -> None:
    frame = wire.encode(wire.Chunks((wire.chunk_part(7, chunk),)))
    message = wire.decode_to_gateway(frame)
    assert isinstance(message, wire.Chunks)
    [part] = message.parts
    assert part.seq == 7
    assert wire.chunk("r", part) == chunk


@given(st.lists(int32).map(tuple), st.text(), st.integers(1, 2**62))
def test_a_request_survives_the_wire(ids: tuple[int, ...], tenant: str, seq: int) -> None:
    sampling = SamplingParams(n=3, temperature=0.1, logit_bias=((1, -2.5),), stop=("a", "bc"), seed=-5, logprobs=2)
    request = GenerateRequest(
        request_id="r",
        prompt_token_ids=ids,
        sampling=sampling,
        tenant=tenant,
        priority=-2,
        fair_key=tenant,
        deadline_s=0.1,
        max_queued=7,
        max_queued_per_key=3,
        max_queued_tokens=9,
    )
    message = wire.decode_to_replica(wire.encode(wire.submit(seq, request)))
    assert isinstance(message, wire.Submit)
    assert message.seq == seq
    assert wire.request(message) == request


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="stop"),
        QueueFull("full", retry_after_s=1.5),
        DeadlineExceeded("late"),
        EngineFault("broke"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_as_its_own_type(error: Exception) -> None:
    message = wire.decode_to_gateway(wire.encode(wire.Chunks((wire.error_part(1, error),))))
    assert isinstance(message, wire.Chunks)
    found = wire.chunk("r", message.parts[0]).error
    assert found is not None
    assert type(found) is type(error)
    assert vars(found) == vars(error)


def test_an_error_of_a_newer_peer_arrives_as_an_engine_fault() -> None:
    part = wire.ErrorPart("FromTheFuture", "what", None, None)
    assert type(wire.error(part)) is EngineFault


def test_status_and_events_survive_the_wire() -> None:
    status = ReplicaStatus(
        replica_id="a",
        incarnation="b",
        model="m",
        state=ReplicaState.DRAINING,
        stats=EngineStats(queued_tokens=3, prefill_rate=1.5),
        admitted={"g": 9},
    )
    message = wire.decode_published(wire.encode(wire.status_message(status)))
    assert isinstance(message, wire.Status)
    assert wire.status(message) == status
    events = [KVEvent(kind="stored", hashes=(b"x" * 16, b"y" * 16), parent=b"p" * 16), KVEvent(kind="cleared")]
    published = wire.decode_published(wire.encode(wire.events_message("b", 5, events)))
    assert isinstance(published, wire.Events)
    assert (published.first, wire.events(published)) == (5, events)


@given(st.binary())
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes) -> None:
    for decode in (wire.decode_to_replica, wire.decode_to_gateway, wire.decode_published):
        with pytest.raises(wire.WireError):
            decode(bytes([wire.VERSION]) + b"\xc1" + garbage)  # 0xc1 is never used in msgpack
        with pytest.raises(wire.WireError, match="wire version"):
            decode(bytes([wire.VERSION + 1]) + garbage)


@given(st.data())
def test_a_cut_frame_is_refused(data: st.DataObject) -> None:
    frame = wire.encode(wire.Describe("gateway", "life"))
    cut = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(wire.WireError):
        wire.decode_to_replica(frame[:cut])


def test_a_frame_of_an_unknown_kind_or_of_the_other_direction_is_refused() -> None:
    unknown = bytes([wire.VERSION]) + msgspec.msgpack.encode([99, "x"])
    for frame in (unknown, wire.encode(wire.Pong(1))):
        with pytest.raises(wire.WireError):
            wire.decode_to_replica(frame)


def test_a_prompt_that_is_not_whole_int32_is_refused() -> None:
    message = wire.Submit(1, "r", "", b"abc", SamplingParams())
    with pytest.raises(wire.WireError, match="int32"):
        wire.request(message)


def test_a_frame_of_sixteen_tokens_is_small() -> None:
    parts = tuple(wire.chunk_part(100 + i, Chunk(request_id="r", text=" word", token_ids=(1234,))) for i in range(16))
    assert len(wire.encode(wire.Chunks(parts))) < 16 * 24
