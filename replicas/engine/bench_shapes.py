"""How near the engine comes to a device's ceilings, on random weights of a well-known shape.

    python -m replicas.engine.bench --shape llama-3-8b --random-weights [--quant int4] [--peer transformers]

In one run: the device's ceilings (a large copy, reads and writes counted; a large product of random matrices), then

  decode    one request: the bytes that its steps must move, over the time, as a share of the copy's rate
  sweep     the same for more requests at once, and their operations as a share of the product's rate
  prefill   prompts submitted together: operations up to their first tokens, over the time, as a share of that rate
  mixed     many requests, prompts and answers: all tokens over all the time; on CUDA also the share of a stretch of
            decode steps in which the device does nothing, from its own timeline
  peer      transformers' continuous batching on the same weights and the same mixed requests, in the same process

Every figure is the median over --repeat runs. Weights are drawn on the device from a fixed seed; tokens are random.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from replicas.engine import bench
from replicas.engine.bench_cost import Cost, prompt
from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.loading import choose_device, choose_dtype, load
from replicas.engine.random_weights import RandomCheckpoint, byte_tokenizer, check, shape_config

_CUDA = {"batches": [1, 2, 4, 8, 16, 32, 64, 128, 256], "prompt": 512, "output": 128}
_CPU = {"batches": [1, 2, 4], "prompt": 32, "output": 16}
_CUDA_PREFILL, _CPU_PREFILL = (8, 2048), (2, 64)
_CUDA_MIXED, _CPU_MIXED = (256, 512, 256), (4, 32, 16)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> bench.Ceilings:
    """Best of several tries of a copy larger than any cache, counted as read and write, and of a product of two large
    matrices of random numbers: constant ones draw less power and are multiplied faster than any real ones."""
    cuda = device.type == "cuda"
    source = torch.empty((2 << 30) if cuda else (1 << 28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copied = bench.best_s(lambda: target.copy_(source), device)
    nbytes = 2 * source.nbytes
    size = 8192 if cuda else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    product = bench.best_s(lambda: torch.mm(left, right, out=out), device, tries=15)
    return bench.Ceilings(nbytes / copied, 2 * size**3 / product)


def build_engine(args: argparse.Namespace) -> Engine:
    """An engine on random weights; ConfigError where the shape, the quantisation or the device cannot be had."""
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    checkpoint = RandomCheckpoint(shape_config(args.shape), device, dtype, quant=args.quant)
    plan = _plan(args, device)
    longest = max(sum(plan["mixed"][1:]), plan["prefill"][1] + 1, plan["prompt"] + plan["output"])
    config = EngineConfig(
        model=args.shape,
        device=args.device,
        dtype=args.dtype,
        attention=args.attention,
        kv_cache_dtype=args.kv_cache_dtype,
        num_threads=args.threads,
        max_model_len=longest,
        max_num_seqs=max(*plan["batches"], plan["mixed"][0]),
        max_num_batched_tokens=args.budget or (8192 if device.type == "cuda" else None),
        enable_prefix_caching=False,
        max_waiting=1 << 20,
    )
    return Engine(config, load(config, checkpoint, byte_tokenizer()))


def _plan(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    cuda = device.type == "cuda"
    defaults: dict[str, Any] = dict(_CUDA if cuda else _CPU)
    given = {"batches": args.batch, "prompt": args.prompt, "output": args.output}
    plan = defaults | {name: value for name, value in given.items() if value is not None}
    plan["prefill"] = tuple(args.prefill or (_CUDA_PREFILL if cuda else _CPU_PREFILL))
    plan["mixed"] = tuple(args.mixed or (_CUDA_MIXED if cuda else _CPU_MIXED))
    return plan


# ---------------------------------------------------------------- the parts


def sweep(
    engine: Engine, batches: list[int], prompt_tokens: int, output: int, repeat: int, ceilings: bench.Ceilings
) -> list[dict[str, float]]:
    """Decoding at every batch size; see the module's text."""
    results = []
    for batch in batches:
        runs = []
        for _ in range(repeat + 1):  # the first compiles kernels and records graphs
            line = bench.run_batch(engine, batch, prompt_tokens, output, random.Random(batch))
            runs.append(decode_figures(batch, line.decode_tokens, line.decode_s, line.decode_cost, ceilings))
        results.append(_medians(runs[1:]))
    return results


def decode_figures(batch: int, tokens: int, seconds: float, cost: Cost, ceilings: bench.Ceilings) -> dict[str, float]:
    return {
        "batch": batch,
        "tokens_per_s": tokens / seconds,
        "bytes_per_s": cost.bytes / seconds,
        "bytes_share": cost.bytes / seconds / ceilings.bytes_per_s,
        "flops_share": cost.flops / seconds / ceilings.flops_per_s,
    }


