"""Offline speed of the engine, as figures that mean something on another machine too: shares of measured ceilings.

    python -m replicas.engine.bench --model PATH --batch 1 8 32 --prompt 128 --output 128

For every batch size, that many requests (random token ids, greedy, end of sequence ignored) are submitted at once:

  out tok/s      output tokens over the whole time, prefill included
  decode tok/s   output tokens over the steps in which every request decodes
  prefill tok/s  prompt tokens over the time until all have their first token, in a run of its own
  TTFT           submission to a request's first token; TPOT (end - first token) / (tokens - 1); medians over requests
  GB/s, GFLOP/s  what the model's shape makes necessary (replicas/engine/bench_cost.py) over the measured time; in
                 brackets the share of this machine's read bandwidth and matrix-product rate, measured in this run

`first token` is the time from the start of this process to the first token of a first request: interpreter, imports,
loading, everything. With --repeat, each figure is the median of the repetitions.

--shape NAME --random-weights measures a GPU (or a CPU) without a download: see replicas/engine/bench_shapes.py.

--lines turns it into a worker for comparisons (load/bench_engine.py): one JSON line when ready, then for each batch
size read from standard input one with the seconds to first tokens and to all tokens. Lines begin with "@@ ".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch

from replicas.engine.bench_cost import Cost, Held, decode_step, prompt
from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.loading import Loaded
from replicas.engine.model_config import ModelConfig
from replicas.protocol import GenerateRequest, SamplingParams, SignalboxError

_ids = count()
_BUSY_BYTES = 1 << 30  # a quarter of a millisecond of writing on an H200, by its data sheet


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What this machine gives torch: bytes read a second from a tensor larger than caches, and dense product rate."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(slots=True)
class Timeline:
    """One batch as it ran. Seconds since submission; `decode_*` cover the steps in which all requests decode."""

    total_s: float = 0.0
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    decode_s: float = 0.0
    decode_tokens: int = 0
    decode_cost: Cost = field(default_factory=lambda: Cost(0, 0))


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Best of several tries of a reduction and of a matrix-vector product over 512 MiB, and of a 2048-cube product."""
    big = torch.ones(2**29 // dtype.itemsize, device=device, dtype=dtype).view(-1, 2048)
    vector = torch.ones(2048, device=device, dtype=dtype)
    reads = min(best_s(big.sum, device), best_s(lambda: torch.mv(big, vector), device))
    size = 2048 if device.type == "cpu" else 8192
    square = torch.ones(size, size, device=device, dtype=dtype)
    product = best_s(lambda: torch.mm(square, square), device)
    return Ceilings(big.nbytes / reads, 2 * size**3 / product)


def best_s(function: Callable[[], object], device: torch.device, tries: int = 7) -> float:
    """Seconds of the fastest call; on a GPU by its own clock, and launched while it is busy, so that what launching
    takes the host is not timed unless it takes longer than that."""
    if device.type == "cuda":
        return min(_device_s(function, device) for _ in range(tries))
    best = float("inf")
    for _ in range(tries):
        started = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - started)
    return best


def _device_s(function: Callable[[], object], device: torch.device) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    busy = torch.empty(_BUSY_BYTES, dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)
    busy.zero_()
    start.record()
    function()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def run_batch(engine: Engine, batch: int, prompt_tokens: int, output_tokens: int, rng: random.Random) -> Timeline:
    """Submit `batch` requests at once and step until all are done; none is left behind if one of them fails."""
    ids = [submit(engine, prompt_tokens, output_tokens, rng) for _ in range(batch)]
    try:
        return _followed(engine, ids, prompt_tokens)
    finally:
        for request_id in ids:
            engine.abort(request_id)


def _followed(engine: Engine, ids: list[str], prompt_tokens: int) -> Timeline:
    config, element_size = engine.loaded.decoder.config, engine.loaded.dtype.itemsize
    held = held_by(engine.loaded)
    line = Timeline(tokens=dict.fromkeys(ids, 0))
    started = before = time.perf_counter()
    while engine.has_work():
        all_decode = len(line.first) == len(ids) and not line.last
        contexts = [prompt_tokens + tokens for tokens in line.tokens.values()]
        chunks = engine.step()
        now = time.perf_counter()
        for chunk in chunks:
            if chunk.error is not None:
                raise chunk.error
            line.tokens[chunk.request_id] += len(chunk.token_ids)
            line.first.setdefault(chunk.request_id, now - started)
            if chunk.terminal:
                line.last[chunk.request_id] = now - started
        if all_decode:
            line.decode_s += now - before
            line.decode_tokens += sum(len(chunk.token_ids) for chunk in chunks)
            line.decode_cost += decode_step(config, contexts, element_size, held)
        before = now
    line.total_s = before - started
    return line


def submit(engine: Engine, prompt_tokens: int, output_tokens: int, rng: random.Random) -> str:
    request_id = f"bench-{next(_ids)}"
    token_ids = tuple(rng.randrange(engine.card.vocab_size) for _ in range(prompt_tokens))
    sampling = SamplingParams(max_tokens=output_tokens, temperature=0, ignore_eos=True)
    engine.add(GenerateRequest(request_id=request_id, prompt_token_ids=token_ids, sampling=sampling))
    return request_id


