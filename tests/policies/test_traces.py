from __future__ import annotations

import json
from pathlib import Path

import pytest

from policies.traces import TraceError, TraceRequest, mean_rate, read_trace, scaled

GOOD = {"timestamp": 3000, "input_length": 1300, "output_length": 70, "hash_ids": [0, 1, 5]}


def write(folder: Path, name: str, *lines: object) -> Path:
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_mooncake_arrivals_count_from_the_first_request_in_order(tmp_path: Path) -> None:
    path = write(tmp_path, "t.jsonl", GOOD, "", {**GOOD, "timestamp": 1000, "output_length": 1})
    assert read_trace(path) == [TraceRequest(0.0, 1300, 1, (0, 1, 5)), TraceRequest(2.0, 1300, 70, (0, 1, 5))]
    assert len(read_trace(path, limit=1)) == 1


def test_azure_rows_become_requests_without_prefixes(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "t.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:15:46.6805900,374,44",
        "2023-11-16 18:15:50.9951690,396,109",
    )
    first, second = read_trace(path)
    assert first == TraceRequest(0.0, 374, 44)
    assert second.arrival_s == pytest.approx(4.314579)
    assert mean_rate([first, second]) == pytest.approx(1 / 4.314579)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ({**GOOD, "input_length": -1}, "input_length must be at least 0"),
        ({**GOOD, "input_length": 2.5}, "input_length must be a whole number"),
        ({**GOOD, "output_length": "many"}, "output_length must be a number"),
        ({**GOOD, "output_length": None}, "output_length must be a number"),
        ({**GOOD, "timestamp": float("nan")}, "timestamp must be at least 0"),
        ({**GOOD, "hash_ids": [0]}, "1 hash_ids are too few for an input_length of 1300"),
        ({**GOOD, "hash_ids": ["a", "b", "c"]}, "hash_ids must be a list of integers"),
    ],
)
def test_a_bad_mooncake_line_is_named_by_its_number(tmp_path: Path, line: object, reason: str) -> None:
    path = write(tmp_path, "t.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(TraceError, match=reason) as caught:
        read_trace(path)
    assert caught.value.line == 3
    assert str(caught.value).startswith(f"{path}:3: ")


@pytest.mark.parametrize(
    ("lines", "number", "reason"),
    [
        (["TIMESTAMP,Tokens"], 1, "header"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,2"], 2, "no date and time"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46.68,1"], 2, "2 fields"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:15:46,1,x"], 2, "GeneratedTokens"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens"], 1, "holds no request"),
    ],
)
def test_a_bad_azure_file_is_refused_with_its_line(tmp_path: Path, lines: list[str], number: int, reason: str) -> None:
    with pytest.raises(TraceError, match=reason) as caught:
        read_trace(write(tmp_path, "t.csv", *lines))
    assert caught.value.line == number


def test_other_kinds_of_file_and_other_encodings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="jsonl"):
        read_trace(write(tmp_path, "t.txt", GOOD))
    path = tmp_path / "bytes.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="UTF-8"):
        read_trace(path)


def test_scaling_lengths_keeps_exactly_the_full_blocks_full() -> None:
    requests = [TraceRequest(8.0, tokens, 10, tuple(range(9))) for tokens in (511, 512, 513, 1023, 1024, 4000)]
    for before, after in zip(requests, scaled(requests, length_scale=32, rate_scale=2), strict=True):
        assert after.prompt_tokens // 16 == before.prompt_tokens // 512
        assert after.block_tokens == 16
        assert after.output_tokens == 1
        assert after.arrival_s == 4.0
