"""What continuous batching and the prefix cache bring, on one engine in one run.

    python -m replicas.engine.bench_batching --model PATH --trace azure_2023_conv.csv

Continuous: requests enter as others leave, never more than --batch at once. Static: batches of --batch start and end
together, as before Orca (Yu et al. 2022): a slot whose request is done computes on until the longest of its batch is,
and only the tokens that were asked for count. Both do the same prompts with the same output lengths: column
GeneratedTokens of an Azure LLM inference trace, a random sample of the whole hour (the trace drifts), divided by
--divide. `static, slots freed` is the kinder variant, in
which a finished request at least stops computing.

Prefix cache: time to first token of a prompt of --prefix tokens, then of a second one that differs in its last tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

from replicas.engine.bench_drive import Ask, Talk, continuous, single, static
from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.protocol import ConfigError

_ids = count()


def first_token_s(engine: Engine, prompt: tuple[int, ...]) -> float:
    """Seconds from submission to the first token; the request is then dropped."""
    request = Ask(prompt, 8).request(f"bench-{next(_ids)}")
    started = time.perf_counter()
    engine.add(request)
    while not engine.step():
        pass
    seconds = time.perf_counter() - started
    engine.abort(request.request_id)
    return seconds


def read_lengths(trace: Path, divide: int, limit: int, seed: int) -> list[int]:
    """Output lengths, at least 1, of a random sample of the trace's requests. ConfigError names the fault."""
    try:
        with trace.open(newline="") as file:
            lengths = [max(1, round(int(row["GeneratedTokens"]) / divide)) for row in csv.DictReader(file)]
    except OSError as error:
        raise ConfigError(f"cannot read {str(trace)!r}: {error.strerror}") from error
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(trace)!r} has no column GeneratedTokens of whole numbers: {error}") from error
    if not lengths:
        raise ConfigError(f"{str(trace)!r} holds no requests")
    return random.Random(seed).sample(lengths, min(limit, len(lengths)))


def run(engine: Engine, lengths: list[int], batch: int, prompt_tokens: int, prefix_tokens: int) -> dict[str, float]:
    """Tokens/s of each way, and both times to first token; `*_ratio` over the baseline."""
    rng = random.Random(0)
    vocab = engine.card.vocab_size

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(number))

    def fresh() -> list[Talk]:
        return [single(Ask(tokens(prompt_tokens), length)) for length in lengths]

    continuous(engine, fresh()[:batch], batch)  # warm-up
    total = sum(lengths)
    results = {
        "requests": len(lengths),
        "output_tokens": total,
        "mean_output": total / len(lengths),
        "continuous_tokens_per_s": total / continuous(engine, fresh(), batch).seconds,
        "static_tokens_per_s": total / static(engine, fresh(), batch, padded=True).seconds,
        "static_slots_freed_tokens_per_s": total / static(engine, fresh(), batch, padded=False).seconds,
    }
    results["batching_ratio"] = results["continuous_tokens_per_s"] / results["static_tokens_per_s"]
    cold, warm = [], []
    for _ in range(5):
        prefix = tokens(prefix_tokens)
        cold.append(first_token_s(engine, (*prefix, *tokens(8))))
        warm.append(first_token_s(engine, (*prefix, *tokens(8))))
    results["ttft_cold_s"], results["ttft_cached_s"] = statistics.median(cold), statistics.median(warm)
    results["prefix_ratio"] = results["ttft_cold_s"] / results["ttft_cached_s"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.bench_batching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="model folder or .gguf file")
    parser.add_argument("--trace", required=True, type=Path, help="CSV with a column GeneratedTokens")
    parser.add_argument("--divide", type=int, default=16, help="divide the trace's output lengths (default 16)")
    parser.add_argument("--requests", type=int, default=512, help="how many of the trace's requests (default 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--batch", type=int, default=16, help="slots on both sides (default 16)")
    parser.add_argument("--prompt", type=int, default=4, help="prompt tokens of each request (default 4)")
    parser.add_argument("--prefix", type=int, default=1000, help="length of the shared prefix (default 1000)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    try:
        lengths = read_lengths(args.trace, args.divide, args.requests, args.seed)
        engine = Engine(replace(EngineConfig(model=args.model), max_num_seqs=args.batch))
    except ConfigError as error:
        parser.error(error.message)
    results = run(engine, lengths, args.batch, args.prompt, args.prefix)
    print(
        f"{results['requests']:.0f} requests, {results['mean_output']:.1f} output tokens on average, batch {args.batch}"
    )
    for name, key in (
        ("continuous", "continuous_tokens_per_s"),
        ("static", "static_tokens_per_s"),
        ("static, slots freed", "static_slots_freed_tokens_per_s"),
    ):
        print(f"  {name:22}{results[key]:8.1f} tokens/s {results[key] / results['static_tokens_per_s']:6.2f}x")
    print(f"prompt of {args.prefix} shared + 8 own tokens, median of 5")
    print(f"  {'first':22}{results['ttft_cold_s'] * 1e3:8.1f} ms to first token")
    print(f"  {'second':22}{results['ttft_cached_s'] * 1e3:8.1f} ms {results['prefix_ratio']:12.2f}x sooner")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
