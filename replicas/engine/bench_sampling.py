"""How long drawing tokens takes, against reading the logits once: that is the least it can take.

    python -m replicas.engine.bench_sampling [--rows 1 32 256] [--vocab 128256] [--device cuda]

For each number of rows and kind of request: the way that this device draws (draw.choose_draw), and by inversion. The
last column is the device's way against reading the logits at the rate of a large copy, measured in this run.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replicas.engine import bench
from replicas.engine.draw import Inversion, choose_draw
from replicas.engine.loading import choose_device
from replicas.engine.sequence import Sequence
from replicas.protocol import ConfigError, SamplingParams

KINDS = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "min_p": SamplingParams(temperature=0.8, min_p=0.05),
    "top_k 50": SamplingParams(temperature=0.8, top_k=50),
    "top_p 0.9": SamplingParams(temperature=0.8, top_p=0.9),
    "top_p, flat": SamplingParams(temperature=4.0, top_p=0.9),  # the likeliest 1,024 are not enough
}


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy larger than any cache."""
    source = torch.empty((2 << 30) if device.type == "cuda" else (1 << 28), dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.nbytes / bench.best_s(lambda: target.copy_(source), device)


def measure(device: torch.device, rows: int, vocab: int, tries: int) -> list[dict[str, Any]]:
    """A row of figures for each kind of request, in milliseconds and times of reading the logits."""
    rate = copy_rate(device)
    own, inversion = choose_draw(device), Inversion()
    logits = 4 * torch.randn(rows, vocab, device=device)  # about as peaked as a model's
    found = []
    for kind, params in KINDS.items():
        lots = [Sequence("", i, [0], 1, params, i, b"") for i in range(rows)]
        draws = (own, inversion)
        for draw in draws:
            draw(logits, lots)  # compiles
        ours, theirs = (bench.best_s(partial(draw, logits, lots), device, tries) for draw in draws)
        found.append(
            {
                "rows": rows,
                "kind": kind,
                "way": type(own).__name__,
                "ms": 1e3 * ours,
                "inversion_ms": 1e3 * theirs,
                "times_reading": ours / (logits.nbytes / rate),
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.bench_sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=bench.positive, nargs="+", default=[1, 32, 256])
    parser.add_argument("--vocab", type=bench.positive, default=128256, help="logits of a row (Llama 3: 128256)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--tries", type=bench.positive, default=15, help="the fastest of so many counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    try:
        device = choose_device(args.device)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{bench.machine()['machine']}, torch {torch.__version__}, {args.vocab} logits a row")
    print(f"{'rows':>5} {'kind':12} {'way':12} {'ms':>9} {'inversion':>10} {'x reading':>10}")
    found = []
    for rows in args.rows:
        for row in measure(device, rows, args.vocab, args.tries):
            found.append(row)
            print(
                f"{rows:5} {row['kind']:12} {row['way']:12} {row['ms']:9.3f} {row['inversion_ms']:10.3f} "
                f"{row['times_reading']:10.1f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({**bench.machine(), "vocab": args.vocab, "figures": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