def prefill(engine: Engine, prompts: tuple[int, int], repeat: int, ceilings: bench.Ceilings) -> dict[str, float]:
    """prompts: how many, tokens of each."""
    batch, tokens = prompts
    config, dtype = engine.loaded.decoder.config, engine.loaded.dtype
    flops = batch * prompt(config, tokens, dtype.itemsize).flops
    runs = []
    for _ in range(repeat + 1):
        seconds = bench.run_batch(engine, batch, tokens, 1, random.Random(tokens)).total_s
        runs.append(
            {
                "batch": batch,
                "prompt": tokens,
                "tokens_per_s": batch * tokens / seconds,
                "flops_share": flops / seconds / ceilings.flops_per_s,
            }
        )
    return _medians(runs[1:])


def mixed(engine: Engine, requests: tuple[int, int, int], repeat: int) -> dict[str, float]:
    """requests: how many, tokens of each prompt and answer."""
    batch, tokens, output = requests
    runs = []
    for _ in range(repeat + 1):  # the first compiles kernels and records graphs
        line = bench.run_batch(engine, batch, tokens, output, random.Random(batch + tokens))
        runs.append(
            {
                "requests": batch,
                "prompt": tokens,
                "output": output,
                "tokens_per_s": batch * (tokens + output) / line.total_s,
                "output_tokens_per_s": batch * output / line.total_s,
            }
        )
    return _medians(runs[1:])


def idle_share(engine: Engine, batch: int, prompt_tokens: int, steps: int = 40) -> float | None:
    """Share of a stretch of decode steps in which no kernel runs, from CUDA's own timeline; None without CUDA."""
    if engine.loaded.device.type != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    rng = random.Random(7)
    ids = [bench.submit(engine, prompt_tokens, steps + 32, rng) for _ in range(batch)]
    first: set[str] = set()
    try:
        while len(first) < batch:
            first |= {chunk.request_id for chunk in engine.step()}
        for _ in range(8):
            engine.step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as timeline:
            for _ in range(steps):
                engine.step()
            torch.cuda.synchronize()
    finally:
        for request_id in ids:
            engine.abort(request_id)
    kernels = [event.time_range for event in timeline.events() if str(event.device_type).endswith("CUDA")]
    return idle_of([(kernel.start, kernel.end) for kernel in kernels])


def idle_of(spans: list[tuple[float, float]]) -> float | None:
    """Share of the time between the first start and the last end that no span covers; None without spans."""
    if not spans:
        return None
    spans = sorted(spans)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    whole = reached - spans[0][0]
    return 1 - busy / whole if whole else 0.0


