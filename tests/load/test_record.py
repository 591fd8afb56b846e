"""The definitions, against answers with made-up clocks: no server, no waiting."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from load.record import CUT, GARBAGE, REJECTED, SERVER_ERROR, STATUS, Answer, Record, queue_seconds
from load.table import event_tokens, gaps_of, table_of

SSE = {b"content-type": b"text/event-stream; charset=utf-8"}
JSON = {b"content-type": b"application/json"}


class Feed:
    """An answer that is fed event by event, beginning 1 s after it was due and 0.9 s after it was begun."""

    def __init__(self, *, stream: bool = True, asked_output: int = 4) -> None:
        self.ended: list[tuple[Record, str]] = []
        self.record = Record(0, 0, scheduled=10.0, asked_prompt=3, asked_output=asked_output, begun=10.1)
        self.hung_up = 0
        self.answer = Answer(self.record, lambda record, text: self.ended.append((record, text)), asked_stream=stream)
        self.answer.hang_up = self._hang_up
        self.answer.on_sent(10.2)

    def _hang_up(self) -> None:
        self.hung_up += 1

    def head(self, status: int = 200, headers: dict[bytes, bytes] | None = None) -> Feed:
        self.answer.on_head(status, SSE if headers is None else headers, 10.9)
        return self

    def event(self, data: Any, now: float) -> Feed:
        text = data if isinstance(data, str) else json.dumps(data)
        self.answer.on_body(f"data: {text}\n\n".encode(), now)
        return self

    def content(self, text: str, now: float, **more: Any) -> Feed:
        return self.event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}, now)

    def close(self, now: float, usage: Any = None, done: bool = True, finish: str | None = "length") -> Record:
        if finish:
            self.event({"choices": [{"delta": {}, "finish_reason": finish}]}, now)
        if usage is not None:
            self.event({"choices": [], "usage": usage}, now)
        if done:
            self.event("[DONE]", now)
        self.answer.on_end(now)
        assert len(self.ended) == 1
        return self.record


def usage(completion: int, prompt: int = 3, cached: int | None = None) -> dict[str, Any]:
    details = {} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}
    return {"prompt_tokens": prompt, "completion_tokens": completion, **details}


def test_latencies_count_from_the_scheduled_time() -> None:
    feed = Feed().head().event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, 10.95)
    for k in range(4):
        feed.content("a", 11.0 + 0.5 * k)
    record = feed.close(12.5, usage(4, cached=2))
    assert record.error == ""
    table = table_of([record], start=10.0)
    figures = {
        metric: table.column(metric)[0] for metric in ("ttft", "e2e", "tpot", "lag", "connect", "ttft_sent", "e2e_sent")
    }
    assert figures == pytest.approx(
        {"ttft": 1.0, "e2e": 2.5, "tpot": 0.5, "lag": 0.1, "connect": 0.1, "ttft_sent": 0.9, "e2e_sent": 2.4}
    )
    assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (3, 4, 2)
    assert feed.ended[0][1] == "aaaa"


def test_the_role_is_no_content_and_reasoning_is() -> None:
    feed = Feed().head().event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, 10.95)
    feed.event({"choices": [{"delta": {"reasoning_content": "hm"}}]}, 11.5)
    assert feed.close(12, usage(1)).first == 11.5


def test_a_chunk_is_not_a_token() -> None:
    feed = Feed(asked_output=8).head().content("one two", 11.0).content("three four", 11.4).content("five six", 11.6)
    gaps = gaps_of([feed.close(11.6, usage(6))])
    assert gaps.chunk_gap == pytest.approx([0.4, 0.2])
    assert gaps.itl == pytest.approx([0.2, 0.2, 0.1, 0.1])
    assert gaps.itl_owner.tolist() == [0] * 4


def test_usage_in_every_event_gives_each_events_tokens() -> None:
    feed = Feed(asked_output=8).head()
    for text, now, total in (("a", 11.0, 1), ("bcd", 11.3, 4), ("e", 11.4, 5)):
        feed.content(text, now, usage=usage(total))
    record = feed.close(11.4, usage(5))
    assert list(record.chunk_tokens) == [1, 3, 1]
    assert gaps_of([record]).itl == pytest.approx([0.1, 0.1, 0.1, 0.1])


def test_tokens_spread_over_events_add_up() -> None:
    for tokens in (1, 3, 7, 8, 50):
        feed = Feed().head()
        for k in range(7):
            feed.content("x", 11 + k)
        spread = event_tokens(feed.close(20, usage(tokens)))
        assert (spread.sum(), len(spread)) == (tokens, 7)


def test_without_usage_events_are_the_tokens() -> None:
    record = Feed().head().content("a", 11).content("b", 12).close(12)
    assert record.completion_tokens == -1
    assert table_of([record], 10).output_tokens.tolist() == [2]


def test_events_may_be_torn_anywhere() -> None:
    raw = (
        b'data: {"choices":[{"delta":{"content":"h\xc3\xa9"}}]}\r\n\r\n'
        b': comment\n\nevent: x\ndata: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
    )
    feed = Feed().head()
    for at in range(len(raw)):
        feed.answer.on_body(raw[at : at + 1], 11 + at / 100)
    feed.answer.on_end(13)
    assert (feed.record.error, feed.record.finish_reason, feed.ended[0][1]) == ("", "stop", "hé")


@pytest.mark.parametrize(("done", "finish"), [(False, "stop"), (True, None), (False, None)])
def test_a_stream_without_its_end_is_cut(done: bool, finish: str | None) -> None:
    record = Feed().head().content("a", 11).close(12, done=done, finish=finish)
    assert record.error == CUT
    assert "without" in record.detail


@pytest.mark.parametrize(
    "data",
    [
        *("{broken", "[1,2]", "3", '{"choices": 5}', '{"choices": [3]}', '{"hello": 1}', "[" * 100_000),
        '{"choices": [{"delta": {"content": 7}}]}',
        '{"choices": [], "usage": {"completion_tokens": "many"}}',
    ],
)
def test_garbage_is_named_and_not_read_to_its_end(data: str) -> None:
    feed = Feed().head().event(data, 11)
    assert (feed.record.error, feed.hung_up, len(feed.ended)) == (GARBAGE, 1, 1)
    assert feed.record.end == 11
    feed.answer.on_end(12)
    assert len(feed.ended) == 1


def test_lines_that_are_no_events_are_garbage() -> None:
    feed = Feed().head()
    feed.answer.on_body(b"<html>\n<body>hello\n\n", 11)
    assert feed.record.error == GARBAGE


def test_an_error_event_is_the_servers_error() -> None:
    feed = Feed().head().content("a", 11).event({"error": {"message": "engine died"}}, 11.5)
    record = feed.close(12, done=False, finish=None)
    assert (record.error, record.detail) == (SERVER_ERROR, "engine died")


@pytest.mark.parametrize(
    ("status", "kind"), [(429, REJECTED), (503, REJECTED), (401, STATUS), (500, STATUS), (400, STATUS)]
)
def test_statuses_keep_the_servers_message(status: int, kind: str) -> None:
    feed = Feed().head(status, JSON | {b"retry-after": b"2"})
    feed.answer.on_body(b'{"error": {"message": "no"}}', 11)
    feed.answer.on_end(11)
    assert (feed.record.error, feed.record.detail, feed.record.retry_after_s) == (kind, f"{status}: no", 2.0)


def test_an_answer_in_one_piece_has_no_first_token() -> None:
    feed = Feed(stream=False).head(200, JSON)
    feed.answer.on_body(
        json.dumps(
            {"choices": [{"message": {"content": "hi you"}, "finish_reason": "stop"}], "usage": usage(2)}
        ).encode(),
        11,
    )
    feed.answer.on_end(11)
    table = table_of([feed.record], 10.0)
    assert (feed.record.error, table.column("e2e")[0], feed.ended[0][1]) == ("", 1.0, "hi you")
    assert math.isnan(table.column("ttft")[0])
    assert math.isnan(table.column("tpot")[0])


def test_one_piece_where_a_stream_was_asked_for_is_garbage() -> None:
    feed = Feed().head(200, JSON)
    feed.answer.on_body(b'{"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}', 11)
    feed.answer.on_end(11)
    assert feed.record.error == GARBAGE


def test_a_break_keeps_what_had_come() -> None:
    feed = Feed().head().content("a", 11)
    feed.answer.on_error("cut", "the connection broke", 11.5)
    assert (feed.record.error, feed.record.first, len(feed.record.chunks)) == (CUT, 11, 1)


def test_queue_time_is_read_where_it_is_told() -> None:
    assert queue_seconds({b"server-timing": b"db;dur=3, queue;desc=x;dur=12.5"}) == 0.0125
    assert queue_seconds({b"x-queue-time": b"40"}) == 0.04
    assert math.isnan(queue_seconds({b"server-timing": b"queue"}))
    assert math.isnan(queue_seconds({b"server-timing": b"queue;dur=soon"}))
    assert np.isnan(queue_seconds({}))
