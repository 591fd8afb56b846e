"""A checkpoint as this engine reads it, against weights that someone else made of it.

    python -m replicas.engine.check_weights MODEL FILE [--prompt TEXT]

FILE: safetensors, matrices [N, K] by Hugging Face name in the type that their maker computes in. Ours, rounded to that
type, must be the same bits. Prints one line of JSON: how many matrices FILE holds, which linear layers' are missing
from it, which differ and by how much at most (as a part of the largest weight), how the quantised ones are held, and
the greedy continuation of TEXT. Exit status 1 if any differs or is missing, 2 if MODEL is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.weights import Checkpoint, linear_matrices, open_checkpoint
from replicas.protocol import ConfigError

PROMPT = "The capital of France is"


def compared(checkpoint: Checkpoint, file: Path) -> dict[str, Any]:
    from safetensors import safe_open

    differing: dict[str, float] = {}
    with safe_open(file, framework="pt") as theirs:
        names = list(theirs.keys())
        for name in names:
            wanted = theirs.get_tensor(name)
            ours = checkpoint.tensor(name).to(wanted.dtype)
            if not torch.equal(ours, wanted):
                differing[name] = float((ours.float() - wanted.float()).abs().max() / wanted.float().abs().max())
    missing = {f"{module}.weight" for module in linear_matrices(checkpoint.config)} - set(names)
    return {
        "matrices": len(names),
        "missing": sorted(missing),
        "differing": sorted(differing),
        "worst": max(differing.values(), default=0.0),
    }


def held(weight: Tensor | QuantizedWeight) -> str:
    if isinstance(weight, Tensor):
        return str(weight.dtype).removeprefix("torch.")
    origin = "symmetric" if weight.symmetric else "zeros" if weight.mins is None else "mins"
    return f"{weight.bits} bits, groups of {weight.group_size}, {origin}"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.check_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompt", default=PROMPT, help=f"({PROMPT})")
    args = parser.parse_args()
    try:
        checkpoint = open_checkpoint(args.model)
        engine = Engine(EngineConfig(model=str(args.model), num_blocks=64))
    except ConfigError as error:
        print(f"check_weights: {error}", file=sys.stderr)
        return 2
    found = compared(checkpoint, args.file)
    found["held"] = Counter(held(checkpoint.matrix(module)) for module in linear_matrices(checkpoint.config))
    done = engine.generate([args.prompt], SamplingParams(max_tokens=8, temperature=0))
    found["text"] = done[0].outputs[0].text
    print(json.dumps(found))
    return 1 if found["differing"] or found["missing"] else 0


if __name__ == "__main__":
    sys.exit(main())
