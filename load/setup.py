"""From what the user typed to plans: every option is read and checked here, before anything is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from load.arrivals import PROCESSES, Stage, parse_stages
from load.http1 import parse_url
from load.plan import PATHS, Arrivals, ClosedLoop, OpenLoop, Plan, Replayed, Target
from load.units import BadOption, seconds
from load.workload import Chat, Contents, Documents, Replay, Synthetic, Workload, parse_lengths, read_prompts
from policies.traces import TraceError, TraceRequest, read_trace, scaled


@dataclass(frozen=True, kw_only=True)
class Options:
    """One field per option of `signalbox load run`, as typed; the key is not among them."""

    url: str
    model: str | None = None
    endpoint: str = "chat"
    stream: bool = True
    rate: tuple[float, ...] = ()
    arrival: str = "poisson"
    burstiness: float = 1.0
    stages: str | None = None
    concurrency: int | None = None
    think: str = "0s"
    duration: str | None = None
    requests: int | None = None
    trace: Path | None = None
    time_scale: float = 1.0
    length_scale: int = 1
    prompt_tokens: str = "256"
    output_tokens: str = "128"
    shared_prefix: int = 0
    prefix_groups: int = 1
    turns: str | None = None
    documents: int | None = None
    document_tokens: str = "2000"
    prompts: Path | None = None
    token_ids: int | None = None
    ignore_eos: bool = False
    extra_body: str | None = None
    seed: int = 0
    workers: int = 1
    timeout: str = "300s"
    drain: str = "60s"
    warmup: str = "auto"
    insecure: bool = False
    metrics: bool = True

    def as_json(self) -> dict[str, Any]:
        """For the result file: only what is set."""
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(self).items()
            if value not in (None, (), False)
        }


def target_of(options: Options, api_key: str) -> Target:
    """The model is still what was typed, or "": see load.execute.choose_model."""
    if options.endpoint not in PATHS:
        raise BadOption(f"--endpoint must be chat or completions, got {options.endpoint!r}")
    return Target(
        parse_url(options.url),
        options.model or "",
        endpoint=options.endpoint,
        stream=options.stream,
        api_key=api_key,
        ignore_eos=options.ignore_eos,
        extra=_extra(options.extra_body),
        verify_tls=not options.insecure,
    )


def _extra(text: str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except ValueError as error:
        raise BadOption(f"--extra-body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadOption("--extra-body must be a JSON object")
    return found


def plans_of(options: Options, target: Target, *, keep_text: bool) -> list[tuple[str, Plan]]:
    """(label, plan): one, or one per --rate. Raises BadOption."""
    _check(options)
    trace = _trace(options)
    workload = workload_of(options, trace)
    common = {
        "target": target,
        "workload": workload,
        "seed": options.seed,
        "workers": options.workers,
        "timeout_s": _time(options.timeout, "--timeout", positive=True),
        "drain_s": _time(options.drain, "--drain"),
        "keep_text": keep_text,
        "scrape": options.metrics,
    }
    loads: list[tuple[str, Arrivals]] = [(f"{rate:g} requests/s", open_loop(options, rate)) for rate in options.rate]
    if not loads:
        loads = [_other_load(options, trace)]
    return [(label, Plan(arrivals=arrivals, **common)) for label, arrivals in loads]  # type: ignore[arg-type]


def _check(options: Options) -> None:
    given = {
        "--rate": bool(options.rate),
        "--stages": options.stages is not None,
        "--concurrency": options.concurrency is not None,
        "--trace": options.trace is not None,
    }
    named = [name for name, there in given.items() if there]
    if len(named) != 1:
        what = f"{' and '.join(named)} exclude each other" if named else "say how requests arrive"
        raise BadOption(f"{what}: --rate, --stages, --concurrency or --trace")
    contents = [
        name
        for name, there in (
            ("--trace", options.trace is not None),
            ("--prompts", options.prompts is not None),
            ("--turns", options.turns is not None),
            ("--documents", options.documents is not None),
        )
        if there
    ]
    if len(contents) > 1:
        raise BadOption(f"{' and '.join(contents)} exclude each other: each says what is asked")
    if options.endpoint == "completions" and options.turns is not None:
        raise BadOption("--turns is a conversation: it needs --endpoint chat")
    if options.token_ids is not None and (options.endpoint != "completions" or options.token_ids <= 256):
        raise BadOption("--token-ids takes the size of the vocabulary (over 256) and needs --endpoint completions")
    if any(not (0 < rate < math.inf) for rate in options.rate):
        raise BadOption("--rate must be above 0")
    if options.arrival not in PROCESSES:
        raise BadOption(f"--arrival must be one of {', '.join(PROCESSES)}, got {options.arrival!r}")
    if not 0.01 <= options.burstiness <= 1e6:
        raise BadOption("--burstiness must be at least 0.01")


def _time(text: str, option: str, *, positive: bool = False) -> float:
    try:
        value = seconds(text)
    except BadOption as error:
        raise BadOption(f"{option}: {error}") from None
    if positive and value <= 0:
        raise BadOption(f"{option} must be above 0")
    return value


def _duration(options: Options) -> float | None:
    return None if options.duration is None else _time(options.duration, "--duration", positive=True)


def open_loop(options: Options, rate: float) -> OpenLoop:
    duration, limit = _duration(options), options.requests
    if duration is None:
        # enough time for the wanted number, whatever the process' luck
        duration = 60.0 if limit is None else (limit + 10 * math.sqrt(limit / options.burstiness) + 20) / rate
    return OpenLoop((Stage(rate, rate, duration),), options.arrival, options.burstiness, limit)


def _other_load(options: Options, trace: list[TraceRequest] | None) -> tuple[str, Arrivals]:
    duration, limit = _duration(options), options.requests
    if options.concurrency is not None:
        if duration is None and limit is None:
            duration = 60.0
        think = _time(options.think, "--think")
        return f"{options.concurrency} callers", ClosedLoop(options.concurrency, duration, limit, think)
    if options.stages is not None:
        if duration is not None:
            raise BadOption("--stages has its own times: leave --duration away")
        stages = parse_stages(options.stages)
        return options.stages, OpenLoop(stages, options.arrival, options.burstiness, limit)
    assert trace is not None, "_check leaves nothing else"
    assert options.trace is not None, "it was read"
    due = tuple(one.arrival_s for one in trace if duration is None or one.arrival_s < duration)
    return f"trace {options.trace.name}", Replayed(due)


def _trace(options: Options) -> list[TraceRequest] | None:
    if options.trace is None:
        return None
    if not 0 < options.time_scale < math.inf or options.length_scale < 1:
        raise BadOption("--time-scale must be above 0 and --length-scale at least 1")
    try:
        found = read_trace(options.trace, options.requests)
    except (TraceError, OSError) as error:
        raise BadOption(f"--trace: {error}") from None
    return scaled(found, length_scale=options.length_scale, rate_scale=options.time_scale)


def workload_of(options: Options, trace: list[TraceRequest] | None) -> Workload:
    contents = Contents(options.seed, options.token_ids or 0)
    if trace is not None:
        return Replay(contents, tuple(trace))
    output = parse_lengths(options.output_tokens, "--output-tokens")
    if options.prompts is not None:
        found = read_prompts(options.prompts, output)
        if options.endpoint == "completions" and any(not isinstance(one.prompt, str) for one in found.entries):
            raise BadOption("--prompts: messages need --endpoint chat")
        return found
    prompt = parse_lengths(options.prompt_tokens, "--prompt-tokens")
    shared = {"prefix_tokens": options.shared_prefix, "groups": options.prefix_groups}
    if options.turns is not None:
        turns = parse_lengths(options.turns, "--turns")
        return Chat(contents, turns, prompt, output, think_s=_time(options.think, "--think"), **shared)
    if options.documents is not None:
        document = parse_lengths(options.document_tokens, "--document-tokens")
        return Documents(contents, options.documents, document, prompt, output)
    return Synthetic(contents, prompt, output, **shared)


def warmup_of(options: Options) -> str | float:
    if options.warmup in ("auto", "none"):
        return options.warmup
    try:
        return seconds(options.warmup)
    except BadOption:
        raise BadOption(f"--warmup must be auto, none or a time, got {options.warmup!r}") from None
