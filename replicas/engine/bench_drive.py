"""Ways to put work through an engine, and when every token came: what benchmarks of scheduling share.

A talk is a generator: it yields what to ask, is sent the answer's tokens, and asks again until it has nothing more. A
caller of a closed loop holds one talk at a time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from replicas.engine.engine import Engine
from replicas.protocol import Chunk, GenerateRequest, SamplingParams

_runs = count()  # an engine must not meet a request's id twice


@dataclass(frozen=True, slots=True)
class Ask:
    """wanted: tokens of the answer; fewer only where ignore_eos is False and the model ends it."""

    prompt: tuple[int, ...]
    wanted: int
    ignore_eos: bool = True

    def request(self, request_id: str, wanted: int | None = None) -> GenerateRequest:
        params = SamplingParams(max_tokens=wanted or self.wanted, temperature=0, ignore_eos=self.ignore_eos)
        return GenerateRequest(request_id=request_id, prompt_token_ids=self.prompt, sampling=params)


Talk = Generator[Ask, list[int], None]


def single(ask: Ask) -> Talk:
    yield ask


class Timings:
    """One run's requests by name ("talk.turn"): when each was due, when its tokens came, and which they were.

    Tokens beyond those wanted are not counted. Times are seconds of perf_counter.
    """

    def __init__(self) -> None:
        self._run = next(_runs)
        self.started = self.ended = time.perf_counter()
        self.due: dict[str, float] = {}
        self.events: dict[str, list[tuple[float, int]]] = {}  # (when, how many tokens)
        self.tokens: dict[str, list[int]] = {}
        self._wanted: dict[str, int] = {}

    def ask(self, engine: Engine, name: str, ask: Ask, *, due: float, wanted: int | None = None) -> None:
        """Submit it. wanted: tokens to compute, where that is more than what counts."""
        self.due[name], self._wanted[name] = due, ask.wanted
        self.events[name], self.tokens[name] = [], []
        engine.add(ask.request(f"{self._run}/{name}", wanted))

    def step(self, engine: Engine) -> list[str]:
        """One step of the engine; the requests that ended with it. Raises what a request failed of."""
        chunks = engine.step()
        self.ended = time.perf_counter()
        return [name for chunk in chunks if (name := self._take(chunk)) and chunk.terminal]

    def _take(self, chunk: Chunk) -> str:
        if chunk.error is not None:
            raise chunk.error
        name = chunk.request_id.partition("/")[2]
        new = chunk.token_ids[: self._wanted[name] - len(self.tokens[name])]
        if new:
            self.events[name].append((self.ended, len(new)))
            self.tokens[name] += new
        return name

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    @property
    def output_tokens(self) -> int:
        return sum(map(len, self.tokens.values()))

    def figures(
        self, ttft_of: Callable[[str], bool] = lambda name: True, itl_of: Callable[[str], bool] = lambda name: True
    ) -> dict[str, float]:
        """Throughput of all; TTFT and E2E, ITL of the requests whose names are chosen. docs/load.md defines them."""
        named = [name for name in self.events if self.events[name]]
        ttft = [self.events[name][0][0] - self.due[name] for name in named if ttft_of(name)]
        e2e = [self.events[name][-1][0] - self.due[name] for name in named if ttft_of(name)]
        itl = self._gaps([name for name in named if itl_of(name)])
        found = {"tokens_per_s": self.output_tokens / self.seconds, "seconds": self.seconds}
        for metric, values in (("ttft", ttft), ("e2e", e2e), ("itl", itl)):
            if len(values):
                found[f"{metric}_p50_s"], found[f"{metric}_p95_s"] = np.percentile(values, (50, 95)).tolist()
        if len(itl):
            found["itl_max_s"] = float(itl.max())
        return found

    def _gaps(self, names: Sequence[str]) -> NDArray[np.float64]:
        """A gap between events divided by the tokens of the one that ended it, once for each of them."""
        parts = [np.empty(0)]
        for name in names:
            times = np.array([when for when, _ in self.events[name]])
            tokens = np.array([number for _, number in self.events[name]])[1:]
            parts.append(np.repeat(np.diff(times) / tokens, tokens))
        return np.concatenate(parts)


def continuous(engine: Engine, talks: Iterable[Talk], slots: int, *, backlog: bool = False) -> Timings:
    """A talk enters whenever one of `slots` is free, and asks again as soon as it has its answer.

    backlog: first requests are due at the start, so that waiting for a slot counts; else when their slot is free.
    """
    queue, held, timings = deque(enumerate(talks)), dict[str, tuple[int, int, Talk]](), Timings()

    def go_on(number: int, turn: int, talk: Talk, answer: list[int] | None) -> None:
        try:
            ask = next(talk) if answer is None else talk.send(answer)
        except StopIteration:
            return
        name = f"{number}.{turn}"
        held[name] = (number, turn, talk)
        timings.ask(engine, name, ask, due=timings.started if backlog and turn == 0 else time.perf_counter())

    while queue or held:
        while queue and len(held) < slots:
            number, talk = queue.popleft()
            go_on(number, 0, talk, None)
        for name in timings.step(engine):
            number, turn, talk = held.pop(name)
            go_on(number, turn + 1, talk, timings.tokens[name])
    return timings


def static(engine: Engine, talks: Iterable[Talk], batch: int, *, padded: bool = True, backlog: bool = False) -> Timings:
    """Batches that start and end together; the next turn of a batch's talks is the next batch.

    padded: a request that has its tokens computes on until the longest of its batch has (before Orca, Yu et al. 2022);
    else it at least stops computing.
    """
    everyone, timings = list(talks), Timings()
    for start in range(0, len(everyone), batch):
        part = dict(enumerate(everyone[start : start + batch], start))
        asks, turn = {number: next(talk) for number, talk in part.items()}, 0
        while asks:
            due = timings.started if backlog and turn == 0 else time.perf_counter()
            longest = max(ask.wanted for ask in asks.values())
            for number, ask in asks.items():
                assert ask.ignore_eos, "a request that may end early cannot be padded"
                timings.ask(engine, f"{number}.{turn}", ask, due=due, wanted=longest if padded else None)
            while engine.has_work():
                timings.step(engine)
            asks = _answers(part, asks, timings, turn)
            turn += 1
    return timings


def _answers(talks: dict[int, Talk], asked: Iterable[int], timings: Timings, turn: int) -> dict[int, Ask]:
    """What the talks that were answered in `turn` ask next."""
    following = {}
    for number in asked:
        try:
            following[number] = talks[number].send(timings.tokens[f"{number}.{turn}"])
        except StopIteration:
            continue
    return following


def arriving(engine: Engine, arrivals: Sequence[tuple[float, str, Ask]]) -> Timings:
    """Each (seconds from the start, name, what) enters when it is due, whatever the engine is doing."""
    queue, timings = deque(sorted(arrivals, key=lambda one: one[0])), Timings()
    while queue or engine.has_work():
        while queue and timings.started + queue[0][0] <= time.perf_counter():
            after, name, ask = queue.popleft()
            timings.ask(engine, name, ask, due=timings.started + after)
        if engine.has_work():
            timings.step(engine)
        else:
            time.sleep(max(timings.started + queue[0][0] - time.perf_counter(), 0.0))
    return timings