def peer_transformers(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """transformers' continuous batching on the same random weights and the same mixed requests."""
    import transformers

    if args.quant is not None:
        return {"skipped": "transformers does not read these quantised weights"}
    if device.type != "cuda":
        return {"skipped": "transformers' continuous batching is compared on a GPU only"}
    batch, tokens, output = _plan(args, device)["mixed"]
    model = _transformers_model(args.shape, device, dtype)
    rng = random.Random(batch + tokens)
    inputs = [[rng.randrange(model.config.vocab_size) for _ in range(tokens)] for _ in range(batch)]
    settings = transformers.GenerationConfig(
        max_new_tokens=output, min_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model.generate_batch(inputs=inputs[:2], generation_config=settings, progress_bar=False)
    seconds = []
    for _ in range(args.repeat):
        started = time.perf_counter()
        done = model.generate_batch(inputs=inputs, generation_config=settings, progress_bar=False)
        seconds.append(time.perf_counter() - started)
        made = sum(len(result.generated_tokens) for result in done.values())
        if made != batch * output:
            raise RuntimeError(f"transformers made {made} tokens of {batch * output}")
    elapsed = statistics.median(seconds)
    return {
        "transformers": transformers.__version__,
        "attention": model.config._attn_implementation,
        "tokens_per_s": batch * (tokens + output) / elapsed,
        "output_tokens_per_s": batch * output / elapsed,
    }


def _transformers_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    import transformers

    from replicas.engine.random_weights import SHAPES

    raw = {name: value for name, value in SHAPES[shape].items() if name != "architectures"}
    config = transformers.LlamaConfig(**raw)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    checkpoint = RandomCheckpoint(shape_config(shape), device, dtype)
    held_by_name: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in held_by_name.items():
            parameter.copy_(checkpoint.tensor(name))
    return model


# ---------------------------------------------------------------- the report


def run(args: argparse.Namespace, keep: Callable[[dict[str, Any]], None] = lambda report: None) -> dict[str, Any]:
    """Everything as one JSON-ready dict. A part that fails is reported and the others go on. keep: is given what there
    is after every part, for whoever has no time to wait for the rest."""
    check(args.shape, args.quant)  # before minutes are spent
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    started = time.perf_counter()
    ceilings = measure_ceilings(device, dtype)
    free_memory(device)  # the engine takes what is there
    measuring_s = time.perf_counter() - started
    engine = build_engine(args)
    loaded = engine.loaded
    plan = _plan(args, loaded.device)
    bench.run_batch(engine, 1, 8, 1, random.Random(0))
    since = bench.seconds_since_process_start()
    report: dict[str, Any] = {
        **bench.machine(),
        "shape": args.shape,
        "quant": args.quant or "none",
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "backends": loaded.backends,
        "kv": loaded.kv.name,
        "kv_tokens": engine.pool.num_blocks * engine.config.block_size,
        "weight_bytes": loaded.decoder.weight_bytes,
        "repeat": args.repeat,
        "first_token_s": None if since is None else since - measuring_s,
    }
    report["ceilings"] = {"bytes_per_s": ceilings.bytes_per_s, "flops_per_s": ceilings.flops_per_s}
    parts: dict[str, Callable[[], Any]] = {
        "sweep": lambda: sweep(engine, plan["batches"], plan["prompt"], plan["output"], args.repeat, ceilings),
        "prefill": lambda: prefill(engine, plan["prefill"], args.repeat, ceilings),
        "mixed": lambda: mixed(engine, plan["mixed"], args.repeat),
        "idle_share": lambda: idle_share(engine, plan["mixed"][0], plan["mixed"][1]),
    }
    for name, part in parts.items():
        report[name] = attempt(part)
        report["graphs"] = None if engine._graphs is None else engine._graphs.counts()
        keep(report)
    if args.peer == "transformers":
        del engine, loaded, parts
        free_memory(device)
        report["peer"] = attempt(lambda: peer_transformers(args, device, dtype))
        if "tokens_per_s" in report["peer"] and "tokens_per_s" in report["mixed"]:
            report["peer"]["ours_over_it"] = report["mixed"]["tokens_per_s"] / report["peer"]["tokens_per_s"]
    return report


def free_memory(device: torch.device) -> None:
    """Give back what nobody holds any more; an engine and its graphs refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def attempt(part: Callable[[], Any]) -> Any:
    """What `part` gives, or {"error": …}."""
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def _medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def render(report: dict[str, Any]) -> str:
    ceilings, first = report["ceilings"], report["first_token_s"]
    lines = [
        f"{report['shape']}, weights {report['quant']}, {report['dtype']} on {report['device']}: {report['machine']}, "
        f"torch {report['torch']}; {report['backends']}; median of {report['repeat']}",
        f"copy {ceilings['bytes_per_s'] / 1e9:.1f} GB/s, product {ceilings['flops_per_s'] / 1e12:.2f} TFLOP/s",
        f"weights {report['weight_bytes'] / 1e9:.2f} GB, KV cache {report['kv_tokens']} tokens ({report['kv']})"
        + ("" if first is None else f", first token {first:.1f} s after process start"),
        "",
        f"{'decode':>8} {'tokens/s':>10} {'GB/s':>8} {'of copy':>8} {'of product':>11}",
    ]
    if isinstance(report["sweep"], list):
        lines += [
            f"{f['batch']:8.0f} {f['tokens_per_s']:10.1f} {f['bytes_per_s'] / 1e9:8.1f} {f['bytes_share']:8.1%} "
            f"{f['flops_share']:11.1%}"
            for f in report["sweep"]
        ]
    else:
        lines.append(str(report["sweep"]))
    for name in ("prefill", "mixed", "idle_share", "graphs", "peer"):
        if report.get(name) is not None:
            lines.append(f"{name}: {_told(report[name])}")
    return "\n".join(lines)


def _told(figures: Any) -> str:
    if not isinstance(figures, dict):
        return f"{figures:.1%}"
    return ", ".join(f"{name} {_cell(name, value)}" for name, value in figures.items())


def _cell(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1%}" if name.endswith("share") else f"{value:.4g}"


def main(args: argparse.Namespace) -> int:
    def keep(report: dict[str, Any]) -> None:
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")

    report = run(args, keep)
    print(render(report))
    keep(report)
    failed = [name for name, value in report.items() if isinstance(value, dict) and "error" in value]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
