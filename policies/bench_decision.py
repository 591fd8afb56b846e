"""How long one decision takes and what one index entry costs.

    python -m policies.bench_decision --replicas 64 --blocks 100000 --tokens 4000

A decision is everything the gateway does between a hashed prompt and a submission: the view, the index look-up, the
score of every replica, the reasoning kept for an explanation, and counting what was sent. Hashing is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from policies.affinity import affinity
from policies.fleet_view import FleetLoads, RouteRequest
from policies.prefix_index import PrefixIndex
from replicas.protocol import EngineStats, KVEvent, ReplicaState, ReplicaStatus, block_hash, prefix_root

_BLOCK_SIZE = 16
_PROMPTS = 200  # more than one, so that the look-ups are not all of warm memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Microseconds. cpu: of this thread alone, which the machine's other work does not lengthen."""

    p50_us: float
    p99_us: float
    cpu_p50_us: float
    cpu_p99_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    replicas: int
    blocks: int
    prompt_tokens: int
    decisions: int
    decision: Times
    lookup: Times
    hashing: Times
    event_us_per_block: float
    index_entries: int
    bytes_per_entry: float
    resident_bytes_per_entry: float


def measure(
    replicas: int, blocks: int, tokens: int, decisions: int, progress: Callable[[str], None] = lambda _: None
) -> Report:
    """Fill an index with `blocks` distinct blocks for each replica and time `decisions` over prompts of `tokens`.

    A third of the prompts is cached nowhere, the others on up to all replicas, each to a depth of its own.
    """
    rng = random.Random(0)
    prompts = [_prompt(number, tokens) for number in range(_PROMPTS)]
    loads = FleetLoads("gateway", prefixes=(index := PrefixIndex()))
    before, began = _resident_bytes(), time.perf_counter()
    for number in range(replicas):
        name = f"replica-{number}"
        loads.join(name, "1")
        loads.report(_status(name, rng))
        shared = _shares(prompts, rng, blocks)
        own = rng.randbytes(16 * (blocks - len(shared)))
        hashes = [*shared, *(own[start : start + 16] for start in range(0, len(own), 16))]
        index.apply(name, "1", 1, [KVEvent(kind="stored", hashes=tuple(hashes))])
        progress(f"index of {number + 1} of {replicas} replicas")
    filled_s = time.perf_counter() - began
    resident = _resident_bytes() - before
    assert index.dropped == 0, "the index is too small for this bench"
    names = loads.view().replica_ids

    def decide(number: int) -> None:
        prompt = prompts[number % _PROMPTS]
        decision = affinity(prompt, loads.view(), 0.0, rng)
        loads.sent(prompt, decision, 1)

    def look_up(number: int) -> None:
        index.leading(prompts[number % _PROMPTS].hashes, names)

    ids = list(range(tokens))

    def hash_prompt(number: int) -> None:
        _hashes(number, ids)

    return Report(
        replicas=replicas,
        blocks=blocks,
        prompt_tokens=tokens,
        decisions=decisions,
        decision=_time(decide, decisions),
        lookup=_time(look_up, decisions),
        hashing=_time(hash_prompt, max(100, decisions // 10)),
        event_us_per_block=filled_s / (replicas * blocks) * 1e6,
        index_entries=index.entries,
        bytes_per_entry=index.memory_bytes / (replicas * blocks),
        resident_bytes_per_entry=resident / (replicas * blocks),
    )


def _hashes(salt: int, ids: list[int]) -> tuple[bytes, ...]:
    parent, hashes = prefix_root("", str(salt)), []
    for start in range(0, len(ids) - _BLOCK_SIZE + 1, _BLOCK_SIZE):
        parent = block_hash(parent, ids[start : start + _BLOCK_SIZE])
        hashes.append(parent)
    return tuple(hashes)


def _prompt(number: int, tokens: int) -> RouteRequest:
    return RouteRequest(
        request_id=str(number),
        prompt_tokens=tokens,
        hashes=_hashes(number, list(range(tokens))),
        block_size=_BLOCK_SIZE,
    )


def _shares(prompts: list[RouteRequest], rng: random.Random, blocks: int) -> list[bytes]:
    """What one replica holds of the prompts: of two in three of them some part, of a few the whole."""
    held: list[bytes] = []
    for number, prompt in enumerate(prompts):
        if number % 3 and len(held) + len(prompt.hashes) <= blocks:
            held += prompt.hashes[: min(len(prompt.hashes), rng.randrange(len(prompt.hashes) + 50))]
    return held


def _status(name: str, rng: random.Random) -> ReplicaStatus:
    stats = EngineStats(
        num_requests_running=rng.randrange(64),
        num_requests_waiting=rng.randrange(8),
        queued_tokens=rng.randrange(20_000),
        kv_blocks_total=100_000,
        kv_blocks_free=rng.randrange(100_000),
        prefill_rate=rng.uniform(5e3, 5e4),
        decode_step_s=rng.uniform(0.01, 0.05),
        block_release_rate=rng.uniform(100, 1000),
    )
    return ReplicaStatus(replica_id=name, incarnation="1", model="m", state=ReplicaState.READY, stats=stats)


def _time(action: Callable[[int], None], count: int) -> Times:
    wall, cpu = np.zeros(count), np.zeros(count)
    for number in range(-min(count, 100), count):  # the first ones warm up and are overwritten
        cpu_began, began = time.thread_time(), time.perf_counter()
        action(number)
        wall[number], cpu[number] = time.perf_counter() - began, time.thread_time() - cpu_began
    (p50, p99), (cpu_p50, cpu_p99) = (np.percentile(times * 1e6, (50, 99)).tolist() for times in (wall, cpu))
    return Times(p50_us=p50, p99_us=p99, cpu_p50_us=cpu_p50, cpu_p99_us=cpu_p99)


def _resident_bytes() -> int:
    """Resident memory now; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0


def _table(report: Report) -> str:
    lines = [
        f"{report.replicas} replicas x {report.blocks} blocks, prompts of {report.prompt_tokens} tokens, "
        f"{report.decisions} decisions",
        f"{'':24}{'p50':>10}{'p99':>10}{'cpu p50':>10}{'cpu p99':>10}   microseconds",
    ]
    for name, times in (
        ("decision", report.decision),
        ("  of it index look-up", report.lookup),
        ("hashing (not in it)", report.hashing),
    ):
        cells = (times.p50_us, times.p99_us, times.cpu_p50_us, times.cpu_p99_us)
        lines.append(f"{name:24}" + "".join(f"{cell:10.0f}" for cell in cells))
    lines.append(
        f"index: {report.bytes_per_entry:.1f} bytes per (block, replica), {report.index_entries} distinct blocks,"
    )
    lines.append(f"       {report.resident_bytes_per_entry:.1f} by the growth of the process")
    lines.append(f"       {report.event_us_per_block:.1f} us to take in one stored block")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m policies.bench_decision", description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=100_000, help="cached blocks of each replica")
    parser.add_argument("--tokens", type=int, default=4000, help="tokens of a prompt")
    parser.add_argument("--decisions", type=int, default=5000)
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if min(args.replicas, args.blocks, args.decisions) < 1 or args.tokens < _BLOCK_SIZE:
        parser.error(f"every number must be positive, and a prompt at least {_BLOCK_SIZE} tokens")
    show = _show_progress if sys.stderr.isatty() else lambda _: None
    report = measure(args.replicas, args.blocks, args.tokens, args.decisions, show)
    print(_table(report))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(asdict(report), file, indent=2)


def _show_progress(text: str) -> None:
    print(f"\r{text}", end="\r", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
