"""The journal keeps what was produced until it is on the books, through the death of whoever wrote it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.journal import Journal, JournalLimits, read_folder
from replicas.journal_records import Entry, Outcome
from replicas.protocol import Chunk, Timing, Usage

USED = Usage(prompt_tokens=8, completion_tokens=5, cached_tokens=2)
AT_ONCE = JournalLimits(progress_s=0.0)


def finished(id: str, gateway: str = "gw") -> Entry:
    return Entry(
        gateway_id=gateway,
        request_id=id,
        prompt_tokens=8,
        cached_tokens=2,
        completion_tokens=5,
        outcome=Outcome.FINISHED,
        note="who pays",
    )


def one(journal: Journal, id: str, gateway: str = "gw") -> None:
    journal.begin(gateway, id, 8, "who pays")
    journal.progress(id, 5)
    journal.end(id, USED)
    journal.flush()


def test_a_gateway_reads_its_own_until_it_acknowledges(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r1")
    one(journal, "a")
    one(journal, "b")
    one(journal, "c", "other")
    assert journal.read("gw") == [finished("a"), finished("b")]
    journal.acknowledge(["a", "never heard of", "a"])  # twice in one list once ended the engine's thread
    assert journal.read("gw") == [finished("b")]
    assert journal.read("other") == [finished("c", "other")]
    journal.close()


def test_an_aborted_request_has_what_it_had_made(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r1")
    for id, tokens in (("some", 3), ("none", 0)):
        journal.begin("gw", id, 8)
        journal.progress(id, tokens)
        journal.end(id)
    some, none = journal.read("gw")
    assert some.outcome is none.outcome is Outcome.ABORTED
    assert some.usage == Usage(prompt_tokens=8, completion_tokens=3)
    assert none.usage == Usage(prompt_tokens=0, completion_tokens=0)
    journal.close()


def test_cached_tokens_are_known_from_the_first_token_on(tmp_path: Path) -> None:
    dead = Journal(tmp_path, "r1", JournalLimits(bytes=150))
    for id in ("aborted", "lost"):
        dead.begin("gw", id, 8, "note")
        timing = Timing(queued_s=0.0, prefill_s=0.0, cached_tokens=4)
        dead.saw(Chunk(request_id=id, token_ids=(1,), timing=timing))
        dead.flush()
    dead.end("aborted")
    dead.close()
    heir = Journal(tmp_path, "r2")
    assert {e.request_id: e.usage for e in heir.read("gw")} == dict.fromkeys(
        ("aborted", "lost"), Usage(prompt_tokens=8, completion_tokens=1, cached_tokens=4)
    )
    heir.close()


def test_running_requests_show_what_they_have_made_and_cannot_be_acknowledged(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r1", AT_ONCE)
    journal.begin("gw", "a", 8)
    journal.progress("a", 4)
    journal.flush()
    journal.acknowledge(["a"])
    (entry,) = journal.read("gw")
    assert (entry.outcome, entry.completion_tokens) == (Outcome.RUNNING, 4)
    assert read_folder(tmp_path, "gw") == [entry]
    journal.close()


def test_the_next_journal_adopts_what_a_dead_one_left(tmp_path: Path) -> None:
    dead = Journal(tmp_path, "r1", AT_ONCE)
    one(dead, "a")
    dead.begin("gw", "half", 8)
    dead.progress("half", 2)
    dead.flush()
    dead.close()
    heir = Journal(tmp_path, "r2")
    a, half = heir.read("gw")
    assert a == finished("a")
    assert (half.outcome, half.completion_tokens) == (Outcome.LOST, 2)
    heir.acknowledge(["a", "half"])
    heir.close()
    assert [path.name for path in tmp_path.iterdir()] == ["r2.journal"]
    last = Journal(tmp_path, "r3")
    assert last.owners("gw") == ("r3", "r1", "r2")
    last.close()


def test_a_journal_that_lost_something_does_not_claim_to_hold_everything(tmp_path: Path) -> None:
    forgetful = Journal(tmp_path, "r1", JournalLimits(entries=1))
    for id in "ab":
        one(forgetful, id)
    one(forgetful, "c", "other")
    assert forgetful.owners("gw") == ()
    forgetful.close()
    heir = Journal(tmp_path, "r0")
    assert heir.owners("gw") == ()
    assert heir.owners("third") == ("r0", "r1")
    heir.close()
    with (tmp_path / "r0.journal").open("r+b") as file:
        file.truncate((tmp_path / "r0.journal").stat().st_size - 1)
    last = Journal(tmp_path, "r2")
    assert last.owners("third") == ("r2", "r1"), "of a torn file nobody knows what was in it"
    last.close()


def test_a_living_journal_is_not_adopted(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, "r1"), Journal(tmp_path, "r2")
    one(first, "a")
    assert second.claim() == []
    assert second.read("gw") == []
    first.close()
    assert second.inherit(second.claim()) == 1
    assert second.owners("gw") == ("r2", "r1")
    assert second.read("gw") == [finished("a")]
    second.close()


def test_acknowledgements_outlive_the_process(tmp_path: Path) -> None:
    dead = Journal(tmp_path, "r1")
    one(dead, "a")
    one(dead, "b")
    dead.acknowledge(["a"])
    dead.close()
    heir = Journal(tmp_path, "r2")
    assert heir.read("gw") == [finished("b")]
    heir.acknowledge(["b"])
    heir.close()


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), garbage=st.binary(max_size=40))
def test_a_torn_end_costs_only_what_was_torn(
    cut: int, garbage: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A file cut anywhere and continued by anything reads as a beginning of what was written."""
    folder = tmp_path_factory.mktemp("torn")
    journal = Journal(folder, "r1")
    whole = [f"request-{number}" for number in range(6)]
    for id in whole:
        one(journal, id)
    path = folder / "r1.journal"
    data = path.read_bytes()
    journal.close()
    path.write_bytes(data[: cut % (len(data) + 1)] + garbage)
    found = read_folder(folder, "gw")
    assert [entry.request_id for entry in found] == whole[: len(found)]
    assert all(entry.outcome is Outcome.FINISHED for entry in found[:-1])
    assert len(found) >= cut % (len(data) + 1) // (len(data) // 6 + 1)


