"""What the host-memory tier brings to conversations that outgrow the KV pool: time to first token with and without it.

    python -m replicas.engine.bench_host_cache --model PATH

Conversations take turns, one request at a time: each turn sends all that was said so far and some new tokens, and by
the time a conversation comes round again the others have taken its blocks in the pool. Two engines share one copy of
the weights and have pools of the same size; one of them has a host cache. They take turns too, request by request and
the first one alternating, so that a busy machine meets both. Both must answer alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from dataclasses import dataclass, field, replace

from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.loading import load
from replicas.protocol import GenerateRequest, SamplingParams, SignalboxError


@dataclass(slots=True)
class Side:
    """One engine and its share of the work. first, again: seconds to first token of a conversation's first turn and of
    later ones; cached: of all tokens of later prompts, those that were not computed."""

    engine: Engine
    conversations: list[list[int]]
    first: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    asked: int = 0
    cached: int = 0

    def turn(self, number: int, said: list[int], output: int) -> None:
        """The conversation goes on with `said` and the answer to it."""
        conversation = self.conversations[number]
        new = not conversation
        conversation += said
        asked = len(conversation)
        params = SamplingParams(max_tokens=output, temperature=0, ignore_eos=True)
        started, ttft = time.perf_counter(), 0.0
        self.engine.add(GenerateRequest(request_id="bench", prompt_token_ids=tuple(conversation), sampling=params))
        while self.engine.has_work():
            for chunk in self.engine.step():
                ttft = ttft or time.perf_counter() - started
                conversation += chunk.token_ids
                if chunk.usage is not None and not new:
                    self.asked += asked
                    self.cached += chunk.usage.cached_tokens
        (self.first if new else self.again).append(ttft)


def run(sides: tuple[Side, Side], args: argparse.Namespace) -> None:
    """All turns of all conversations, on both sides in turn."""
    rng = random.Random(args.seed)
    vocab = sides[0].engine.card.vocab_size
    for turn in range(args.turns):
        for number in range(args.conversations):
            said = [rng.randrange(vocab) for _ in range(args.say if turn else args.prompt)]
            for side in sides if (turn + number) % 2 else reversed(sides):
                side.turn(number, said, args.output)


def arguments() -> argparse.ArgumentParser:
    default = EngineConfig(model="")
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.bench_host_cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="model folder or .gguf file")
    parser.add_argument("--conversations", type=int, default=12, help="at once (12)")
    parser.add_argument("--turns", type=int, default=4, help="of each (4)")
    parser.add_argument("--prompt", type=int, default=384, help="tokens of a first turn (384)")
    parser.add_argument("--say", type=int, default=32, help="new tokens of a later turn (32)")
    parser.add_argument("--output", type=int, default=16, help="tokens of an answer (16)")
    parser.add_argument("--pool-tokens", type=int, default=1536, help="tokens that the KV pool holds (1536)")
    parser.add_argument("--host-cache-gib", type=float, default=1.0, help="host memory (1.0)")
    parser.add_argument(
        "--kv-cache-dtype", default=default.kv_cache_dtype, help="auto, int8, fp8_e4m3 or fp8_e4m3_head"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (0)")
    return parser


def bench(args: argparse.Namespace) -> None:
    plain = EngineConfig(
        model=args.model,
        kv_cache_dtype=args.kv_cache_dtype,
        num_threads=args.threads,
        max_num_seqs=1,
    )
    plain = replace(plain, num_blocks=-(-args.pool_tokens // plain.block_size))
    loaded = load(plain)
    off, on = (
        Side(Engine(config, loaded), [[] for _ in range(args.conversations)])
        for config in (plain, replace(plain, host_cache_gib=args.host_cache_gib))
    )
    for side in (off, on):  # memory and kernels are touched for the first time
        side.engine.generate([[1] * args.prompt], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    run((off, on), args)
    held = on.engine.config.block_size * on.engine.pool.num_blocks
    told = sum(len(conversation) for conversation in on.conversations)
    print(f"{args.conversations} conversations of {told / args.conversations:.0f} tokens, a pool of {held} tokens")
    print(f"{'':12}{'first turn':>12}{'later turns':>14}{'p95':>10}{'cached':>9}")
    for name, side in (("off", off), ("host cache", on)):
        later = sorted(side.again)
        p95 = later[min(int(0.95 * len(later)), len(later) - 1)]
        print(
            f"{name:12}{statistics.median(side.first) * 1e3:9.0f} ms{statistics.median(later) * 1e3:11.1f} ms"
            f"{p95 * 1e3:7.0f} ms{side.cached / side.asked:9.1%}"
        )
    ratios = [mine / theirs for mine, theirs in zip(off.again, on.again, strict=True)]
    print(f"a later turn's first token {statistics.median(ratios):.2f}x sooner (median of {len(ratios)} pairs)")
    stats, host = on.engine.stats(), on.engine.pool.host
    assert host is not None, "an engine was asked for with a host cache and has none"
    print(
        f"{stats.host_cache_offloaded_blocks} blocks offloaded, {stats.host_cache_fetched_blocks} fetched; copies at "
        f"{host.rule.copy_rate / 1e9:.2f} GB/s after {host.rule.overhead_s * 1e6:.0f} us, prompts at "
        f"{host.rule.prefill_rate:.0f} tokens/s = {host.rule.prefill_rate * loaded.kv_bytes_per_token / 1e9:.3f} GB/s"
    )
    wrong = sum(mine != theirs for mine, theirs in zip(off.conversations, on.conversations, strict=True))
    print(f"conversations whose answers differ: {wrong}")


def main() -> int:
    args = arguments().parse_args()
    try:
        bench(args)
    except SignalboxError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
