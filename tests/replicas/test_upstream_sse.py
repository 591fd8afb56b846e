from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicas.upstream_sse import EventReader, EventTooLarge


def read(*pieces: bytes, most: int = 1000) -> list[str]:
    reader = EventReader(most)
    return [data for piece in pieces for data in reader.feed(piece)] + list(reader.end())


@pytest.mark.parametrize(
    ("stream", "data"),
    [
        (b"data: a\n\ndata: b\n\n", ["a", "b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", ["a", "b"]),
        (b"data: a\r\rdata: b\r\r", ["a", "b"]),
        (b"data: a\r\n\ndata: b\n\r\n", ["a", "b"]),
        (b"data:a\n\n", ["a"]),
        (b"data:  a\n\n", [" a"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b"data\ndata: b\n\n", ["\nb"]),
        (b": ping\n\n: ping\ndata: a\n\n", ["a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\n\n", ["a"]),
        (b"event: only\n\n", []),
        (b"database: a\n\n", []),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"data: \xef\xbb\xbf\n\n", ["\ufeff"]),
        (b"\n\n\n", []),
        (b"", []),
        (b"data: [DONE]", ["[DONE]"]),
        (b"data: [DONE]\n", ["[DONE]"]),
        ("data: a\u2028b\x0bc\x1cd\u0085e\n\n".encode(), ["a\u2028b\x0bc\x1cd\u0085e"]),
    ],
)
def test_streams_are_read_as_the_standard_says(stream: bytes, data: list[str]) -> None:
    """The last: str.splitlines and httpx's own line reader break at these characters, which JSON strings may hold."""
    assert read(stream) == data
    assert read(*(bytes([byte]) for byte in stream)) == data


LINES = st.lists(
    st.tuples(
        st.sampled_from(["data: ", "data:", ": ", "event: ", "", "data"]),
        st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=6),
        st.sampled_from(["\n", "\r\n", "\r"]),
    ),
    max_size=20,
)


def naive(text: str) -> list[str]:
    """The same standard, for a whole stream at once."""
    events: list[str] = []
    data: list[str] = []
    for line in text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        name, _, value = line.partition(":")
        if name == "data":
            data.append(value.removeprefix(" "))
        if not line and data:
            events.append("\n".join(data))
            data = []
    return [*events, "\n".join(data)] if data else events


@given(LINES, st.booleans(), st.data())
def test_however_it_is_torn_the_events_are_the_same(
    lines: list[tuple[str, str, str]], bom: bool, choose: st.DataObject
) -> None:
    text = "\ufeff" * bom + "".join(name + value + end for name, value, end in lines)
    stream = text.encode()
    cuts = sorted(choose.draw(st.lists(st.integers(0, len(stream)), max_size=6)))
    pieces = [stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert read(*pieces) == naive(text)


def test_an_event_is_there_with_its_last_byte() -> None:
    for end in (b"\n\n", b"\r\n\r\n", b"\r\r"):
        reader = EventReader(100)
        assert list(reader.feed(b"data: a" + end[:-1])) == ([] if end != b"\r\n\r\n" else ["a"])
        assert list(reader.feed(end[-1:])) == (["a"] if end != b"\r\n\r\n" else [])


@pytest.mark.parametrize(
    "pieces",
    [
        [b"x" * 101],
        [b"data: " + b"x" * 101 + b"\n\n"],
        [b"data: " + b"x" * 40 + b"\n"] * 3,
        [b"x" * 20] * 6,
        [b":" * 101],
    ],
)
def test_what_is_held_is_bounded(pieces: list[bytes]) -> None:
    with pytest.raises(EventTooLarge):
        read(*pieces, most=100)


def test_many_small_events_are_no_large_one() -> None:
    assert len(read(b"data: 0123456789\n\n" * 1000, most=20)) == 1000


def test_what_is_not_utf8_is_an_error_after_the_events_before_it() -> None:
    reader, seen = EventReader(100), []
    events = reader.feed(b"data: a\n\ndata: \xff\n\n")
    seen.append(next(events))
    with pytest.raises(UnicodeDecodeError):
        next(events)
    assert seen == ["a"]
