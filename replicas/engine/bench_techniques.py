"""One technique of the engine, off and on in turns, on the same traffic: the worker of `python -m load.techniques`.

    python -m replicas.engine.bench_techniques continuous-batching --model PATH --json FILE

Both engines are loaded once, with exactly the settings that the result states as a line of a fleet file, and compute
the same traffic one after the other (off, on, off, on, …), each turn with other prompts. A technique that must not
change the text is held to it: the tokens of both sides are compared. Weights in fewer bits are judged against the
float32 ones: by how often their first choice is the token that the float32 model wrote, and with --text by perplexity.

int4 rounds the model itself (into --work, kept there): by AWQ, calibrated on the first fifth of --text, or to the
nearest without a text; after a seeded permutation of channels (quantizers/permute.py), since a GGUF that holds 4-bit
groups already would flatter any method.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from replicas.engine.bench import held_by, machine
from replicas.engine.bench_drive import Ask, Timings, continuous, single
from replicas.engine.bench_spec import KINDS
from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.evaluation import agreement, measure
from replicas.engine.quantizers import Settings, quantize
from replicas.engine.quantizers.permute import permute
from replicas.engine.technique_rows import ROWS, Case, Inputs, Row, Side, weights_row
from replicas.protocol import ConfigError, SignalboxError

Json = dict[str, Any]
INT4 = "int4"
CALIBRATION_SHARE, CALIBRATION_WINDOWS = 0.2, 8
PERPLEXITY_TOKENS, PERPLEXITY_WINDOW = 2048, 512


def bench(name: str, inputs: Inputs) -> Json:
    """Everything of one row, ready for JSON. ConfigError for what cannot be."""
    started = time.perf_counter()
    row = int4_row(inputs) if name == INT4 else ROWS[name](inputs)
    engines = [_engine(side, inputs) for side in (row.off, row.on)]
    cases = [_measure(case, engines, inputs.turns) for case in row.cases]
    quality = _same_output(cases) if row.lossless else _weights_quality(engines[0], engines[1], inputs)
    for case in cases:
        case.pop("same")
    return {
        "row": name,
        "where": f"the engine in one process, {torch.get_num_threads()} threads",
        "off": {"means": row.off.means, "fleet": row.off.fleet},
        "on": {"means": row.on.means, "fleet": row.on.fleet},
        "cases": cases,
        "quality": quality,
        "engine": {**machine(), "attention": engines[1].loaded.attention, "ops": engines[1].loaded.ops},
        "seconds": time.perf_counter() - started,
    }


def _engine(side: Side, inputs: Inputs) -> Engine:
    engine = Engine(EngineConfig(model=str(side.model or inputs.model), **side.settings))
    # memory is touched and kernels are chosen before anything is timed
    prompt = tuple(range(min(128, engine.max_model_len // 4)))
    continuous(engine, [single(Ask(prompt, 4))], 1)
    return engine


def _measure(case: Case, engines: Sequence[Engine], turns: int) -> Json:
    """Figures of each turn, and whether both sides wrote the same."""
    found, same = [], []
    for turn in range(turns):
        both, written = {}, []
        for side, engine in zip(("off", "on"), engines, strict=True):
            before = _counters(engine)
            timings = case.run(engine, side == "on", turn)
            both[side] = timings.figures(case.ttft_of, case.itl_of) | _shares(before, _counters(engine))
            written.append(timings)
            print(f"  turn {turn + 1} {side}: {both[side]['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True)
        found.append(both)
        same += _compared(*written)
    return {"workload": case.workload, "turns": found, "same": same}


def _counters(engine: Engine) -> dict[str, int]:
    guesses = engine.speculation
    return {
        "queries": engine.scheduler.prefix_queries,
        "hits": engine.scheduler.prefix_hits,
        "drafted": guesses.num_draft_tokens,
        "accepted": guesses.num_accepted_tokens,
    }


def _shares(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    grown = {name: after[name] - before[name] for name in after}
    found = {"cached_share": grown["hits"] / grown["queries"]} if grown["hits"] else {}
    return found | ({"accepted_share": grown["accepted"] / grown["drafted"]} if grown["drafted"] else {})


def _compared(off: Timings, on: Timings) -> list[bool]:
    """Of every request, whether its tokens are the same."""
    assert off.tokens.keys() == on.tokens.keys(), "both sides were asked the same"
    return [off.tokens[name] == on.tokens[name] for name in off.tokens]


def _same_output(cases: Sequence[Json]) -> Json:
    same = [one for case in cases for one in case["same"]]
    return {"what": "output", "same": sum(same), "of": len(same)}


# ------------------------------------------------------------------------------------------------------------- weights


def _weights_quality(off: Engine, on: Engine, inputs: Inputs) -> Json:
    texts = _written(off, inputs)
    same, judged = agreement(on.loaded, texts)
    sizes = [held_by(engine.loaded).weight_bytes for engine in (off, on)]
    layers = on.loaded.decoder
    weights = layers.config.matmul_parameters - layers.config.vocab_size * layers.config.hidden_size
    found: Json = {
        "what": "weights",
        "same": same,
        "of": judged,
        "weight_bytes": sizes,
        "layers_smaller_than_16_bits": 2 * weights / layers.layer_bytes,
    }
    if inputs.text is not None:
        _, text = _text_tokens(off, inputs.text)
        tokens = text[: inputs.size(PERPLEXITY_TOKENS, 64)]
        window = min(PERPLEXITY_WINDOW, off.max_model_len)
        found["perplexity"] = [measure(engine.loaded, tokens, window=window).value for engine in (off, on)]
        found["perplexity_of"] = f"{len(tokens)} tokens of {inputs.text.name} in windows of {window}"
    return found


def _written(engine: Engine, inputs: Inputs) -> list[tuple[list[int], int]]:
    """What the float32 model answers, greedily: (prompt and answer, where the answer begins)."""
    answer = inputs.size(64, 4)
    limit = engine.max_model_len - answer
    prompts = [engine.encode(text)[:limit] for kind in KINDS.values() for text in kind]
    timings = continuous(engine, [single(Ask(tuple(prompt), answer, ignore_eos=False)) for prompt in prompts], 4)
    return [(prompt + timings.tokens[f"{number}.0"], len(prompt)) for number, prompt in enumerate(prompts)]


def _text_tokens(engine: Engine, text: Path) -> tuple[list[int], list[int]]:
    """For calibration, and for perplexity: what follows."""
    try:
        tokens = engine.encode(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(text)!r}: {error}") from error
    cut = int(len(tokens) * CALIBRATION_SHARE)
    return tokens[:cut], tokens[cut:]


def int4_row(inputs: Inputs) -> Row:
    """The model rounded to 4 bits; what is made is kept in `work`, and found there by the next run."""
    group = inputs.size(64, 32)
    settings = Settings(method="awq" if inputs.text else "rtn", group_size=group, samples=CALIBRATION_WINDOWS)
    inputs.work.mkdir(parents=True, exist_ok=True)
    permuted, out = inputs.work / "permuted", inputs.work / f"{settings.method}-int4-g{group}"
    if not permuted.exists():
        permute(inputs.model, permuted)
    if not out.exists():
        calibration = _text_tokens(_engine(Side("", {}), inputs), inputs.text)[0] if inputs.text else None
        quantize(permuted, out, settings, calibration=calibration, progress=_progress)
    made = f"signalbox quantize MODEL --method {settings.method} --bits 4 --group-size {group} --out DIR"
    if inputs.text:
        made += f" --samples {CALIBRATION_WINDOWS} --calibration TEXT"
    on = Side(f"{settings.method} in 4 bits, groups of {group}", {"quantization": "auto"}, model=out, made=made)
    kept = weights_row(inputs, on)
    return replace(kept, on=replace(on, settings={**kept.off.settings, "quantization": "auto"}))


def _progress(done: int, total: int) -> None:
    print(f"  rounding: layer {done} of {total}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- command


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.bench_techniques",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("row", choices=[*ROWS, INT4])
    parser.add_argument("--model", required=True, type=Path, help="model folder or .gguf file")
    parser.add_argument("--trace", type=Path, help="CSV with a column GeneratedTokens; else lengths are drawn")
    parser.add_argument("--text", type=Path, help="UTF-8 text for calibration and perplexity")
    parser.add_argument("--draft", type=Path, help="folder of `signalbox distill-draft`, to guess with as well")
    parser.add_argument("--work", type=Path, default=Path("build/techniques"), help="folder for int4's weights")
    parser.add_argument("--turns", type=int, default=3, help="of each side (3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.turns < 1:
        parser.error(f"--turns must be at least 1, got {args.turns}")
    try:
        inputs = Inputs(args.model, args.work, args.trace, args.text, args.draft, args.turns, args.quick)
        result = bench(args.row, inputs)
    except SignalboxError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    text = json.dumps(result, indent=1)
    if args.json:
        args.json.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
