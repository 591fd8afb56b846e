"""What the engine's techniques are compared on: settings without and with each, and the traffic that both sides get.

Traffic is a function of (engine, seed), so that both sides of a turn get the same and no turn finds another's prompts
in a cache. Sizes are chosen for two CPU cores; `quick` ones only show that everything runs.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from replicas.engine.bench_batching import read_lengths
from replicas.engine.bench_drive import Ask, Talk, Timings, arriving, continuous, single, static
from replicas.engine.bench_spec import KINDS, REPORT, STORY
from replicas.engine.engine import Engine

DIVIDE = 16  # of a trace's output lengths
_QUESTIONS = (
    "Who paid for the first lighthouse?",
    "What happened in 1964?",
    "How many visitors does the museum have in a year?",
    "Do plants clean the air of an office?",
    "Tell me in one sentence what this is about.",
    "Which year was the worst for the harbour, and why?",
    "Why do the researchers recommend windows?",
    "Write a short invitation to the museum.",
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a user gave. trace: Azure CSV of output lengths; text: for calibration and perplexity; None: built in.

    draft: what `signalbox distill-draft` made for the model, to guess with beside the text itself.
    """

    model: Path
    work: Path
    trace: Path | None = None
    text: Path | None = None
    draft: Path | None = None
    turns: int = 3
    quick: bool = False

    @property
    def guesses(self) -> Mapping[str, Any]:
        """The `speculative` setting."""
        if self.draft is None:
            return {"method": "ngram"}
        return {"method": ("ngram", "draft_model"), "model": str(self.draft)}

    def size(self, whole: int, quick: int) -> int:
        return quick if self.quick else whole


@dataclass(frozen=True, slots=True)
class Side:
    """means: in words, what a fleet file cannot say included. model: None is the user's."""

    means: str
    settings: Mapping[str, Any]
    model: Path | None = None
    made: str = ""  # the command that makes `model`

    @property
    def fleet(self) -> str:
        """As a line of a fleet file's model."""
        line = f"engine_settings: {flow(self.settings)}"
        return f"{line}  # source: what `{self.made}` writes" if self.made else line


def flow(value: Any) -> str:
    """YAML in flow style, of what settings are made of; of a path its last part, for results travel."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    return str(value)


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of traffic. run(engine, with the technique, seed). ttft_of, itl_of: whose latencies count."""

    workload: str
    run: Callable[[Engine, bool, int], Timings]
    ttft_of: Callable[[str], bool] = lambda name: True
    itl_of: Callable[[str], bool] = lambda name: True


@dataclass(frozen=True, slots=True)
class Row:
    """lossless: both sides must write the same tokens; else quality is measured against the side without."""

    off: Side
    on: Side
    cases: tuple[Case, ...]
    lossless: bool = True


def _tokens(engine: Engine, rng: random.Random, number: int) -> tuple[int, ...]:
    return tuple(rng.randrange(engine.card.vocab_size) for _ in range(number))


def output_lengths(inputs: Inputs, number: int, seed: int) -> tuple[list[int], str]:
    """That many, and where they are from."""
    if inputs.trace is not None:
        lengths = read_lengths(inputs.trace, DIVIDE, number, seed)
        return [lengths[i % len(lengths)] for i in range(number)], f"{inputs.trace.name} / {DIVIDE}"
    rng = random.Random(seed)
    return [min(max(1, round(rng.lognormvariate(2.1, 0.9))), 64) for _ in range(number)], "log-normal, median 8"


# ------------------------------------------------------------------------------------------------------------ traffic


def _batching(inputs: Inputs, slots: int) -> Case:
    number, prompt = inputs.size(96, 12), 12
    _, origin = output_lengths(inputs, number, 0)

    def run(engine: Engine, on: bool, seed: int) -> Timings:
        rng = random.Random(seed)
        lengths, _ = output_lengths(inputs, number, seed)
        talks = [single(Ask(_tokens(engine, rng, prompt), length)) for length in lengths]
        return (continuous if on else static)(engine, talks, slots, backlog=True)

    return Case(f"{number} requests due at once, {slots} slots, prompts of {prompt} tokens, outputs {origin}", run)


