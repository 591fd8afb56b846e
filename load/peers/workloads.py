"""What every server of a kind is asked: the same plans, the same prompts, whoever answers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from load.plan import Arrivals, ClosedLoop, Plan, Target
from load.workload import Chat, Contents, Synthetic, Workload, parse_lengths

MODEL, GATEWAY, ECHO = "model servers", "gateways", "echo"
KINDS = (MODEL, GATEWAY, ECHO)

PROMPT, OUTPUT = 128, 64
STREAM = 64
CALLERS = 16
# Servers that send a whole stream at once give the generator all callers' events in one burst, and whoever is due
# meanwhile waits for it to be read: more callers than these would make it late.
STREAM_CALLERS = 4
ALONE = "one at a time"


@dataclass(frozen=True, slots=True)
class Task:
    """output: tokens that every answer is to have. counts: whether its figures do."""

    name: str
    workload: Workload
    arrivals: Arrivals
    output: int
    stream: bool = True
    counts: bool = True

    def plan(self, target: Target) -> Plan:
        # a slow server may take minutes over what eight callers asked of it last
        return Plan(replace(target, stream=self.stream), self.workload, self.arrivals, drain_s=180.0, scrape=False)


def tasks(kind: str, seconds: float) -> tuple[Task, ...]:
    """Every task lasts that long and has words of its own, so that no prefix cache knows them from the one before."""
    return _of_models(seconds) if kind == MODEL else _of_gateways(seconds)


def warm_up() -> Task:
    """What is asked before anything is counted: connections, caches and compiled shapes for several callers."""
    task = _fixed("warm-up", 8, PROMPT, 8, 0, seed=9)
    return replace(task, arrivals=ClosedLoop(8, limit=8), counts=False)


def _of_models(seconds: float) -> tuple[Task, ...]:
    chat = Chat(
        Contents(seed=3),
        turns=parse_lengths("3", "turns"),
        prompt=parse_lengths("32", "prompt"),
        output=parse_lengths("32", "output"),
        prefix_tokens=256,
        groups=2,
    )
    return (
        _fixed(f"1 caller, {PROMPT} in, {OUTPUT} out", 1, PROMPT, OUTPUT, seconds, seed=1),
        _fixed(f"8 callers, {PROMPT} in, {OUTPUT} out", 8, PROMPT, OUTPUT, seconds, seed=2),
        Task("chat: 4 callers, 256 shared", chat, ClosedLoop(4, seconds), 32),
    )


def _of_gateways(seconds: float) -> tuple[Task, ...]:
    unary = _fixed(f"{CALLERS} callers, whole answers", CALLERS, 32, 1, seconds, seed=1)
    return (
        _fixed(ALONE, 1, 32, 8, seconds, seed=2),
        replace(unary, stream=False),
        _fixed(f"{STREAM_CALLERS} callers, streams of {STREAM}", STREAM_CALLERS, 32, STREAM, seconds, seed=3),
    )


def _fixed(name: str, callers: int, prompt: int, output: int, seconds: float, *, seed: int) -> Task:
    lengths = parse_lengths(str(prompt), "prompt"), parse_lengths(str(output), "output")
    return Task(name, Synthetic(Contents(seed=seed), *lengths), ClosedLoop(callers, seconds), output)
