"""The recount after a kill sees what it is there to see. tests/deploy/test_budgets_live.py runs the whole check."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from load.books import Books, Row, Watch, breaches
from load.check_budgets import ALLOWED, PRICE, TOKENS, document, options
from load.kills import GATEWAY, WITH_JOURNAL, WITH_REPLICA, Answered, Round, judge
from load.live_client import Reply
from policies.document import FleetNames, parse

ROW = Row("a", "kills", "settled", "gateway", 10, 40, 7, 31, 0, 130, 0)
LOST = replace(ROW, source="reserved", completion_tokens=40, cost=130, estimated=1)
AGAIN = replace(ROW, state="released", source="compared", completion_tokens=0, cost=0, unbilled=7)
CUT = replace(ROW, source="cut", unbilled=1)


def answer(stream: bool, tokens: int, most: int = 7, done: bool = True) -> Answered:
    whole = json.dumps({"usage": {"completion_tokens": tokens}}).encode()
    body = b"data: " + whole + b"\n\ndata: [DONE]\n\n" * done if stream else whole
    return Answered(stream, most, Reply(0.0, 1.0, 200, {}, body))


def judged(rows: list[Row], made: dict[str, int], answers: tuple[Answered, ...] = (), victims: str = GATEWAY) -> Round:
    found = Round(victims)
    judge(found, answers, rows, made)
    return found


@pytest.mark.parametrize(
    ("rows", "made", "victims", "complaint"),
    [
        ([ROW], {"a": 7}, GATEWAY, ""),
        ([replace(ROW, source="journal")], {"a": 7}, GATEWAY, ""),
        ([replace(ROW, source="journal")], {"a": 8}, GATEWAY, "8 tokens were made, 7 are on the books"),
        ([ROW], {"a": 7, "b": 1}, GATEWAY, "b: 1 tokens were made and are not on the books"),
        ([replace(ROW, state="released", completion_tokens=0, cost=0)], {"a": 7}, GATEWAY, "0 are on the books"),
        ([LOST], {"a": 7}, WITH_JOURNAL, ""),
        ([LOST], {"a": 7}, GATEWAY, "charged as reserved"),
        ([LOST], {"a": 7}, WITH_REPLICA, "charged as reserved"),
        ([replace(LOST, cost=31)], {"a": 7}, WITH_JOURNAL, "charged as reserved"),
        ([replace(LOST, estimated=0)], {"a": 7}, WITH_JOURNAL, "charged as reserved"),
        ([replace(ROW, estimated=1)], {"a": 7}, GATEWAY, "marked as estimated"),
        ([AGAIN], {"a": 7}, WITH_REPLICA, ""),  # the answer began again elsewhere: the house pays
        ([AGAIN], {"a": 8}, WITH_REPLICA, ""),  # of the step in which it died: written nowhere
        ([AGAIN], {"a": 9}, WITH_REPLICA, "9 tokens were made, 7 are on the books"),
        ([AGAIN], {"a": 8}, GATEWAY, "8 tokens were made, 7 are on the books"),
        ([CUT], {"a": 8}, WITH_REPLICA, ""),
        ([CUT], {"a": 10}, WITH_REPLICA, "10 tokens were made, 8 are on the books"),
        ([CUT], {"a": 9}, WITH_JOURNAL, ""),  # marked, as nothing is left that could tell
        ([CUT], {"a": 7}, WITH_JOURNAL, "7 tokens were made, 8 are on the books"),
        ([ROW], {"a": 9}, WITH_JOURNAL, "9 tokens were made, 7 are on the books"),
    ],
)
def test_books_are_held_against_the_engines_count(
    rows: list[Row], made: dict[str, int], victims: str, complaint: str
) -> None:
    violations = judged(rows, made, victims=victims).violations
    assert [complaint in violation for violation in violations] == [True] * bool(complaint), violations


@pytest.mark.parametrize("stream", [True, False])
def test_a_clean_end_must_be_a_whole_answer(stream: bool) -> None:
    assert judged([], {}, (answer(stream, 7),)).violations == []
    assert "a clean end after 5 of 7" in judged([], {}, (answer(stream, 5),)).violations[0]
    cut = replace(answer(stream, 7), reply=Reply(0.0, 1.0, 200, {}, b"", "cut: the connection broke"))
    found = judged([], {}, (cut,))
    assert (found.violations, found.cut) == ([], 1)


def test_a_stream_without_its_end_and_an_odd_status_are_told() -> None:
    assert "not whole" in judged([], {}, (answer(True, 7, done=False),)).violations[0]
    odd = Answered(True, 7, Reply(0.0, 1.0, 429, {}, b"{}"))
    assert "an answer of 429" in judged([], {}, (odd,)).violations[0]


def test_the_document_allows_exactly_fifty() -> None:
    budgets = parse(document(60), names=FleetNames(("fake",))).budgets
    by_key = {budget.key: budget for budget in budgets}
    assert by_key["whole-tokens"].tokens == ALLOWED * (60 + TOKENS)
    cost = (60 * PRICE["input"] + TOKENS * PRICE["output"]) / 1e6
    assert float(by_key["streamed-usd"].usd or 0) == pytest.approx(ALLOWED * cost)


def test_the_watch_sees_a_cap_that_is_passed(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with sqlite3.connect(file) as connection:
        connection.execute(
            "CREATE TABLE ledger_accounts (account, spent_usd, reserved_usd, cap_usd, spent_tokens, reserved_tokens,"
            " cap_tokens)"
        )
        connection.execute("INSERT INTO ledger_accounts VALUES ('a', 60, 50, 100, 1, 1, 2)")
    connection.close()
    with Watch(f"sqlite:///{file}") as watch:
        while not watch.looks:
            pass
    assert "a: 60 + 50 pico-dollars of 100" in watch.breaches
    books = Books(f"sqlite:///{file}")
    assert len(breaches(books.accounts())) == 1
    books.close()


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert options(["--kills", "3", "--database", "sqlite"]).kills == 3
    with pytest.raises(SystemExit):
        options(["--kills", "-1"])
    assert "--kills must not be negative" in capsys.readouterr().err
