"""One call on a machine with a GPU that shows what cannot be shown without one.

    python -m replicas.engine.device_check [--model FOLDER] [--json report.json] [--seconds 570] [--only PART …]

Parts, each reported on its own; one that fails or runs out of time does not stop the next:

  kernels   every Triton kernel compiled and held against float64 on fresh random inputs: 1e-2 relative to the largest
            number in bfloat16 and float16, 1e-3 in float32
  oracle    greedy tokens of the engine in float32, with each attention backend that works here, recorded steps on and
            off, and with a draft, against the naive reference on the same device; no block may leak, and something
            must have been replayed. On --model, else on random weights of the SmolLM2-135M shape
  load      Llama-3-8B's shape with the KV cache as large as it will be, steps of full size, sampler with everything on:
            no out-of-memory error
  sampling  drawing 256 rows of 128,256 logits, against reading them and against inversion
  bench …   replicas.engine.bench in processes of their own: 8B bfloat16 with transformers beside it, 8B INT4, 70B INT4,
            8B with 8-bit keys and values; shorter than its defaults, so that all parts fit into ten minutes
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replicas.engine import bench, flash
from replicas.engine.attention import obstacles
from replicas.engine.bench_sampling import measure
from replicas.engine.bench_shapes import free_memory
from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.loading import choose_device, load
from replicas.engine.random_weights import RandomCheckpoint, byte_tokenizer, shape_config
from replicas.engine.reference import Reference
from replicas.engine.spec.config import Speculative
from replicas.engine.spec.draft_layers import DraftConfig, layer_tensors, save_draft
from replicas.engine.triton.device import interpreting
from replicas.engine.weights import expected_tensors, open_checkpoint
from replicas.protocol import ConfigError, GenerateRequest, SamplingParams

_PROMPTS, _TOKENS = (1, 5, 17, 40, 64, 130), 32
_MAX_LEN = 512
_RESERVED_S = 45.0  # for each part that is still to come
_TIE = 1e-3  # of the reference's two best logits: rounding may decide between them
_SHORT = ["--repeat", "2", "--output", "64", "--mixed", "64", "512", "64"]
BENCHES: dict[str, list[str]] = {
    "bench 8b": ["llama-3-8b", "--repeat", "2", "--output", "64", "--batch", "1", "64", "256",
                 "--peer", "transformers"],
    "bench 8b int4": ["llama-3-8b", "--quant", "int4", *_SHORT, "--batch", "1", "4", "16", "64", "256"],
    "bench 70b int4": ["llama-3-70b", "--quant", "int4", "--batch", "1", "--prefill", "2", "2048",
                       "--mixed", "8", "512", "64"],
    "bench 8b fp8 kv": ["llama-3-8b", "--kv-cache-dtype", "fp8_e4m3", *_SHORT, "--batch", "1", "256"],
    "bench 8b fp8 head": ["llama-3-8b", "--kv-cache-dtype", "fp8_e4m3_head", *_SHORT, "--batch", "1", "256"],
}  # fmt: skip


def kernels(device: torch.device, seed: int) -> dict[str, Any]:
    from replicas.engine.triton.accuracy import CHOICE, checks

    rows: list[dict[str, Any]] = []
    for kind, each in checks(device, seed).items():
        found = [row for check in each for row in _rows(kind, check)]
        # A size that this device has no shared memory for is not chosen on it, as long as there is another.
        spared = kind.startswith(CHOICE) and any(not row["refused"] for row in found)
        rows += [{**row, "good": row["good"] or (row["refused"] and spared)} for row in found]
    refused = sum(row["refused"] for row in rows)
    return {"good": all(row["good"] for row in rows), "checked": len(rows), "refused": refused, "rows": rows}


def _rows(kind: str, check: Callable[[], list[Any]]) -> list[dict[str, Any]]:
    try:
        return [{"kind": kind, **asdict(one), "good": one.good, "refused": False} for one in check()]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"[:300]
        refused = type(error).__name__ == "OutOfResources"
        return [{"kind": kind, "name": "", "good": False, "refused": refused, "error": said}]


# ---------------------------------------------------------------- the oracle


def oracle(device: torch.device, model: str | None) -> dict[str, Any]:
    config = shape_config("smollm2-135m")
    checkpoint = None if model else RandomCheckpoint(config, device, torch.float32)
    with torch.device(device):
        if checkpoint is None:
            reference = Reference.load(model or "")
            reference = Reference(reference.config, {n: t.to(device) for n, t in reference._weights.items()})
        else:
            reference = Reference(config, {name: checkpoint.tensor(name) for name in expected_tensors(config)})
        rng = random.Random(5)
        prompts = [[rng.randrange(reference.config.vocab_size) for _ in range(count)] for count in _PROMPTS]
        wanted = [reference.generate(prompt, _TOKENS, ignore_eos=True) for prompt in prompts]
    found: dict[str, Any] = {}
    usable = [n for n, o in obstacles(device, torch.float32, reference.config.head_dim).items() if not o]
    for attention in usable:
        for graphs in ("off", "auto"):
            name = f"{attention}, step_graphs {graphs}"
            settings = {"attention": attention, "step_graphs": graphs}
            check = partial(_held_to, reference, device, model, checkpoint, prompts, wanted, settings)
            found[name] = attempt(check)
    with tempfile.TemporaryDirectory() as folder:
        drafting: dict[str, Any] = {"attention": usable[0], "speculative": _draft(Path(folder), model, checkpoint)}
        check = partial(_held_to, reference, device, model, checkpoint, prompts, wanted, drafting)
        found[f"{usable[0]}, a draft of the model's first layer"] = attempt(check)
    return {"good": all(row.get("good", False) for row in found.values()), "backends": found}


def _draft(folder: Path, model: str | None, checkpoint: RandomCheckpoint | None) -> Speculative:
    """One that is worth nothing as a guesser, and goes through all that a good one does."""
    of = checkpoint or open_checkpoint(model or "")
    shape = of.config
    described = DraftConfig(
        layers=(0,), base_revision=of.revision, hidden_size=shape.hidden_size, vocab_size=shape.vocab_size
    )
    tensors = {name: tensor.cpu() for name, tensor in layer_tensors(of, (0,)).items()}
    save_draft(folder, described, tensors, torch.arange(shape.vocab_size))
    return Speculative(method="draft_model", model=str(folder), max_draft_tokens=4, adaptive=False, any_revision=True)


def _held_to(
    reference: Reference,
    device: torch.device,
    model: str | None,
    checkpoint: RandomCheckpoint | None,
    prompts: list[list[int]],
    wanted: list[list[int]],
    more: dict[str, Any],
) -> dict[str, Any]:
    settings = EngineConfig(
        model=model or "smollm2-135m", device=str(device), dtype="float32",
        num_blocks=512, max_model_len=_MAX_LEN, max_num_seqs=8, max_num_batched_tokens=96, **more,
    )  # fmt: skip
    engine = Engine(settings, load(settings, checkpoint, byte_tokenizer() if checkpoint else None))
    sampling = SamplingParams(max_tokens=_TOKENS, temperature=0, ignore_eos=True)
    got = [completion.outputs[0].token_ids for completion in engine.generate(prompts, sampling)]
    engine.check_integrity()
    wrong, ties = 0, 0
    for prompt, want, have in zip(prompts, wanted, got, strict=True):
        if want != have:
            at = next(i for i in range(_TOKENS) if want[i] != have[i])
            with torch.device(device):
                best, second = reference.logits(prompt + want[:at])[-1].topk(2).values.tolist()
            ties, wrong = ties + (best - second < _TIE), wrong + (best - second >= _TIE)
    leaked = engine.pool.num_blocks - engine.pool.num_free
    graphs = None if engine._graphs is None else engine._graphs.counts()
    good = not wrong and not leaked and (graphs is None or (graphs["replays"] > 0 and not graphs["broken"]))
    guesses = engine.speculation.num_draft_tokens
    good = good and (guesses > 0) == ("speculative" in more)
    if "speculative" in more and graphs is not None:
        [source] = engine.speculation._sources
        graphs |= {"replayed_guesses": source.proposer.replays}  # type: ignore[attr-defined]
        good = good and graphs["replayed_guesses"] > 0
    return {
        "good": good, "wrong": wrong, "ties": ties, "leaked_blocks": leaked, "graphs": graphs, "guesses": guesses
    }  # fmt: skip


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except Exception as error:
        return {"good": False, "error": f"{type(error).__name__}: {error}"[:500]}


# ---------------------------------------------------------------- full load


def full_load(device: torch.device, shape: str, seconds: float) -> dict[str, Any]:
    """Requests without end on an engine that took all the memory it can, sampled with all that costs memory."""
    settings = EngineConfig(
        model=shape, device=str(device), max_num_seqs=256, max_num_batched_tokens=8192, watermark=0.0
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    engine = Engine(settings, load(settings, RandomCheckpoint(shape_config(shape), device, dtype), byte_tokenizer()))
    rng, submitted, failed, started = random.Random(1), 0, 0, time.monotonic()
    most = min(1500, engine.max_model_len // 2)
    while time.monotonic() - started < seconds:
        while not engine.queue_full() and len(engine.scheduler.waiting) < 64:
            sampling = SamplingParams(
                max_tokens=most, temperature=0.8, top_p=0.9, logprobs=20, repetition_penalty=1.1, ignore_eos=True
            )
            prompt = tuple(rng.randrange(engine.card.vocab_size) for _ in range(rng.randrange(1, most)))
            engine.add(GenerateRequest(request_id=f"load-{submitted}", prompt_token_ids=prompt, sampling=sampling))
            submitted += 1
        failed += sum(chunk.error is not None for chunk in engine.step())
    stats = engine.stats()
    return {
        "good": failed == 0,
        "failed": failed,
        "steps": stats.steps,
        "kv_tokens": engine.pool.num_blocks * settings.block_size,
        "kv_used_at_the_end": 1 - engine.pool.num_free / engine.pool.num_blocks,
        "preemptions": stats.num_preemptions,
    }


# ---------------------------------------------------------------- benches


def run_bench(arguments: list[str], device: torch.device, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "replicas.engine.bench", "--random-weights", "--shape", *arguments]
        command += ["--device", str(device), "--json", str(file)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(seconds, 1), check=False)
        except subprocess.TimeoutExpired:
            done_so_far = json.loads(file.read_text()) if file.is_file() else {}
            return {**done_so_far, "good": False, "error": f"not done after {seconds:.0f} s"}
        if not file.is_file():
            return {"good": False, "error": done.stderr[-500:]}
        print(done.stdout, flush=True)
        return {"good": done.returncode == 0, **json.loads(file.read_text())}


# ---------------------------------------------------------------- the report


def machine(device: torch.device) -> dict[str, Any]:
    found = {**bench.machine(), "flash_attention": str(flash.installed())}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found |= {"capability": torch.cuda.get_device_capability(device), "memory": total, "free": free}
        found["cuda"] = torch.version.cuda
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError as error:
        found["triton"] = str(error)
    return found


def run(args: argparse.Namespace) -> dict[str, Any]:
    began = time.monotonic()
    device = torch.device(args.device)
    report: dict[str, Any] = {"machine": machine(device), "seed": args.seed, "parts": {}}
    parts: dict[str, Callable[[float], dict[str, Any]]] = {
        "kernels": lambda _: kernels(device, args.seed),
        "oracle": lambda _: oracle(device, args.model),
        "load": lambda left: full_load(device, args.load_shape, min(20.0, left)),
        "sampling": lambda _: {"good": True, "figures": measure(device, 256, 128256, 15)},
    }
    for name, arguments in BENCHES.items():
        parts[name] = partial(run_bench, arguments, device)
    parts = {n: part for n, part in parts.items() if _asked(n, args.only)}
    waiting = list(range(len(parts)))  # behind each part, from the last one on
    for name, part in parts.items():
        left, started = args.seconds - (time.monotonic() - began), time.monotonic()
        left = max(left - _RESERVED_S * waiting.pop(), min(left, _RESERVED_S))
        found = {"good": False, "error": "no time left"} if left < 5 else attempt(partial(part, left))
        report["parts"][name] = {**found, "seconds": time.monotonic() - started}
        print(f"{name}: {'good' if found['good'] else 'BAD'} in {time.monotonic() - started:.0f} s", flush=True)
        if args.json:  # after every part, so that whoever stops us keeps what there is
            args.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
        free_memory(device)  # for the next part, which may be another process
    return report


def _asked(part: str, only: list[str] | None) -> bool:
    return not only or any(part.startswith(wanted) for wanted in only)


def _refusal(args: argparse.Namespace) -> str:
    """What is wrong with the arguments; "" if nothing is."""
    names = ("kernels", "oracle", "load", "sampling", *BENCHES)
    unknown = [wanted for wanted in args.only or () if not any(_asked(name, [wanted]) for name in names)]
    if unknown:
        return f"--only: no part begins with {unknown[0]!r}; the parts are {', '.join(names)}"
    if not args.json.resolve().parent.is_dir():
        return f"--json: {args.json.parent} is no folder"
    try:
        device = choose_device(args.device)
    except ConfigError as error:
        return f"--device: {error}"
    if device.type != "cuda" and not interpreting() and args.only and _asked("kernels", args.only):
        return "--only kernels: they run on a GPU, or interpreted, slowly, with TRITON_INTERPRET=1"
    return ""


def render(report: dict[str, Any]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in report["machine"].items())]
    for name, part in report["parts"].items():
        lines.append(
            f"{name:18} {'good' if part['good'] else 'BAD':5} {part['seconds']:6.0f} s  {part.get('error', '')}"
        )
        bad = [row for row in part.get("rows", []) if not row["good"]]
        lines += [f"    {row['kind']} {row['name']}: {row['error']}" for row in bad]
        lines += [f"    {backend}: {row}" for backend, row in part.get("backends", {}).items() if isinstance(row, dict)]
        lines += [f"    {row}" for row in part.get("figures", [])]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.device_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="folder or .gguf file for the oracle (random weights)")
    parser.add_argument("--load-shape", default="llama-3-8b", help="shape of the full-load run (llama-3-8b)")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all parts together (570)")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3), "big"), help="of the random inputs")
    parser.add_argument("--only", nargs="+", help="parts whose names begin so")
    parser.add_argument("--json", type=Path, default=Path("device_check.json"))
    args = parser.parse_args()
    if refusal := _refusal(args):
        print(f"error: {refusal}", file=sys.stderr)
        return 2
    report = run(args)
    print(render(report))
    return 0 if all(part["good"] for part in report["parts"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
