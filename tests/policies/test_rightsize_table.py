from __future__ import annotations

from pathlib import Path

import pytest

from policies.rightsize.table import TableError, prices_for, prompt_hash, read_prices, read_scores

GOOD = '{"prompt": "hi", "task": "talk", "scores": {"b": 1, "a": 0.5}}\n'


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "scores.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_a_table_is_read_with_models_in_order_of_name_and_blank_lines_ignored(tmp_path: Path) -> None:
    table = read_scores(write(tmp_path, f"{GOOD}\n{GOOD.replace('hi', 'ho')}"))
    assert table.models == ("a", "b")
    assert table.prompts == ("hi", "ho")
    assert table.scores.tolist() == [[0.5, 1.0], [0.5, 1.0]]
    assert table.take([1]).prompts == ("ho",)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{broken", "not JSON"),
        ("[1, 2]", "expected an object"),
        ('{"scores": {"a": 1, "b": 1}}', "'prompt'"),
        ('{"prompt": 3, "scores": {"a": 1, "b": 1}}', "'prompt'"),
        ('{"prompt": "x"}', "'scores'"),
        ('{"prompt": "x", "scores": {}}', "'scores'"),
        ('{"prompt": "x", "scores": {"a": 1}}', "'b'"),
        ('{"prompt": "x", "scores": {"a": 1, "b": 1, "c": 1}}', "'c'"),
        ('{"prompt": "x", "scores": {"a": 2, "b": 1}}', "score of 'a'"),
        ('{"prompt": "x", "scores": {"a": NaN, "b": 1}}', "score of 'a'"),
        ('{"prompt": "x", "scores": {"a": true, "b": 1}}', "score of 'a'"),
        ('{"prompt": "x", "scores": {"a": "1", "b": 1}}', "score of 'a'"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(TableError) as caught:
        read_scores(write(tmp_path, f"{GOOD}\n{line}\n"))
    assert "scores.jsonl, line 3" in caught.value.message
    assert complaint in caught.value.message


def test_bytes_that_are_no_utf8_are_named_by_line(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="line 2: not UTF-8"):
        read_scores(write(tmp_path, GOOD.encode() + b'{"prompt": "\xff"}\n'))


def test_an_empty_and_a_missing_table_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no prompt"):
        read_scores(write(tmp_path, "\n"))
    with pytest.raises(TableError, match="cannot read"):
        read_scores(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("price", ["-1", '"1"', "null", "Infinity", "NaN", "true"])
def test_a_bad_price_is_named_by_model(tmp_path: Path, price: str) -> None:
    path = tmp_path / "prices.json"
    path.write_text(f'{{"a": {{"input_price": 1, "output_price": {price}}}}}')
    with pytest.raises(TableError, match="'a': 'output_price'"):
        read_prices(path)


def test_a_model_without_a_price_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"a": {"input_price": 1, "output_price": 2, "size": "7B"}}')
    prices = read_prices(path)
    assert (prices["a"].input, prices["a"].output) == (1, 2)
    with pytest.raises(TableError, match="'b'"):
        prices_for(("a", "b"), prices)


def test_a_prompt_is_recognised_again_but_for_outer_white_space() -> None:
    assert prompt_hash(" hi\n") == prompt_hash("hi") != prompt_hash("Hi")
