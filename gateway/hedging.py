"""A second attempt for a request whose first has been silent for too long: whoever speaks first answers.

    Dean and Barroso, "The Tail at Scale" (Communications of the ACM 56(2), 2013): hedged requests, within a bounded
    share of all requests, so that a model that is slow for everybody is not asked for twice as much.

Knows streams and instants; which model or replica the second one is, is its caller's business.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from policies.document_limits import Hedging
from replicas.protocol import EngineFault, SignalboxError, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from gateway.answering import Answering, Asked
    from gateway.explain import Step
    from gateway.metrics import Metrics

_TIMES = 256
_ENOUGH_TIMES = 20
_MOST_CREDIT = 20.0  # a calm night does not buy a day of doubled load
_ROUNDING = 1e-9
# How long to wait where nobody knows yet how long is long.
_NEVER_S = 7 * 86_400.0


@dataclass(slots=True)
class _Book:
    """One model's. credit: requests that may still be hedged. times: to the first token, of the latest."""

    credit: float = 0.0
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_TIMES))


class Runner:
    """An attempt under way. first: brings its first chunks. spoken: a token has come, be it shown or held back."""

    def __init__(self, step: Step, stream: AsyncGenerator[list[Any], None], model: Any) -> None:
        self.step = step
        self.stream = stream
        self.model = model
        self.first_chunks: list[Any] = []
        self.spoken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for job in step.jobs:
            job.on_first = self._speak
        self.first: asyncio.Task[list[Any] | None] = asyncio.create_task(self._first(), name="hedge")

    async def _first(self) -> list[Any] | None:
        return await anext(self.stream, None)

    def _speak(self) -> None:
        if not self.spoken.done():
            self.spoken.set_result(None)

    @property
    def events(self) -> tuple[asyncio.Future[Any], asyncio.Future[Any]]:
        return self.first, self.spoken

    async def end(self) -> None:
        """End it wherever it is: what holds its reservation and its place in the engine gives them back."""
        self.first.cancel()
        await asyncio.gather(self.first, return_exceptions=True)
        await self.stream.aclose()


class Hedges:
    """How long to wait for a model and how often to hedge, by what was seen here. Belongs to one event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._ending: set[asyncio.Task[None]] = set()
        self._books: defaultdict[str, _Book] = defaultdict(_Book)

    def delay_s(self, model: str, rules: Hedging) -> float | None:
        """Count a request of the model; how long it may be silent, None if that is not known yet."""
        book = self._books[model]
        book.credit = min(book.credit + rules.max_share, _MOST_CREDIT)
        if rules.after_quantile is None:
            return rules.after_s
        if len(book.times) < _ENOUGH_TIMES:
            return None
        return sorted(book.times)[math.ceil(rules.after_quantile * len(book.times)) - 1]

    def take(self, model: str) -> bool:
        """Leave to hedge one request."""
        book = self._books[model]
        if book.credit + _ROUNDING < 1:
            return False
        book.credit -= 1
        return True

    def give_back(self, model: str) -> None:
        """There was nobody else to ask."""
        self._books[model].credit += 1

    def spoke(self, model: str, seconds: float) -> None:
        """A request of the model, hedged or not, had its first token after so long."""
        self._books[model].times.append(seconds)

    async def answer(self, answering: Answering, asked: Asked, one: Runner, rules: Hedging) -> Runner:
        """Whoever speaks first of `one`, which has been asked, and a second one, should it be silent for too long.

        Its first chunks are there; its stream is the caller's to close. Raises what the one that was left raised.
        """
        model, began = one.step.model, time.perf_counter()
        delay_s = self.delay_s(model, rules)
        wait_s = _NEVER_S if delay_s is None else delay_s
        winner, twice = await race(one, wait_s, partial(self._second, answering, asked, one, rules.to), self._abandon)
        try:
            winner.first_chunks = await winner.first or []
        except BaseException as error:
            if isinstance(error, Unavailable):
                winner.step.error = error.message
            self._abandon(winner)
            raise
        if not winner.first_chunks:
            self._abandon(winner)
            raise EngineFault("the replica ended a request without an answer")
        self.spoke(model, max(job.first_at or 0.0 for job in winner.step.jobs) - began)
        if twice:
            self._metrics.models[model].hedged["first" if winner is one else "second"] += 1
        return winner

    def _abandon(self, runner: Runner) -> None:
        """End it, in a task of its own: whoever has lost interest may be cancelled twice, and an ending must not be."""
        ending = asyncio.create_task(runner.end(), name="hedge-end")
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)

    async def _second(self, answering: Answering, asked: Asked, one: Runner, to: str | None) -> Runner | None:
        """The second attempt under way; None where there may be none, or nobody else."""
        if not self.take(one.step.model):
            return None
        try:
            started = await answering.second(asked, one.step, to)
        except SignalboxError:  # it does not fit the other model, say: no reason to refuse what the first may answer
            started = None
        if started is None:
            self.give_back(one.step.model)
            return None
        return Runner(*started)


async def race(
    one: Runner,
    delay_s: float,
    another: Callable[[], Awaitable[Runner | None]],
    abandon: Callable[[Runner], None],
) -> tuple[Runner, bool]:
    """The runner that answers, and whether there were two; the other one is abandoned, both are if this is cancelled.

    `another` is asked for when `one` has been silent for so long. Whoever speaks first wins; one that fails leaves it
    to the other, save where the first one's failure is the caller's own.
    """
    runners = [one]
    try:
        await asyncio.wait(one.events, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
        if not any(event.done() for event in one.events) and (two := await another()) is not None:
            runners.append(two)
        winner = await _first_to_speak(runners)
    except BaseException:
        for runner in runners:
            abandon(runner)
        raise
    for runner in runners:
        if runner is not winner:
            abandon(runner)
    return winner, len(runners) > 1


async def _first_to_speak(runners: Sequence[Runner]) -> Runner:
    running = list(runners)
    while len(running) > 1:
        await asyncio.wait([e for one in running for e in one.events], return_when=asyncio.FIRST_COMPLETED)
        for runner in running:
            if runner.spoken.done():
                return runner
        for runner in [one for one in running if one.first.done()]:
            error = runner.first.exception()
            if runner is runners[0] and not isinstance(error, Unavailable):
                return runner
            running.remove(runner)
    return running[0] if running else runners[0]
