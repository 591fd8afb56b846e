"""What quantisation costs in quality and saves in memory: one table, each row against float32 in the same run.

    python -m replicas.engine.bench_quant --model MODEL --text wikitext2_valid.txt --json FILE

The model's channels first change places by a seeded permutation that leaves its function as it was
(quantizers/permute.py): a GGUF that holds 4-bit groups already would otherwise flatter every method that uses the same
groups; the first two rows show that float32 perplexity stays. The text is cut in two: methods are calibrated on its
first fifth, and perplexity (windowed, see evaluation.py) is measured on what follows, which they have not seen.

What is made lies in --work and is taken up again by the next run with the same settings, so a stopped run goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from replicas.engine.config import EngineConfig
from replicas.engine.evaluation import measure
from replicas.engine.loading import load
from replicas.engine.quantizers import Settings, quantize
from replicas.engine.quantizers.permute import permute
from replicas.engine.tokenizer import Tokenizer
from replicas.engine.weights import open_checkpoint, read_json
from replicas.protocol import SignalboxError

CALIBRATION_SHARE = 0.2
SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """change: of perplexity, relative to float32 on permuted channels. file_times, memory_times: how much smaller the
    layers' matrices are than in 16 bits, scales and zeros included; None where they are not quantised."""

    name: str
    perplexity: float
    change: float
    file_times: float | None = None
    memory_times: float | None = None
    seconds: float


@dataclass(frozen=True, slots=True)
class Target:
    says: str
    held: Callable[[dict[str, Row]], bool]


def _better_than_rtn(method: str, rows: dict[str, Row]) -> bool:
    return rows[f"{method} INT4 g64"].perplexity < rows["rtn INT4 g64"].perplexity


def _smaller(prefix: str, times: float, rows: dict[str, Row]) -> bool:
    figures = [figure for row in rows.values() if prefix in row.name for figure in (row.file_times, row.memory_times)]
    return all(figure >= times for figure in figures if figure is not None)


TARGETS = (
    Target(
        "the permutation leaves float32 perplexity as it was (0.1 %)", lambda rows: abs(rows["fp32"].change) < 0.001
    ),
    Target("INT8 within 0.5 % of float32", lambda rows: rows["INT8"].change < 0.005),
    Target("AWQ INT4 g64 better than RTN", partial(_better_than_rtn, "awq")),
    Target("GPTQ INT4 g64 better than RTN", partial(_better_than_rtn, "gptq")),
    Target(
        "the better of the two within 6 % of float32",
        lambda rows: min(rows["awq INT4 g64"].change, rows["gptq INT4 g64"].change) < 0.06,
    ),
    Target("INT8 layers at least 1.9x smaller, in file and memory", partial(_smaller, "INT8", 1.9)),
    Target("INT4 layers at least 3.3x smaller, in file and memory", partial(_smaller, "INT4", 3.3)),
)