def summarise(
    config: ModelConfig, element_size: int, prompt_tokens: int, full: Timeline, first_only: Timeline, ceilings: Ceilings
) -> dict[str, float]:
    """Figures of one batch size from a full run and from one that stops at the first tokens; see the module's text."""
    batch, outputs = len(full.tokens), sum(full.tokens.values())
    prompt_flops = batch * prompt(config, prompt_tokens, element_size).flops
    figures = {
        "batch": batch,
        "output_tokens_per_s": outputs / full.total_s,
        "prefill_tokens_per_s": batch * prompt_tokens / first_only.total_s,
        "prefill_flops_per_s": prompt_flops / first_only.total_s,
        "prefill_flops_share": prompt_flops / first_only.total_s / ceilings.flops_per_s,
        "ttft_s": statistics.median(full.first.values()),
        "ttft_max_s": max(full.first.values()),
    }
    gaps = [(full.last[i] - full.first[i]) / (n - 1) for i, n in full.tokens.items() if n > 1]
    if gaps:
        figures["tpot_s"] = statistics.median(gaps)
    if full.decode_s:
        bytes_per_s, flops_per_s = full.decode_cost.bytes / full.decode_s, full.decode_cost.flops / full.decode_s
        figures |= {
            "decode_tokens_per_s": full.decode_tokens / full.decode_s,
            "decode_bytes_per_s": bytes_per_s,
            "decode_bytes_share": bytes_per_s / ceilings.bytes_per_s,
            "decode_flops_per_s": flops_per_s,
            "decode_flops_share": flops_per_s / ceilings.flops_per_s,
        }
    return figures


