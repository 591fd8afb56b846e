"""Traffic is recorded as hashes, lengths and times, within bounds, and can be read and replayed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from gateway.bench_traffic import ended
from gateway.config import Traffic
from gateway.keys import load_secret
from gateway.traffic import FOLDER, TrafficRecorder, keyed_hash, traffic_key
from policies.traces import TraceError, read_trace
from policies.traffic import read_traffic
from replicas.protocol import ConfigError
from tests.gateway.conftest import Gateway, StartGateway, running

SECRET_WORDS = "the quarterly figures of Umbrella are to be kept from everyone " * 6


def ask(gateway: Gateway, text: str, count: int = 1) -> None:
    with gateway.http() as http:
        for _ in range(count):
            body = {"model": "gpt-fake", "prompt": text, "max_tokens": 7}
            assert http.post("/v1/completions", json=body).status_code == 200


def test_two_gateways_write_what_can_be_merged_and_no_word_of_a_prompt(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    began = time.time()
    gateway = start_gateway()
    ask(gateway, SECRET_WORDS, 2)
    with running(gateway.config_of_another(), gateway.key) as other:
        other.add()
        other.wait_ready(1)
        ask(other, SECRET_WORDS + "and another end")
    folder = tmp_path / FOLDER
    gateway.wait_until(lambda: len(read_traffic(folder)) == 3)
    files = list(folder.glob("*.jsonl"))
    assert len(files) == 2
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)
    written = "".join(file.read_text() for file in files)
    assert "quarterly" not in written
    assert "Umbrella" not in written
    first, again, longer = read_traffic(folder, since=began)
    assert (first.key, first.asked, first.model, first.status) == ("test", "gpt-fake", "fake", 200)
    assert (first.request.output_tokens, first.max_tokens, first.request.block_tokens) == (7, 7, 16)
    assert first.request.prefix_ids == again.request.prefix_ids
    shared = len(first.request.prefix_ids)
    assert longer.request.prefix_ids[: shared - 1] == first.request.prefix_ids[: shared - 1]
    assert again.cached_tokens > 0
    assert first.ttft_s is not None
    assert 0 < first.ttft_s < 5
    assert len(read_trace(folder)) == 3  # and `signalbox load run --trace` reads the same


def test_hashes_are_keyed_by_the_gateways_secret(tmp_path: Path) -> None:
    digest = b"d" * 16
    secret = load_secret(tmp_path)
    recorder = TrafficRecorder(Traffic(), tmp_path, "gw", secret)
    recorder.start()
    recorder.add(ended(1, (digest,)), "acme")
    recorder.close()
    [recorded] = read_traffic(tmp_path)
    assert recorded.request.prefix_ids == (int(keyed_hash(traffic_key(secret), digest), 16),)
    assert keyed_hash(traffic_key(b"another secret"), digest) != keyed_hash(traffic_key(secret), digest)
    assert digest.hex()[:16] not in next(tmp_path.glob("*.jsonl")).read_text()
    assert (recorded.team, recorded.key, recorded.cost) == ("acme", "nightly", 3 * 10 + 5 * 100)


def test_nothing_is_written_where_the_fleet_file_says_so(start_gateway: StartGateway, tmp_path: Path) -> None:
    ask(start_gateway(traffic=Traffic(record=False)), "hello")
    assert not (tmp_path / FOLDER).exists()


def test_the_oldest_files_go_when_there_is_too_much(tmp_path: Path) -> None:
    for number in range(6):
        old = tmp_path / f"gw-old-{number}.jsonl"
        old.write_text("x" * 200_000)
        os.utime(old, (time.time() - 100 + number, time.time() - 100 + number))
    ancient = tmp_path / "gw-ancient.jsonl"
    ancient.write_text("x")
    os.utime(ancient, (1, 1))
    recorder = TrafficRecorder(Traffic(max_mib=0.5, max_days=1), tmp_path, "gw", b"s" * 16)
    recorder.start()
    recorder.add(ended(1), "")
    recorder.close()
    left = sorted(path.name for path in tmp_path.glob("*.jsonl"))
    assert left == ["gw-000001.jsonl", "gw-old-4.jsonl", "gw-old-5.jsonl"]


def test_a_writer_that_cannot_write_drops_and_says_how_many(tmp_path: Path) -> None:
    folder = tmp_path / "traffic"
    recorder = TrafficRecorder(Traffic(), folder, "gw", b"s" * 16)
    recorder.start()
    folder.rmdir()
    recorder.add(ended(1), "")
    recorder.close()
    assert recorder.dropped == 1


def test_recording_costs_a_request_a_few_microseconds(tmp_path: Path) -> None:
    """Of the best batch: the bound is to catch work that slips onto the path, not a busy machine."""
    recorder = TrafficRecorder(Traffic(), tmp_path, "gw", b"s" * 16)
    hashes = (bytes(16),) * 300
    best = 1.0
    for _ in range(10):
        records = [ended(number, hashes) for number in range(100)]
        began = time.thread_time()
        for record in records:
            recorder.add(record, "acme")
        best = min(best, (time.thread_time() - began) / len(records))
    assert best < 10e-6


def test_the_line_that_a_killed_gateway_was_writing_is_left_out_and_a_broken_one_named(tmp_path: Path) -> None:
    line = json.dumps({"time": 5.0, "prompt_tokens": 3, "output_tokens": 2})
    torn = tmp_path / "a.jsonl"
    torn.write_text(f"{line}\n{line[:20]}")
    assert len(read_traffic(torn)) == len(read_trace(torn)) == 1
    broken = tmp_path / "b.jsonl"
    broken.write_text(f"{line}\n{line[:20]}\n{line}\n")
    for read in (read_traffic, read_trace):
        with pytest.raises(TraceError, match=r"b\.jsonl:2: not JSON"):
            read(broken)
    wrong = tmp_path / "c.jsonl"
    wrong.write_text(json.dumps({"time": 5.0, "prompt_tokens": 3, "output_tokens": 2, "status": "ok"}) + "\n")
    with pytest.raises(TraceError, match=r"c\.jsonl:1: status cannot be 'ok'"):
        read_traffic(wrong)


def test_bounds_that_keep_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_mib"):
        Traffic(max_mib=0)
