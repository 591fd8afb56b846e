"""What is asked: lengths, shared prefixes, files, traces."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from load.http1 import parse_url
from load.plan import Target, merge
from load.units import BadOption
from load.workload import Ask, Chat, Contents, Documents, Replay, Synthetic, parse_lengths, read_prompts, shared_blocks
from policies.traces import TraceError, TraceRequest, read_trace, scaled


def words(ask: Ask) -> list[str]:
    assert isinstance(ask.prompt, str)
    return ask.prompt.split()


def synthetic(**more: object) -> Synthetic:
    return Synthetic(Contents(1), parse_lengths("20", "p"), parse_lengths("8", "o"), **more)  # type: ignore[arg-type]


def test_prompts_are_as_long_as_wanted_and_repeat_by_seed_and_index() -> None:
    first, again, other = (next(synthetic().conversation(index)) for index in (3, 3, 4))
    assert len(words(first)) == first.prompt_tokens == 20
    assert first == again
    assert first.prompt != other.prompt
    assert pickle.loads(pickle.dumps(synthetic())) == synthetic()


def test_a_shared_prefix_is_shared_by_its_group_only() -> None:
    asks = [next(synthetic(prefix_tokens=12, groups=3).conversation(index)) for index in range(60)]
    prefixes = {tuple(words(ask)[:12]) for ask in asks}
    assert len(prefixes) == 3
    assert len({tuple(words(ask)) for ask in asks}) == 60
    assert asks[0].prompt_tokens == 32


@pytest.mark.parametrize(
    ("text", "mean", "spread"),
    [("normal:100,10", 100, 10), ("uniform:50,150", 100, 29), ("lognormal:100,0.5", 113, 60), ("77", 77, 0)],
)
def test_length_distributions(text: str, mean: float, spread: float) -> None:
    drawn = [parse_lengths(text, "--x").draw(Contents(0).rng(0, index)) for index in range(4000)]
    found = sum(drawn) / len(drawn)
    assert found == pytest.approx(mean, rel=0.05)
    assert (sum((one - found) ** 2 for one in drawn) / len(drawn)) ** 0.5 == pytest.approx(spread, rel=0.1, abs=0.1)
    assert min(drawn) >= 1


def test_empirical_lengths_come_from_the_file(tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("3\n\n5\n900\n")
    drawn = {parse_lengths(f"empirical:{file}", "--x").draw(Contents(0).rng(0, index)) for index in range(100)}
    assert drawn == {3, 5, 900}
    file.write_text("3\nmany\n")
    with pytest.raises(BadOption, match=r"lengths\.txt:2: 'many'"):
        parse_lengths(f"empirical:{file}", "--x")


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "x", "normal:5", "normal:5,-1", "uniform:9,3", "zipf:1,2", "empirical:/nowhere", "normal:,"]
)
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(BadOption, match="--x"):
        parse_lengths(text, "--x")


def test_a_chat_sends_the_answers_back() -> None:
    chat = Chat(
        Contents(1),
        parse_lengths("3", "t"),
        parse_lengths("5", "p"),
        parse_lengths("4", "o"),
        prefix_tokens=6,
        think_s=2.0,
    )
    session = chat.conversation(0)
    first = next(session)
    second = session.send("an answer")
    third = session.send("another")
    roles = [[message["role"] for message in ask.prompt] for ask in (first, second, third)]  # type: ignore[index]
    assert roles == [
        ["system", "user"],
        ["system", "user", "assistant", "user"],
        ["system", *["user", "assistant"] * 2, "user"],
    ]
    assert second.prompt[:2] == first.prompt
    assert second.prompt[2] == {"role": "assistant", "content": "an answer"}
    assert (first.think_s, second.think_s) == (0.0, 2.0)
    with pytest.raises(StopIteration):
        session.send("")


def test_questions_about_one_document_begin_alike() -> None:
    documents = Documents(
        Contents(1), 2, parse_lengths("uniform:30,60", "d"), parse_lengths("5", "q"), parse_lengths("4", "o")
    )
    asks = [next(documents.conversation(index)) for index in range(30)]
    texts = {tuple(words(ask)[:-5]) for ask in asks}
    assert len(texts) == 2
    assert len({tuple(words(ask)) for ask in asks}) == 30


def test_token_ids_stay_inside_the_vocabulary() -> None:
    ask = next(Synthetic(Contents(1, vocab=300), parse_lengths("200", "p"), parse_lengths("1", "o")).conversation(0))
    assert isinstance(ask.prompt, list)
    assert len(ask.prompt) == 200
    assert all(256 <= token < 300 for token in ask.prompt)


# ---------------------------------------------------------------------------------------------------------------- files


def test_prompt_files_are_read_in_turn(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("first one\n\nsecond\n")
    found = read_prompts(text, parse_lengths("9", "o"))
    assert [next(found.conversation(index)).prompt for index in range(3)] == ["first one", "second", "first one"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 5}\n{"prompt": "x"}\n')
    found = read_prompts(lines, None)
    assert [(one.prompt_tokens, one.max_tokens) for one in found.entries] == [(3, 5), (1, None)]


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "{}", '{"prompt": 3}', '{"messages": "hi"}', '{"messages": [3]}', '{"prompt": "x", "max_tokens": 0}'],
)
def test_broken_lines_of_a_prompt_file_are_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "fine"}}\n{line}\n')
    with pytest.raises(BadOption, match=r"prompts\.jsonl:2"):
        read_prompts(file, None)


# --------------------------------------------------------------------------------------------------------------- traces


def common(a: list[str], b: list[str]) -> int:
    return next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))


def test_a_replay_shares_exactly_the_prefixes_of_its_trace() -> None:
    trace = (
        TraceRequest(0, 40, 5, (1, 2, 3), 16),
        TraceRequest(1, 48, 5, (1, 2, 9), 16),
        TraceRequest(2, 20, 5, (7, 2), 16),
        TraceRequest(3, 20, 5),
    )
    texts = [words(next(Replay(Contents(1), trace).conversation(index))) for index in range(4)]
    assert [len(text) for text in texts] == [40, 48, 20, 20]
    assert 32 <= common(texts[0], texts[1]) < 36
    assert common(texts[0], texts[2]) < 4
    assert common(texts[0], texts[3]) < 4


def test_a_replay_of_mooncake_hits_the_cache_as_the_trace_says(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 1000 * at,
            "input_length": 1024 + 100 * (at % 4),
            "output_length": 3,
            "hash_ids": [0, at % 5, 100 + at],
        }
        for at in range(40)
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    trace = scaled(read_trace(file), length_scale=32)
    replay = Replay(Contents(1), tuple(trace))
    seen: set[tuple[str, ...]] = set()
    hits = total = 0
    for index in range(40):
        text = words(next(replay.conversation(index)))
        blocks = [tuple(text[: end + 16]) for end in range(0, len(text) - 15, 16)]
        hits, total = hits + sum(block in seen for block in blocks), total + len(blocks)
        seen.update(blocks)
    full = [TraceRequest(one.arrival_s, 0, 0, one.prefix_ids[: one.prompt_tokens // 16]) for one in trace]
    assert hits / total == shared_blocks(full)
    assert hits > 30


def test_recorded_traffic_is_read(tmp_path: Path) -> None:
    file = tmp_path / "recorded.jsonl"
    file.write_text(
        '{"time": 1764000010.5, "prompt_tokens": 40, "output_tokens": 7, "block_tokens": 16, '
        '"hashes": ["ff", "0a1b"], "tenant": "x"}\n'
        '{"time": 1764000010.0, "prompt_tokens": 9, "output_tokens": 2}\n'
    )
    found = read_trace(file)
    assert found[0] == TraceRequest(0.0, 9, 2)
    assert found[1] == TraceRequest(0.5, 40, 7, (255, 0x0A1B), 16)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "not JSON"),
        ("3", "not a JSON object"),
        ('{"time": 1, "prompt_tokens": 40, "output_tokens": 7, "hashes": ["zz"]}', "hexadecimal"),
        ('{"time": 1, "prompt_tokens": 40, "output_tokens": 7, "block_tokens": 16, "hashes": ["a"]}', "too few"),
        ('{"time": 1, "prompt_tokens": -1, "output_tokens": 7}', "prompt_tokens"),
        ('{"time": "now", "prompt_tokens": 1, "output_tokens": 7}', "time"),
        ('{"time": 1, "prompt_tokens": 1, "output_tokens": 7, "block_tokens": 0}', "block_tokens"),
        ('{"time": 1, "prompt_tokens": 1, "output_tokens": 7, "hashes": 5}', "hashes"),
    ],
)
def test_broken_lines_of_recorded_traffic_are_named(tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "recorded.jsonl"
    file.write_text(f'{{"time": 0, "prompt_tokens": 9, "output_tokens": 2}}\n\n{line}\n')
    with pytest.raises(TraceError, match=reason) as caught:
        read_trace(file)
    assert caught.value.line == 3


# --------------------------------------------------------------------------------------------------------------- bodies


def test_bodies_are_openais_and_extras_merge_in() -> None:
    target = Target(
        parse_url("http://h:1/v1"), "m", extra={"temperature": None, "stream_options": {"x": 1}, "top_p": 0.5}
    )
    body = json.loads(target.body(Ask("hi", 1, 4)))
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 4,
        "stream": True,
        "stream_options": {"include_usage": True, "x": 1},
        "top_p": 0.5,
    }
    fields = {"a": {"b": 1, "c": 2}, "d": 3}
    merge(fields, {"a": {"b": None}, "d": {"e": 1}})
    assert fields == {"a": {"c": 2}, "d": {"e": 1}}


def test_the_key_is_in_no_repr_and_no_url() -> None:
    target = Target(parse_url("http://h"), "m", api_key="sk-secret")
    assert "secret" not in repr(target)
    assert b"Bearer sk-secret" in target.head()
    for url in ("http://user:key@h", "http://h?key=1", "ftp://h", "http://", "http://h:99999"):
        with pytest.raises(BadOption):
            parse_url(url)