def chat(engine: Engine, seed: int, prefix_tokens: int, groups: int, turns: int, lengths: Sequence[int]) -> list[Talk]:
    """A session for each length of an answer; a system prompt of so many tokens is shared by the sessions of a
    group."""

    def system(group: int) -> list[int]:
        text = f"<|im_start|>system\nYou are help desk {seed}.{group}. " + f"{STORY} {REPORT} " * 4
        return engine.encode(text)[:prefix_tokens]

    def session(number: int, answer: int) -> Talk:
        known, closing = system(number % groups), "<|im_end|>\n"
        for turn in range(turns):
            question = _QUESTIONS[(number + turn) % len(_QUESTIONS)]
            asked = f"{closing}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            known = [*known, *engine.encode(asked)]
            known += yield Ask(tuple(known), answer)

    return [session(number, answer) for number, answer in enumerate(lengths)]


def _shared_prefix(inputs: Inputs, slots: int) -> Case:
    sessions, turns, answer = inputs.size(9, 3), inputs.size(2, 2), inputs.size(16, 4)
    groups, prefix = 3, inputs.size(400, 40)

    def run(engine: Engine, on: bool, seed: int) -> Timings:
        return continuous(engine, chat(engine, seed, prefix, groups, turns, [answer] * sessions), slots)

    says = f"{sessions} chat sessions of {turns} turns, {slots} at once, {groups} system prompts of {prefix} tokens, "
    return Case(says + f"answers of {answer}", run)


def _long_prompts(inputs: Inputs) -> Case:
    chats, answer = 4, inputs.size(96, 12)
    long, prompt, every_s = 2, inputs.size(1024, 100), inputs.size(20, 1) / 10

    def run(engine: Engine, on: bool, seed: int) -> Timings:
        rng = random.Random(seed)
        arrivals = [(0.0, f"chat{n}", Ask(_tokens(engine, rng, 12), answer)) for n in range(chats)]
        arrivals += [(every_s * (n + 0.5), f"long{n}", Ask(_tokens(engine, rng, prompt), 8)) for n in range(long)]
        return arriving(engine, arrivals)

    return Case(
        f"{chats} answers of {answer} tokens being written (ITL) while {long} prompts of {prompt} tokens arrive, one "
        f"each {every_s:g} s (TTFT)",
        run,
        ttft_of=lambda name: name.startswith("long"),
        itl_of=lambda name: name.startswith("chat"),
    )


def _texts(inputs: Inputs, kind: str) -> Case:
    answer, prompts = inputs.size(64, 6), KINDS[kind][: inputs.size(2, 1)]

    def run(engine: Engine, on: bool, seed: int) -> Timings:
        limit = engine.max_model_len - answer
        asks = [Ask(tuple(engine.encode(prompt)[:limit]), answer, ignore_eos=False) for prompt in prompts]
        return continuous(engine, [single(ask) for ask in asks], 1)

    return Case(f"{kind}: {len(prompts)} prompts, one at a time, answers of up to {answer} tokens", run)


def _plain(inputs: Inputs, number: int, slots: int) -> Case:
    prompt, answer = inputs.size(128, 16), inputs.size(48, 4)

    def run(engine: Engine, on: bool, seed: int) -> Timings:
        rng = random.Random(seed)
        return continuous(
            engine, [single(Ask(_tokens(engine, rng, prompt), answer)) for _ in range(number)], slots, backlog=True
        )

    return Case(f"{number} requests, {slots} at once, prompts of {prompt}, answers of {answer} tokens", run)


