"""What one key's flood does to the others: the real scheduler and block pool, in virtual time.

    python -m replicas.engine.bench_fairness --keys 2 4 8 --load 0.5 0.7 0.9 0.95 --flood 10

Every key sends at random instants (Poisson), each at an equal part of `--load` times what the engine can do. Then all
over again with the first key sending `--flood` times its part, and once more with nobody but that key. A step costs
what a 135M-parameter model costs on two AVX2 cores; no model is run.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from replicas.engine.blocks import BlockPool
from replicas.engine.scheduler import Scheduler
from replicas.engine.sequence import Sequence
from replicas.engine.waiting import LineLimits
from replicas.protocol import GenerateRequest, QueueFull, SamplingParams

STEP_S, DECODE_S, PREFILL_RATE = 0.006, 0.004, 450.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """One key's requests: so many a second, each with about so many tokens (half to one and a half times)."""

    per_s: float
    prompt_tokens: int = 120
    output_tokens: int = 60
    priority: int = 0


@dataclass(slots=True)
class Seen:
    """What became of one key's requests. ttft_s: of those answered; tokens: computed and generated for it."""

    ttft_s: list[float] = field(default_factory=list)
    refused: int = 0
    tokens: int = 0

    def p95(self) -> float:
        ordered = sorted(self.ttft_s)
        return ordered[int(0.95 * (len(ordered) - 1))] if ordered else float("nan")


@dataclass(slots=True)
class World:
    """A scheduler whose clock is turned by its own steps."""

    limits: LineLimits = field(default_factory=LineLimits)
    max_num_seqs: int = 32
    num_blocks: int = 2000
    block_size: int = 16
    budget: int = 256
    now: float = 0.0
    busy_s: float = 0.0

    def run(self, traffic: Mapping[str, Traffic], seconds: float, seed: int, *, blind: bool = False) -> dict[str, Seen]:
        """blind: the engine is not told whose requests they are."""
        pool = BlockPool(self.num_blocks, self.block_size)
        scheduler = Scheduler(
            pool,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.budget,
            watermark=0.01,
            limits=self.limits,
            clock=lambda: self.now,
        )
        seen = {key: Seen() for key in traffic}
        owners: dict[Sequence, tuple[str, float]] = {}
        coming = arrivals(traffic, seconds, seed)
        coming.reverse()
        while coming or scheduler.waiting or scheduler.running:
            if coming and not scheduler.waiting and not scheduler.running:
                self.now = max(self.now, coming[-1][0])
            while coming and coming[-1][0] <= self.now:
                at, key, request = coming.pop()
                if blind:
                    request = GenerateRequest(
                        request_id=request.request_id,
                        prompt_token_ids=request.prompt_token_ids,
                        sampling=request.sampling,
                    )
                try:
                    owners[self._add(scheduler, request)] = key, at
                except QueueFull:
                    seen[key].refused += 1
            self._step(scheduler, owners, seen)
        pool.check_integrity([])
        return seen

    def _add(self, scheduler: Scheduler, request: GenerateRequest) -> Sequence:
        scheduler.check(request)
        tokens = list(request.prompt_token_ids)
        seq = Sequence(request.request_id, 0, tokens, len(tokens), request.sampling, 0, b"root")
        seq.queued_tokens = len(tokens)
        scheduler.add(seq, request)
        return seq

    def _step(self, scheduler: Scheduler, owners: dict[Sequence, tuple[str, float]], seen: dict[str, Seen]) -> None:
        step = scheduler.schedule()
        seconds = STEP_S + step.num_prefill_tokens / PREFILL_RATE
        seconds += DECODE_S * sum(seq.num_computed + count == seq.num_tokens for seq, count in step.items)
        self.now += seconds
        self.busy_s += seconds
        scheduler.record(seconds, step)
        for seq, count in step.items:
            key, at = owners[seq]
            seen[key].tokens += count
            seq.num_computed += count
            if seq.num_computed < seq.num_tokens:
                continue
            seq.tokens.append(0)
            if seq.num_output == 1:
                seen[key].ttft_s.append(self.now - at)
            if seq.num_output == seq.sampling.max_tokens:
                scheduler.drop(seq)
                del owners[seq]


def arrivals(traffic: Mapping[str, Traffic], seconds: float, seed: int) -> list[tuple[float, str, GenerateRequest]]:
    """Every key's requests, from its own stream of random numbers: one key's rate changes nothing of the others'."""
    found = []
    for key, one in traffic.items():
        rng = random.Random(f"{seed}/{key}")
        at = rng.expovariate(one.per_s)
        while at < seconds:
            prompt = tuple(rng.randrange(1 << 30) for _ in range(around(rng, one.prompt_tokens)))
            sampling = SamplingParams(max_tokens=around(rng, one.output_tokens))
            request = GenerateRequest(
                request_id=f"{key}/{at}",
                prompt_token_ids=prompt,
                sampling=sampling,
                fair_key=key,
                priority=one.priority,
            )
            found.append((at, key, request))
            at += rng.expovariate(one.per_s)
    return sorted(found, key=lambda arrival: arrival[0])


def around(rng: random.Random, mean: int) -> int:
    return max(1, round(mean * rng.uniform(0.5, 1.5)))


def capacity(one: Traffic, seqs: int) -> float:
    """Requests a second that an engine with so many seats can do, all of them taken."""
    return 1 / (one.prompt_tokens / PREFILL_RATE + (one.output_tokens - 1) * (DECODE_S + STEP_S / seqs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument(
        "--load", type=float, nargs="+", default=[0.5, 0.9], help="of all keys together, at their shares"
    )
    parser.add_argument("--flood", type=float, default=10.0, help="times its share that the first key sends")
    parser.add_argument("--seconds", type=float, default=400.0, help="virtual")
    parser.add_argument("--prompt-tokens", type=int, default=120)
    parser.add_argument("--output-tokens", type=int, default=60)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--fair-reserve", type=float, default=LineLimits().fair_reserve)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print("p95 time to first token of the other keys, virtual seconds; tokens/s of the key that floods")
    print("keys  load    calm   flood  ratio   first come first served   flood's tokens/s beside others, alone")
    for keys in args.keys:
        for load in args.load:
            print(_row(args, keys, load), flush=True)


def _row(args: argparse.Namespace, keys: int, load: float) -> str:
    sizes = {"prompt_tokens": args.prompt_tokens, "output_tokens": args.output_tokens}
    share = capacity(Traffic(per_s=1.0, **sizes), args.max_num_seqs) * load / keys
    calm = {f"key-{i}": Traffic(per_s=share, **sizes) for i in range(keys)}
    flood = Traffic(per_s=share * args.flood, **sizes)

    def run(traffic: Mapping[str, Traffic], *, blind: bool = False) -> tuple[float, float]:
        """p95 of the others; tokens/s of the first key until everything has ended."""
        world = World(LineLimits(fair_reserve=args.fair_reserve), args.max_num_seqs)
        seen = world.run(traffic, args.seconds, args.seed, blind=blind)
        others = [ttft for key, one in seen.items() if key != "key-0" for ttft in one.ttft_s]
        return Seen(others).p95(), seen["key-0"].tokens / world.now

    (before, _), (after, beside) = run(calm), run({**calm, "key-0": flood})
    blind, alone = run({**calm, "key-0": flood}, blind=True)[0], run({"key-0": flood})[1]
    return (
        f"{keys:4}  {load:4.2f}  {before:6.2f}  {after:6.2f}  {after / before:4.2f}x"
        f"  {blind:9.2f} {blind / before:8.2f}x     {beside:17.0f} {alone:12.0f}"
    )


if __name__ == "__main__":
    main()