def held_by(loaded: Loaded) -> Held:
    decoder = loaded.decoder
    return Held(decoder.layer_bytes + decoder.head_bytes, loaded.kv_bytes_per_token // decoder.num_layers)


def bench_batch(
    engine: Engine, batch: int, prompt_tokens: int, output_tokens: int, repeat: int, ceilings: Ceilings
) -> dict[str, float]:
    """Medians over `repeat` repetitions of summarise's figures."""
    rng, loaded = random.Random(batch), engine.loaded
    runs = []
    for _ in range(repeat):
        first_only = run_batch(engine, batch, prompt_tokens, 1, rng)
        full = run_batch(engine, batch, prompt_tokens, output_tokens, rng)
        config, size = loaded.decoder.config, loaded.dtype.itemsize
        runs.append(summarise(config, size, prompt_tokens, full, first_only, ceilings))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def seconds_since_process_start() -> float | None:
    """From the kernel's own record (10 ms grain), so that interpreter and imports count; None without /proc."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, AttributeError, IndexError, ValueError):
        return None


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "machine": name,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


_COLUMNS: tuple[tuple[str, Callable[[dict[str, float]], str]], ...] = (
    ("batch", lambda f: f"{f['batch']:.0f}"),
    ("out tok/s", lambda f: f"{f['output_tokens_per_s']:.1f}"),
    ("decode tok/s", lambda f: _number(f, "decode_tokens_per_s")),
    ("prefill tok/s", lambda f: f"{f['prefill_tokens_per_s']:.0f}"),
    ("TTFT ms", lambda f: f"{f['ttft_s'] * 1e3:.0f}"),
    ("TPOT ms", lambda f: _number(f, "tpot_s", 1e3)),
    ("decode GB/s", lambda f: _shared(f, "decode_bytes")),
    ("decode GFLOP/s", lambda f: _shared(f, "decode_flops")),
    ("prefill GFLOP/s", lambda f: _shared(f, "prefill_flops")),
)


def _number(figures: dict[str, float], key: str, scale: float = 1.0) -> str:
    return f"{figures[key] * scale:.1f}" if key in figures else "-"


def _shared(figures: dict[str, float], key: str) -> str:
    if f"{key}_per_s" not in figures:
        return "-"
    return f"{figures[f'{key}_per_s'] / 1e9:.1f} ({figures[f'{key}_share']:.0%})"


def table(results: list[dict[str, float]]) -> str:
    """Right-aligned plain text, one row per batch size."""
    rows = [[title for title, _ in _COLUMNS]] + [[cell(figures) for _, cell in _COLUMNS] for figures in results]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = EngineConfig(model="")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model folder or .gguf file")
    what.add_argument("--shape", help="llama-3-8b, llama-3-70b or smollm2-135m, see replicas/engine/bench_shapes.py")
    parser.add_argument("--random-weights", action="store_true", help="goes with --shape: weights drawn on the device")
    parser.add_argument("--quant", help="goes with --shape: int4 or int8")
    parser.add_argument(
        "--kv-cache-dtype", default=default.kv_cache_dtype, help="auto, int8, fp8_e4m3 or fp8_e4m3_head"
    )
    parser.add_argument("--prefill", type=positive, nargs=2, help="goes with --shape: prompts, tokens of each")
    parser.add_argument("--mixed", type=positive, nargs=3, help="goes with --shape: requests, prompt, output tokens")
    parser.add_argument("--peer", choices=["transformers"], help="goes with --shape: measure it in the same run")
    parser.add_argument("--batch", type=positive, nargs="+", help="requests at once (1 8 32)")
    parser.add_argument("--prompt", type=positive, help="prompt tokens of a request (128)")
    parser.add_argument("--output", type=positive, help="output tokens of a request (128)")
    parser.add_argument("--repeat", type=positive, default=1, help="repetitions of every batch size (1)")
    parser.add_argument("--device", default=default.device, help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default=default.dtype, help="auto, float32, bfloat16 or float16")
    parser.add_argument(
        "--quantization", default="none", help="auto, none or int8 (none: a GGUF in full, as other engines get it)"
    )
    parser.add_argument("--attention", default=default.attention, help="attention backend (auto)")
    parser.add_argument("--threads", type=positive, help="CPU threads (torch's own choice)")
    parser.add_argument("--budget", type=positive, help="tokens of one step (the engine's own choice)")
    parser.add_argument("--lines", action="store_true", help="take batch sizes from standard input, answer in JSON")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def build_engine(args: argparse.Namespace) -> Engine:
    """An engine with room for the largest batch and without prefix cache: no prompt is to be found computed already."""
    length = args.prompt + args.output
    block_size = EngineConfig(model=args.model).block_size
    return Engine(
        EngineConfig(
            model=args.model,
            quantization=args.quantization,
            device=args.device,
            dtype=args.dtype,
            attention=args.attention,
            kv_cache_dtype=args.kv_cache_dtype,
            num_threads=args.threads,
            max_model_len=length,
            max_num_seqs=max(args.batch),
            max_num_batched_tokens=args.budget,
            num_blocks=(max(args.batch) + 1) * (-(-length // block_size) + 1),
            enable_prefix_caching=False,
        )
    )


def describe(engine: Engine, args: argparse.Namespace) -> dict[str, Any]:
    """Machine, settings and the time to a first token; run it before anything else is measured."""
    run_batch(engine, 1, min(args.prompt, 8), 1, random.Random(0))
    first_token_s = seconds_since_process_start()
    loaded = engine.loaded
    return {
        **machine(),
        "model": Path(args.model).name,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "ops": loaded.ops,
        "attention": loaded.attention,
        "quantization": args.quantization,
        "weight_bytes": held_by(loaded).weight_bytes,
        "prompt": args.prompt,
        "output": args.output,
        "repeat": args.repeat,
        "first_token_s": first_token_s,
    }


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """Everything as one JSON-ready dict: description, ceilings, results."""
    engine = build_engine(args)
    report = describe(engine, args)
    ceilings = measure_ceilings(engine.loaded.device, engine.loaded.dtype)
    report["ceilings"] = asdict(ceilings)
    report["results"] = [
        bench_batch(engine, batch, args.prompt, args.output, args.repeat, ceilings) for batch in args.batch
    ]
    return report


def render(report: dict[str, Any]) -> str:
    ceilings, first = report["ceilings"], report["first_token_s"]
    lines = [
        f"{report['model']} in {report['dtype']} on {report['device']}: {report['machine']}, "
        f"{report['threads']} threads, {report['vector_isa']}, torch {report['torch']}",
        f"ops {report['ops']}, attention {report['attention']}; prompt {report['prompt']}, output {report['output']}, "
        f"median of {report['repeat']}",
        f"ceilings: {ceilings['bytes_per_s'] / 1e9:.1f} GB/s read, {ceilings['flops_per_s'] / 1e9:.0f} GFLOP/s product",
    ]
    if first is not None:
        lines.append(f"first token {first:.1f} s after process start")
    return "\n".join([*lines, "", table(report["results"])])


def answer_lines(args: argparse.Namespace) -> None:
    engine = build_engine(args)
    print("@@", json.dumps(describe(engine, args)), flush=True)
    for line in sys.stdin:
        batch = int(line)
        rng = random.Random(batch)
        prefill_s = run_batch(engine, batch, args.prompt, 1, rng).total_s
        total_s = run_batch(engine, batch, args.prompt, args.output, rng).total_s
        print("@@", json.dumps({"batch": batch, "prefill_s": prefill_s, "total_s": total_s}), flush=True)


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    args = arguments().parse_args(argv)
    if args.json and not args.json.parent.is_dir():
        arguments().error(f"--json {str(args.json)!r}: no such folder {str(args.json.parent)!r}")
    if args.shape is None:
        if args.random_weights or args.quant or args.peer or args.prefill or args.mixed:
            arguments().error("--random-weights, --quant, --peer, --prefill and --mixed go with --shape")
        args.batch, args.prompt, args.output = args.batch or [1, 8, 32], args.prompt or 128, args.output or 128
    elif not args.random_weights:
        arguments().error("--shape has no weights of its own: say --random-weights")
    return args


def main() -> int:
    args = parsed()
    try:
        if args.shape is not None:
            from replicas.engine import bench_shapes

            return bench_shapes.main(args)
        if args.lines:
            answer_lines(args)
            return 0
        report = bench(args)
    except SignalboxError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    print(render(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
