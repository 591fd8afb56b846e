"""What a simulation costs, by its size: the same traffic on the same fleet, ten times as long each time.

    python -m policies.bench_simulator --requests 10000 100000 1000000 --replicas 1000

Each size runs in a process of its own, so that its peak memory is its own. The traffic is chat sessions that begin as a
Poisson process: every turn repeats what was said and adds to it, over one of 64 system prompts. It is made as it is
needed. CPU seconds are of one core and include making the traffic; virtual time is what they simulate.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

from policies.peers import POLICIES
from policies.sim_fleet import Fleet, SimRequest
from policies.sim_replica import ReplicaModel
from policies.simulator import simulate
from replicas.protocol import block_hash, prefix_root

# A replica near one GPU with a model of some billion parameters: the fleet is to be busy, not idle.
MODEL = ReplicaModel(
    num_blocks=8000, prefill_rate=8000.0, step_s=0.012, decode_s=0.0004, max_num_batched_tokens=2048, max_num_seqs=128
)
_SYSTEM_PROMPTS, _SYSTEM_BLOCKS, _BLOCK = 64, 8, 16
_TURNS = 5.0


def chat_sessions(rate: float, *, seed: int = 0) -> Iterator[SimRequest]:
    """Endless requests in the order of time, `rate` a second in the long run."""
    rng = random.Random(seed)
    root = prefix_root("", "scale")
    systems = [_extended((), root, 10_000_000 + n, _SYSTEM_BLOCKS) for n in range(_SYSTEM_PROMPTS)]
    turns: list[tuple[float, int, int, tuple[bytes, ...]]] = []  # (when, session, how many more, what was said)
    names = itertools.count()
    begins = 0.0
    while True:
        while not turns or begins <= turns[0][0]:
            begins += rng.expovariate(rate / _TURNS)
            count = rng.randrange(1, int(2 * _TURNS))
            heapq.heappush(turns, (begins, next(names), count, rng.choice(systems)))
        at, session, more, said = heapq.heappop(turns)
        said = _extended(said, root, session, rng.randrange(2, 14))
        yield SimRequest(at, len(said) * _BLOCK + 7, rng.randrange(16, 240), said, root)
        if more > 1:
            heapq.heappush(turns, (at + rng.uniform(8.0, 90.0), session, more - 1, said))


def _extended(said: tuple[bytes, ...], root: bytes, name: int, blocks: int) -> tuple[bytes, ...]:
    chain = list(said)
    for number in range(len(said), len(said) + blocks):
        tokens = (name & 0x7FFFFFFF, number, *([0] * (_BLOCK - 2)))
        chain.append(block_hash(chain[-1] if chain else root, tokens))
    return tuple(chain)


def measure(requests: int, replicas: int, policy: str, rate: float, seed: int = 0) -> dict[str, float]:
    """One size, in this process. rate: requests a second to each replica."""
    began = time.process_time()
    fleet = Fleet(replicas=replicas, gateways=2, model=MODEL)
    traffic = itertools.islice(chat_sessions(rate * replicas, seed=seed), requests)
    result = simulate(traffic, policy, fleet, seed=seed)
    seconds = time.process_time() - began
    assert result.completed == requests, "a request of the benchmark did not complete"
    return {
        "requests": requests,
        "replicas": replicas,
        "cpu_s": seconds,
        "us_per_request": seconds / requests * 1e6,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "virtual_s": result.duration_s,
        "output_tokens": result.output_tokens,
        "events": result.events,
        "busy": sum(share.busy for share in result.replicas) / replicas,
        "hit_rate": result.hit_rate,
        "ttft_p95_s": result.ttft(95),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--policy", choices=POLICIES, default="affinity")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second to each replica (1.0)")
    parser.add_argument("--one", action="store_true", help="measure one size in this process and print JSON")
    args = parser.parse_args()
    if min(*args.requests, args.replicas, args.rate) <= 0:
        parser.error("sizes and rate must be positive")
    if args.one:
        print(json.dumps(measure(args.requests[0], args.replicas, args.policy, args.rate)))
        return 0
    columns = ("requests", "CPU s", "us/request", "peak GiB", "virtual s", "events", "busy", "hit rate", "p95 TTFT s")
    print("  ".join(name.rjust(10) for name in columns))
    for size in args.requests:
        own = ["--requests", str(size), "--replicas", str(args.replicas), "--policy", args.policy]
        command = [sys.executable, "-m", "policies.bench_simulator", *own, "--rate", str(args.rate), "--one"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            print(ran.stderr, file=sys.stderr)
            return 1
        f = json.loads(ran.stdout)
        cells = [f"{size}", f"{f['cpu_s']:.1f}", f"{f['us_per_request']:.0f}", f"{f['peak_gib']:.2f}"]
        cells += [f"{f['virtual_s']:.0f}", f"{f['events']}", f"{f['busy']:.3f}", f"{f['hit_rate']:.3f}"]
        print("  ".join(cell.rjust(10) for cell in [*cells, f"{f['ttft_p95_s']:.3f}"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
