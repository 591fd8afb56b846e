"""Text for clients: whole characters, never a part of a stop string, and nothing lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from replicas.engine.detokenizer import Detokenizer


def run(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    detokenizer = Detokenizer(stop)
    texts = []
    for piece in pieces:
        text, stopped = detokenizer.push(piece)
        texts.append(text)
        if stopped:
            return texts, True
    texts.append(detokenizer.flush())
    return texts, False


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


def test_character_is_sent_when_its_last_byte_arrives() -> None:
    euro = "€".encode()
    assert run([b"a", euro[:1], euro[1:2], euro[2:] + b"b"])[0] == ["a", "", "", "€b", ""]


def test_broken_character_becomes_the_replacement_character() -> None:
    texts, _ = run([b"a\xe2", b"z", b"\xf0\x9f"])
    assert "".join(texts) == b"a\xe2z\xf0\x9f".decode(errors="replace")


def test_only_the_longest_possible_stop_prefix_is_held_back() -> None:
    detokenizer = Detokenizer(("</end>",))
    assert detokenizer.push(b"hello </") == ("hello ", False)
    assert detokenizer.push(b"b> </en") == ("</b> ", False)
    assert detokenizer.push(b"d>tail") == ("", True)


def test_earliest_stop_string_wins_and_flush_returns_a_false_alarm() -> None:
    assert run([b"one STOP two END"], ("END", "STOP")) == (["one "], True)
    assert run([b"one ST"], ("STOP",)) == (["one ", "ST"], False)


def test_stop_strings_are_not_looked_for_before_min_tokens() -> None:
    detokenizer = Detokenizer(("x",))
    assert detokenizer.push(b"axb", check_stop=False) == ("axb", False)
    assert detokenizer.push(b"cxd") == ("c", True)


@given(st.text(max_size=40), st.lists(st.integers(0, 200), max_size=12))
def test_without_stop_strings_all_text_comes_out_however_the_bytes_are_cut(text: str, cuts: list[int]) -> None:
    assert "".join(run(split(text.encode("utf-8", "ignore"), cuts))[0]) == text.encode("utf-8", "ignore").decode()


@given(
    st.text("abc€", max_size=30),
    st.lists(st.text("abc€", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_output_is_the_text_before_the_first_stop_and_no_prefix_of_it_shows(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    texts, stopped = run(split(text.encode(), cuts), tuple(stops))
    sent = "".join(texts)
    assert stopped == any(stop in text for stop in stops)
    assert text.startswith(sent)
    if not stopped:
        assert sent == text
    else:
        assert not any(stop in sent for stop in stops)
        assert any(text[len(sent) :].startswith(stop) for stop in stops), "cut exactly where a stop string begins"
