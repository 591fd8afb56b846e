"""Speculative decoding against the same engine without it, on three kinds of text, taking turns in one run.

    python -m replicas.engine.bench_spec --model PATH --try '{"method": "ngram"}' --try '{"method": …}'

Greedy, so every method writes the same text. Decoding only is timed: from a request's first token to its last. A table
for each batch size has one row a kind and method:

    tok/s      output tokens a second; x off: against speculation off, the median of the turns' own ratios
    accepted   share of the guesses that were right; tokens/step: brought by a sequence in one of its steps
    k          guesses a sequence and step in the four quarters of the run
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field, replace

from replicas.engine.config import EngineConfig
from replicas.engine.engine import Engine
from replicas.engine.spec.build import build_speculation
from replicas.engine.spec.config import Speculative
from replicas.engine.spec.speculation import Speculation
from replicas.protocol import ConfigError, GenerateRequest, SamplingParams, SignalboxError

STORY = (
    "The harbour of Lindesnes was built in 1843, after three ships were lost on the rocks in a single winter. "
    "A local merchant, Anna Solberg, paid for the first lighthouse herself and kept its lamp burning for "
    "eleven years. When the railway came, the harbour lost most of its trade, and by 1920 only fishing boats "
    "used it. In 1964 the lighthouse was made automatic. Today it is a museum with thirty thousand visitors a "
    "year, most of whom come in July and August. The museum shows the old lamp, the logbooks of the keepers, "
    "and a model of the harbour as it was in 1850."
)
REPORT = (
    "Researchers measured how well houseplants clean the air of offices. In a sealed chamber, a spider plant "
    "removed half of the formaldehyde within a day. In a real office, however, the windows, the doors and the "
    "ventilation exchange the air many times an hour, and the plants made no difference that could be "
    "measured. To match a ventilation system, an office would need about ten plants on every square metre. The"
    " researchers recommend plants because people like them, and windows because they work."
)
_CLASS = '''class Point:
    def __init__(self, x, y, z):
        self.x = x
        self.y = y
        self.z = z

    def get_x(self):
        """Return the x coordinate."""
        return self.x

    def set_x(self, value):
        """Set the x coordinate."""
        self.x = value

    def get_y(self):
        """Return the y coordinate."""
        return self.y

    def set_y(self, value):
        """Set the y coordinate."""
        self.y = value
'''
_TABLE = """INSERT INTO cities (id, name, country, population) VALUES (1, 'Oslo', 'Norway', 709037);
INSERT INTO cities (id, name, country, population) VALUES (2, 'Bergen', 'Norway', 291189);
INSERT INTO cities (id, name, country, population) VALUES (3, 'Stockholm', 'Sweden', 984748);
INSERT INTO cities (id, name, country, population) VALUES (4, 'Malmo', 'Sweden', 357377);
"""
_ASK_CODE = "Write this Python code again, with the class renamed to Vector, and nothing else changed:\n\n"


# what SmolLM2's chat template makes of a user's message
_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def _chat(text: str) -> str:
    return f"{_SYSTEM}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


KINDS: dict[str, list[str]] = {
    "chat": [
        _chat("What should I see on a weekend in Lisbon?"),
        _chat("Explain how a refrigerator works."),
        _chat("Write a short letter to my landlord about a leaking tap."),
        _chat("What are good habits for learning a language?"),
    ],
    "code, repeating": [_CLASS + "\n", _TABLE, _chat(f"{_ASK_CODE}```python\n{_CLASS}```")],
    "summarise": [
        _chat(f"Summarize the following text:\n\n{STORY}"),
        _chat(f"Summarize the following text:\n\n{REPORT}"),
        _chat(f"List the key facts of this text:\n\n{STORY}"),
    ],
}


@dataclass(slots=True)
class Run:
    """One method's decoding of one batch: seconds and tokens after each sequence's first; guesses by step."""

    seconds: float = 0.0
    tokens: int = 0
    moves: int = 0
    drafted: int = 0
    accepted: int = 0
    lengths: list[float] = field(default_factory=list)

    def add(self, other: Run) -> None:
        for name in ("seconds", "tokens", "moves", "drafted", "accepted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths += other.lengths

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def run(engine: Engine, prompts: list[str], output: int) -> Run:
    params = SamplingParams(max_tokens=output, temperature=0.0)
    for i, prompt in enumerate(prompts):
        ids = tuple(engine.encode(prompt))
        engine.add(GenerateRequest(request_id=str(i), prompt_token_ids=ids, sampling=params))
    done, begun = Run(), set[str]()
    while engine.has_work():
        guesses = engine.speculation
        drafted, accepted, decoding = guesses.num_draft_tokens, guesses.num_accepted_tokens, len(begun) == len(prompts)
        started = time.perf_counter()
        chunks = engine.step()
        seconds = time.perf_counter() - started
        begun |= {chunk.request_id for chunk in chunks}
        if not decoding:
            continue
        drafted = guesses.num_draft_tokens - drafted
        done.seconds += seconds
        done.tokens += sum(len(chunk.token_ids) for chunk in chunks)
        done.moves += len(chunks)
        done.drafted += drafted
        done.accepted += guesses.num_accepted_tokens - accepted
        done.lengths.append(drafted / max(len(chunks), 1))
    return done


def measure(
    engine: Engine, methods: dict[str, Speculation], batches: list[list[str]], output: int, turns: int
) -> dict[str, tuple[Run, float]]:
    """By method: everything of all turns together, and the median ratio of its rate to that of "off"."""
    whole = {name: Run() for name in methods}
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(turns):
        for prompts in batches:
            rates = {}
            names = list(methods)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always goes first
                engine.use(methods[name])
                one = run(engine, prompts, output)
                if one.tokens:
                    whole[name].add(one)
                    rates[name] = one.rate
            for name, rate in rates.items():
                ratios[name].append(rate / rates["off"])
    return {name: (whole[name], statistics.median(ratios[name])) for name in methods}


def show(kind: str, figures: dict[str, tuple[Run, float]]) -> None:
    for name, (done, ratio) in figures.items():
        quarters = [done.lengths[i * len(done.lengths) // 4 : (i + 1) * len(done.lengths) // 4] for i in range(4)]
        ks = " ".join(f"{statistics.fmean(part):.1f}" if part else "-" for part in quarters)
        right = f"{done.accepted / done.drafted:.0%}" if done.drafted else "-"
        print(
            f"{kind:<16} {name:<18} {done.rate:7.1f} {ratio:6.2f}x {right:>9} {done.tokens / done.moves:12.2f}   {ks}",
            flush=True,
        )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m replicas.engine.bench_spec",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="model folder or .gguf file")
    parser.add_argument("--try", dest="tried", action="append", default=[], help="speculative settings as JSON (ngram)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="requests at once (1 16)")
    parser.add_argument("--output", type=int, default=128, help="output tokens of a request, at most (128)")
    parser.add_argument("--turns", type=int, default=2, help="rounds (2)")
    parser.add_argument("--quantization", default="auto", help="of the weights, as in a fleet file (auto)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's own choice)")
    return parser


def bench(args: argparse.Namespace) -> None:
    config = EngineConfig(
        model=args.model,
        num_threads=args.threads,
        quantization=args.quantization,
        max_model_len=1024,
        kv_memory_gib=1.5,
    )
    engine = Engine(config)
    methods = {"off": Speculation((), 0)}
    for text in args.tried or ['{"method": "ngram"}']:
        settings = _settings(text)
        speculation = build_speculation(replace(config, speculative=settings), engine.loaded, engine.max_model_len)
        speculation.cost.calibrate(engine.measure_steps())
        methods[" + ".join(settings.methods)] = speculation
    costs = engine.measure_steps()
    print("milliseconds of a step by rows:", "  ".join(f"{rows}: {s * 1e3:.1f}" for rows, s in costs.items()))
    for batch in args.batch:
        print(f"\nbatch {batch}\n{'kind':<16} {'method':<18} {'tok/s':>7} {'x off':>7} {'accepted':>9} tokens/step   k")
        kinds = KINDS if batch == 1 else {"all kinds": [prompt for prompts in KINDS.values() for prompt in prompts]}
        for kind, prompts in kinds.items():
            if batch == 1:
                batches = [[prompt] for prompt in prompts]
            else:  # two mixtures: with one the median would stand on few ratios
                batches = [[prompts[(first + i) % len(prompts)] for i in range(batch)] for first in (0, batch // 2)]
            show(kind, measure(engine, methods, batches, args.output, args.turns))


def _settings(text: str) -> Speculative:
    try:
        given = json.loads(text)
        given["method"] = tuple(given["method"]) if isinstance(given["method"], list) else given["method"]
        return Speculative(**given)
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"--try {text!r}: {error}") from error


def main() -> int:
    try:
        bench(arguments().parse_args())
    except SignalboxError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