class Bench:
    """tokens: calibration, evaluation. Everything that it makes lies in `work`."""

    def __init__(self, model: Path, work: Path, tokens: tuple[list[int], list[int]], window: int, samples: int) -> None:
        self._model, self._work, self._window, self._samples = model, work, window, samples
        self._calibration, self._text = tokens
        self._base = 0.0

    def rows(self) -> Iterator[Row]:
        permuted = self._work / "permuted"
        if not permuted.exists():
            permute(self._model, permuted, seed=SEED)
        self._base = self._measure(permuted, quantization="none")["perplexity"]
        yield self._row("fp32", self._model, quantization="none")
        yield self._row("fp32, channels permuted", permuted, quantization="none")
        yield self._row("INT8", permuted, quantization="int8")
        yield self._quantized("rtn INT8 g64", permuted, Settings(method="rtn", bits=8))
        for group in (32, 64):
            for method in ("rtn", "awq", "gptq"):
                yield self._quantized(f"{method} INT4 g{group}", permuted, Settings(method=method, group_size=group))
        yield self._quantized("gptq INT2 g32", permuted, Settings(method="gptq", bits=2, group_size=32))
        yield self._row("KV cache fp8_e4m3", permuted, quantization="none", kv_cache_dtype="fp8_e4m3")
        yield self._row("KV cache fp8_e4m3_head", permuted, quantization="none", kv_cache_dtype="fp8_e4m3_head")
        yield self._row("KV cache int8", permuted, quantization="none", kv_cache_dtype="int8")

    def _quantized(self, name: str, source: Path, settings: Settings) -> Row:
        settings = replace(settings, samples=self._samples)
        out = self._work / name.replace(" ", "-")
        record = out.with_suffix(".json")
        if not (out.exists() and record.exists()):
            calibration = self._calibration if settings.calibrated else None
            made = quantize(source, out, settings, calibration=calibration)
            record.write_text(json.dumps({"times_smaller": made.times_smaller}))
        return self._row(name, out, file_times=read_json(record)["times_smaller"])

    def _row(self, name: str, model: Path, file_times: float | None = None, **settings: str) -> Row:
        found = self._measure(model, **settings)
        return Row(
            name=name,
            perplexity=found["perplexity"],
            change=found["perplexity"] / self._base - 1,
            file_times=file_times,
            memory_times=found["memory_times"] if found["quantized"] else None,
            seconds=found["seconds"],
        )

    def _measure(self, model: Path, **settings: str) -> dict[str, Any]:
        """Measured once: the figures are kept beside the models."""
        key = "-".join((model.name, *settings.values(), str(len(self._text)), str(self._window)))
        record = self._work / f"figures-{key}.json"
        if record.exists():
            return read_json(record)
        loaded = load(EngineConfig(model=str(model), **settings))  # type: ignore[arg-type]
        found = measure(loaded, self._text, window=self._window)
        decoder = loaded.decoder
        weights = decoder.config.matmul_parameters - decoder.config.vocab_size * decoder.config.hidden_size
        figures = {
            "perplexity": found.value,
            "memory_times": 2 * weights / decoder.layer_bytes,
            "quantized": decoder.layer_bytes < 2 * weights,
            "seconds": found.seconds,
        }
        record.write_text(json.dumps(figures))
        del loaded, decoder
        gc.collect()
        return figures


def _line(row: Row) -> str:
    def times(figure: float | None) -> str:
        return "" if figure is None else f"{figure:.2f}x"

    return (
        f"{row.name:<26}{row.perplexity:>11.4f}{row.change:>+10.2%}"
        f"{times(row.file_times):>9}{times(row.memory_times):>9}{row.seconds:>8.0f}"
    )


def _tokens(model: Path, text: Path, limit: int | None) -> tuple[list[int], list[int]]:
    tokens = Tokenizer.load(open_checkpoint(model)).encode(text.read_text(encoding="utf-8"))
    cut = int(len(tokens) * CALIBRATION_SHARE)
    return tokens[:cut], tokens[cut:][:limit]


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    args.work.mkdir(parents=True, exist_ok=True)
    tokens = _tokens(args.model, args.text, args.limit_tokens)
    print(
        f"{args.model.name}, {args.text.name}: calibrated on its first {len(tokens[0])} tokens, perplexity of the next"
    )
    print(
        f"{len(tokens[1])} in windows of {args.window}; channels permuted with seed {SEED}; "
        f"{torch.get_num_threads()} threads\n"
    )
    print(f"{'':<26}{'perplexity':>11}{'change':>10}{'file':>9}{'memory':>9}{'s':>8}")
    rows: dict[str, Row] = {}
    for row in Bench(args.model, args.work, tokens, args.window, args.samples).rows():
        rows[row.name] = row
        print(_line(row), flush=True)
    print("\nfile, memory: how much smaller the layers' matrices are than in 16 bits, scales and zeros included")
    held = {target.says: target.held(rows) for target in TARGETS}
    for says, holds in held.items():
        print(f"{'yes' if holds else 'NO':>4}  {says}")
    print(f"{time.perf_counter() - started:.0f} s")
    if args.json:
        document = {
            "model": args.model.name,
            "text": args.text.name,
            "calibration_tokens": len(tokens[0]),
            "tokens": len(tokens[1]),
            "window": args.window,
            "rows": [asdict(row) for row in rows.values()],
            "targets": held,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0 if all(held.values()) else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.bench_quant",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, help="model folder or .gguf file")
    parser.add_argument("--text", required=True, type=Path, help="UTF-8 text")
    parser.add_argument("--work", type=Path, default=Path("build/bench-quant"), help="folder for what is made")
    parser.add_argument("--window", type=int, default=512, help="tokens computed together (default 512)")
    parser.add_argument("--limit-tokens", type=int, default=8192, help="tokens to predict (default 8192)")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens (default 32)")
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        return run(args)
    except SignalboxError as error:
        print(f"bench_quant: {error.message}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
