"""vLLM offline, answering the same lines as `python -m replicas.engine.bench --lines`. Runs in vLLM's own environment.

A file of its own without imports of ours: that environment has vLLM and not Signalbox. Prompts are drawn as our
benchmark draws them (random.Random(batch), ids below the vocabulary's size), greedy, end of sequence ignored, no prefix
cache.

Settings, to vLLM's advantage where it has a choice: both cores (VLLM_CPU_OMP_THREADS_BIND, none reserved), float32,
compiled graphs (its default, `enforce_eager` off), KV cache for all requests at once, engine in this process so that no
second process competes for the cores, no statistics, a whole batch's prompts in one step if they fit its own default.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any


def seconds_since_process_start() -> float:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def settings(cpus: int, kv_gib: int) -> dict[str, str]:
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{cpus - 1}" if cpus > 1 else "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def generate(llm: Any, sampling: Any, batch: int, prompt: int, output: int, rng: random.Random, vocab: int) -> float:
    prompts = [{"prompt_token_ids": [rng.randrange(vocab) for _ in range(prompt)]} for _ in range(batch)]
    params = sampling(max_tokens=output, temperature=0.0, ignore_eos=True, detokenize=True)
    started = time.perf_counter()
    results = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - started
    counts = {len(result.outputs[0].token_ids) for result in results}
    assert counts == {output}, f"vLLM generated {counts} tokens instead of {output}"
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--batch", type=int, default=32, help="largest batch (32)")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=128)
    args = parser.parse_args()
    environment = settings(os.cpu_count() or 1, kv_gib=4)
    os.environ |= environment
    vllm = importlib.import_module("vllm")  # in vLLM's environment only: no dependency of ours
    llm = vllm.LLM(
        model=args.model,
        dtype="float32",
        max_model_len=args.prompt + args.output,
        max_num_seqs=args.batch,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    vocab = llm.get_tokenizer().vocab_size
    generate(llm, vllm.SamplingParams, 1, min(args.prompt, 8), 1, random.Random(0), vocab)
    ready = {
        "first_token_s": seconds_since_process_start(),
        "version": vllm.__version__,
        "torch": importlib.import_module("torch").__version__,
        "python": platform.python_version(),
        "settings": environment,
    }
    print("@@", json.dumps(ready), flush=True)
    for line in sys.stdin:
        batch = int(line)
        rng = random.Random(batch)
        prefill_s = generate(llm, vllm.SamplingParams, batch, args.prompt, 1, rng, vocab)
        total_s = generate(llm, vllm.SamplingParams, batch, args.prompt, args.output, rng, vocab)
        print("@@", json.dumps({"batch": batch, "prefill_s": prefill_s, "total_s": total_s}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