def test_the_file_stays_bounded_and_loses_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "r1", JournalLimits(bytes=4000, progress_s=0.0))
    journal.begin("gw", "running", 8)
    journal.progress("running", 1)
    for number in range(500):
        one(journal, f"r{number}")
        if number >= 10:
            journal.acknowledge([f"r{number - 10}"])
    journal.flush()
    assert (tmp_path / "r1.journal").stat().st_size < 8000
    ids = {"running", *(f"r{number}" for number in range(490, 500))}
    assert {entry.request_id for entry in journal.read("gw")} == ids
    assert {entry.request_id for entry in read_folder(tmp_path, "gw")} == ids
    other = Journal(tmp_path, "r2")
    assert len(other) == 0, "the lock was lost when the file was written anew"
    other.close()
    journal.close()


def test_entries_are_bounded_and_the_oldest_ended_go_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path, "r1", JournalLimits(entries=3))
    journal.begin("gw", "running", 8)
    for id in "abcd":
        one(journal, id)
    assert [entry.request_id for entry in journal.read("gw")] == ["running", "c", "d"]
    assert journal.dropped == 2
    assert "forgotten" in caplog.text
    journal.close()


def test_a_full_disk_does_not_stop_serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, "r1")
    real_write = os.write

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    one(journal, "a")
    assert journal.read("gw") == [finished("a")]
    monkeypatch.setattr(os, "write", real_write)
    one(journal, "b")
    assert read_folder(tmp_path, "gw") == [finished("a"), finished("b")]
    journal.close()


def test_what_was_flushed_survives_kill_9(tmp_path: Path) -> None:
    program = """
import sys
from pathlib import Path
from replicas.journal import Journal, JournalLimits
from replicas.protocol import Usage
journal = Journal(Path(sys.argv[1]), "r1", JournalLimits(progress_s=0.0))
count = 0
while True:
    count += 1
    journal.begin("gw", f"r{count}", 8)
    journal.progress(f"r{count}", 5)
    journal.end(f"r{count}", Usage(prompt_tokens=8, completion_tokens=5))
    journal.flush()
    print(count, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = 0
        while told < 200:
            told = int(child.stdout.readline())
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read().split()
    known = max([told, *map(int, rest)])
    heir = Journal(tmp_path, "r2")
    ended = [entry for entry in heir.read("gw") if entry.outcome is Outcome.FINISHED]
    assert len(ended) >= known, "a request whose end was told is missing"
    heir.acknowledge([entry.request_id for entry in heir.read("gw")])
    heir.close()