def _everything(inputs: Inputs, slots: int) -> Case:
    sessions, turns, groups, prefix = inputs.size(12, 3), 2, 3, inputs.size(400, 40)
    _, origin = output_lengths(inputs, sessions, 0)

    def run(engine: Engine, on: bool, seed: int) -> Timings:
        lengths = [min(2 * length, inputs.size(96, 6)) for length in output_lengths(inputs, sessions, seed)[0]]
        talks = chat(engine, seed, prefix, groups, turns, lengths)
        return (continuous if on else static)(engine, talks, slots, backlog=True)

    says = f"{sessions} chat sessions of {turns} turns, {slots} at once, {groups} system prompts of {prefix} tokens, "
    return Case(says + f"answers of twice {origin}", run)


# --------------------------------------------------------------------------------------------------------------- rows

_KV = {"kv_memory_gib": 0.75}
_CONTINUOUS = "requests enter as others leave"
_STATIC = "batches that start and end together (no setting: the engine always batches continuously)"


def _batching_row(inputs: Inputs) -> Row:
    settings = {"max_num_seqs": 16, "enable_prefix_caching": False, **_KV}
    return Row(Side(_STATIC, settings), Side(_CONTINUOUS, settings), (_batching(inputs, 16),))


def _prefix_row(inputs: Inputs) -> Row:
    off, on = ({"enable_prefix_caching": on, **_KV} for on in (False, True))
    return Row(Side("every prompt computed whole", off), Side("cached blocks reused", on), (_shared_prefix(inputs, 4),))


def _chunked_row(inputs: Inputs) -> Row:
    off, on = ({"max_num_batched_tokens": most, "enable_prefix_caching": False, **_KV} for most in (2048, 256))
    case = _long_prompts(inputs)
    return Row(Side("a prompt in one step", off), Side("at most 256 tokens a step (default)", on), (case,))


def _speculation_row(inputs: Inputs) -> Row:
    settings = {"quantization": "none", "max_num_seqs": 1, "enable_prefix_caching": False, **_KV}
    on = {"speculative": inputs.guesses, **settings}
    cases = tuple(_texts(inputs, kind) for kind in KINDS)
    who = "prompt lookup and a draft guess" if inputs.draft else "prompt lookup guesses"
    off = Side("float32 weights, a token a step", settings)
    return Row(off, Side(f"float32 weights, {who}, the model verifies", on), cases)


def weights_row(inputs: Inputs, on: Side) -> Row:
    """Float32 weights against others."""
    off = Side("float32 weights", {"quantization": "none", **_PLAIN})
    cases = (_plain(inputs, inputs.size(8, 2), inputs.size(8, 2)), _plain(inputs, 1, 1))
    return Row(off, on, cases, lossless=False)


_PLAIN = {"enable_prefix_caching": False, **_KV}


def _int8_row(inputs: Inputs) -> Row:
    return weights_row(inputs, Side("rounded to 8 bits at load", {"quantization": "int8", **_PLAIN}))


def _stored_row(inputs: Inputs) -> Row:
    return weights_row(inputs, Side("4 bits as the GGUF stores them (default)", {"quantization": "auto", **_PLAIN}))


def _together_row(inputs: Inputs) -> Row:
    base = {"max_num_seqs": 8, **_KV}
    off = {"quantization": "none", "enable_prefix_caching": False, "max_num_batched_tokens": 2048, **base}
    on = {"quantization": "auto", "enable_prefix_caching": True, "max_num_batched_tokens": 256, **base}
    on["speculative"] = inputs.guesses
    says = "continuous batching, prefix cache, chunked prefill, speculation, weights as stored"
    return Row(Side(f"float32 weights, {_STATIC}", off), Side(says, on), (_everything(inputs, 8),))


ROWS: dict[str, Callable[[Inputs], Row]] = {
    "continuous-batching": _batching_row,
    "prefix-cache": _prefix_row,
    "chunked-prefill": _chunked_row,
    "speculation": _speculation_row,
    "int8": _int8_row,
    "int4-as-stored": _stored_row,
    "all-together": _together_row,
}
