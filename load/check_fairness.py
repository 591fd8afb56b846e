"""What one key's flood does to another key's time to first token, live: an instance is started, measured, taken down.

    python -m load.check_fairness
    python -m load.check_fairness --model smollm2-135m-instruct --rate 0.4 --requests 40

Two keys send to one replica in an open loop (Poisson), both at `--rate`; then the second one at `--flood` times that,
and so on in turn, so that a machine that becomes slower does so in both. Every prompt is different. Counted are the
first key's answers: TTFT from the scheduled send time. Refusals of the flood (429, 503) are what it is meant to get.

Exit status: 0 p95 under the flood is at most `--limit` times the calm one · 1 it is more, or the first key's requests
failed · 2 cannot begin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from load.http1 import Pool, clock, parse_url, resolve, with_body
from load.loop import run
from load.own_instance import instance
from load.plan import Target
from load.record import Answer, Record
from load.units import LoadError
from load.workload import Ask

_FAKE = """
models:
  - name: fake
    engine: fake
    num_cpus: 0.5
    engine_settings: {{tokens_per_s: {tokens_per_s:g}, prefill_tokens_per_s: {prefill:g}, max_num_seqs: {seats}}}
gateway: {{host: 127.0.0.1}}
"""
_REAL = """
models:
  - name: {model}
    source: {model}
    num_cpus: 1
    engine_settings: {{max_num_seqs: {seats}}}
gateway: {{host: 127.0.0.1}}
"""


@dataclass
class Phase:
    """ttft_s: of the first key's answers. failed: why its other requests brought none. flood: answers of the other."""

    ttft_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    flood: int = 0
    refused: int = 0


async def send(
    target: Target, pool: Pool, rate: float, seconds: float, args: argparse.Namespace, seed: int
) -> list[Record]:
    """One key's requests of one phase; returns when all have ended."""
    rng, began = random.Random(seed), clock()
    records: list[Record] = []
    pending: list[asyncio.Future[None]] = []
    head = target.head()
    due = rng.expovariate(rate)
    while due < seconds:
        await asyncio.sleep(max(began + due - clock(), 0))
        words = " ".join(str(rng.randrange(10_000)) for _ in range(args.prompt_words))
        record = Record(len(records), 0, began + due, args.prompt_words, args.max_tokens)
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        answer = Answer(record, lambda _, __, over=over: over.set_result(None), asked_stream=True)  # type: ignore[misc]
        record.begun = clock()
        body = target.body(Ask(words, args.prompt_words, args.max_tokens))
        answer.hang_up = pool.send(with_body(head, body), answer).cancel
        records.append(record)
        pending.append(over)
        due += rng.expovariate(rate)
    await asyncio.gather(*pending)
    return records


async def measure(base_url: str, keys: Sequence[str], args: argparse.Namespace) -> dict[bool, Phase]:
    origin = parse_url(base_url)
    targets = [Target(origin, args.model, api_key=key, ignore_eos=True) for key in keys]
    pools = [Pool(origin, resolve(origin)) for _ in keys]
    found = {False: Phase(), True: Phase()}
    seconds = args.requests / args.rate / args.turns
    try:
        for turn in range(-1, 2 * args.turns):  # the first one warms up
            flooded = turn % 2 == 1 and turn > 0
            second = args.rate * (args.flood if flooded else 1.0)
            span = min(seconds, 5.0) if turn < 0 else seconds
            first, other = await asyncio.gather(
                send(targets[0], pools[0], args.rate, span, args, args.seed + turn // 2),
                send(targets[1], pools[1], second, span, args, args.seed + 1000 + turn),
            )
            if turn >= 0:
                phase = found[flooded]
                phase.ttft_s += [one.first - one.scheduled for one in first if not one.error]
                phase.failed += [f"{one.error}: {one.detail}" for one in first if one.error]
                phase.flood += sum(not one.error for one in other)
                phase.refused += sum(one.status in (429, 503) for one in other)
    finally:
        for pool in pools:
            await pool.close()
    return found


def ratio(calm: Sequence[float], flooded: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """p95 over p95, with its 95 % interval by the bootstrap (Efron 1979, percentile method)."""
    rng = np.random.default_rng(0)
    samples = [np.asarray(values) for values in (calm, flooded)]
    low, high = (np.percentile(rng.choice(one, (draws, len(one))), 95, axis=1) for one in samples)
    value = float(np.percentile(samples[1], 95) / np.percentile(samples[0], 95))
    return (value, *(float(q) for q in np.percentile(high / low, (2.5, 97.5))))  # type: ignore[return-value]


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load.check_fairness", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="fake", help="fake, or a model of `signalbox models list` (default fake)")
    parser.add_argument("--rate", type=float, default=6.0, help="of each key, requests a second (default 6)")
    parser.add_argument("--flood", type=float, default=10.0, help="times its share that the second key sends")
    parser.add_argument("--requests", type=int, default=240, help="of the first key in each kind of phase")
    parser.add_argument("--turns", type=int, default=4, help="phases of each kind")
    parser.add_argument("--prompt-words", type=int, default=24, help="numbers in a prompt, about four tokens each")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--seats", type=int, default=16, help="max_num_seqs of the replica")
    parser.add_argument("--tokens-per-s", type=float, default=20.0, help="of each choice of the fake engine")
    parser.add_argument("--prefill-tokens-per-s", type=float, default=2500.0, help="of the fake engine")
    parser.add_argument("--limit", type=float, default=1.2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    chosen = parser.parse_args(arguments)
    if not chosen.rate > 0 or min(chosen.requests, chosen.turns, chosen.prompt_words, chosen.max_tokens) < 1:
        parser.error("--rate, --requests, --turns, --prompt-words and --max-tokens must be above 0")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    args = options(arguments)
    plan = _FAKE if args.model == "fake" else _REAL
    fleet = plan.format(
        model=args.model, seats=args.seats, tokens_per_s=args.tokens_per_s, prefill=args.prefill_tokens_per_s
    )
    try:
        with instance(fleet, "first", "second") as served:
            found = run(measure(served.base_url, [*served.keys.values()], args))
    except LoadError as error:
        print(f"check_fairness: {error}", file=sys.stderr)
        return 2
    calm, flood = found[False], found[True]
    if not calm.ttft_s or not flood.ttft_s:
        print(f"check_fairness: no answers: {(calm.failed + flood.failed)[:3]}", file=sys.stderr)
        return 1
    value, low, high = ratio(calm.ttft_s, flood.ttft_s)
    for name, phase in (("both at their shares", calm), (f"the other at {args.flood:g} times", flood)):
        p50, p95 = np.percentile(phase.ttft_s, (50, 95)) * 1e3
        print(
            f"{name:24} {len(phase.ttft_s):5} answers, TTFT p50 {p50:7.1f} ms, p95 {p95:7.1f} ms, "
            f"{len(phase.failed)} failed; the other key: {phase.flood} answers, {phase.refused} refused"
        )
    print(f"p95 ratio {value:.2f} (95 % interval {low:.2f} to {high:.2f}), at most {args.limit:g} is asked")
    failed = calm.failed + flood.failed
    for one in failed[:5]:
        print(f"FAILED {one}")
    if args.json:
        figures = {"ratio": value, "low": low, "high": high, "calm_ttft_s": calm.ttft_s, "flood_ttft_s": flood.ttft_s}
        args.json.write_text(json.dumps(figures) + "\n")
    return 1 if failed or value > args.limit else 0


if __name__ == "__main__":
    sys.exit(main())
