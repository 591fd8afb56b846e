"""The quality guarantee at work: some routed-down requests also run on the strong model, in the background.

What comes of it is a number per group (`safety_scale`) that moves the group's trade towards quality when the promise is
being broken; policies.rightsize.guarantee has the arithmetic. Each gateway keeps its own account, for as long as the
promise stays the same, and spends at most `usd_per_day` itself (UTC days).
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import deque
from contextvars import Context
from dataclasses import replace

from gateway.answering import Answering, Asked, Opened
from gateway.metrics import Metrics
from policies.budget import PICO
from policies.rightsize.agreement import agreement
from policies.rightsize.guarantee import Guard, Promise, observe, shadows
from policies.selection import ModelGroup
from replicas.protocol import SignalboxError

logger = logging.getLogger(__name__)

_DAY_S = 86_400
# Shadows at work and waiting; what comes on top is not sampled, whatever the coin says.
_AT_ONCE, _WAITING = 2, 64


class Shadows:
    def __init__(self, answering: Answering, metrics: Metrics, rng: random.Random | None = None) -> None:
        self._answering = answering
        self._metrics = metrics
        self._rng = rng or random.Random()
        self._guards: dict[tuple[str, Promise], tuple[int, Guard]] = {}
        self._waiting: deque[tuple[Asked, ModelGroup, Promise, str, float]] = deque()
        self._pending: dict[tuple[str, Promise], float] = {}
        self._workers: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def safety_scale(self, group: ModelGroup) -> float:
        return self.guard(group).scale if group.promise else 1.0

    def guard(self, group: ModelGroup) -> Guard:
        """What the group's promise has come to here."""
        assert group.promise is not None, "only promises are guarded"
        today = int(time.time() // _DAY_S)
        day, guard = self._guards.get((group.name, group.promise), (today, None))
        guard = guard or Guard.begin(group.promise)
        return guard if day == today else guard.next_window()

    def watches(self, opened: Opened) -> bool:
        """Whether the answer's text will be wanted."""
        group = opened.selection.group
        if group is None or group.promise is None or opened.prompts != 1:
            return False
        return opened.model.name != group.promise.strong

    def consider(self, asked: Asked, opened: Opened, text: str) -> None:
        """Perhaps run the request, which has just been answered with `text`, on the strong model as well."""
        group = opened.selection.group
        if group is None or group.promise is None or not self.watches(opened) or len(self._waiting) >= _WAITING:
            return
        promise = group.promise
        choice = opened.selection.choice
        expected = next((one.cost for one in choice.candidates if one.model == promise.strong), 0.0) if choice else 0.0
        # what waits and runs counts as spent already
        pending = self._pending.get((group.name, promise), 0.0)
        guard = replace(self.guard(group), spent=self.guard(group).spent + pending)
        if shadows(guard, promise, chosen=opened.model.name, strong_cost=expected, rng=self._rng):
            self._pending[group.name, promise] = pending + expected
            self._waiting.append((asked, group, promise, text, expected))
            if len(self._workers) < _AT_ONCE:
                worker = asyncio.create_task(self._work(), name="shadow", context=Context())  # of no one request
                self._workers.add(worker)
                worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        while self._waiting:
            asked, group, promise, text, expected = self._waiting.popleft()
            try:
                await self._compare(asked, group, promise, text)
            except SignalboxError:
                pass  # a strong model that cannot answer now says nothing about agreement
            except Exception:
                logger.exception("a shadow failed")
            finally:
                self._pending[group.name, promise] -= expected
                for step in asked.record.steps:
                    if step.role == "shadow":
                        step.release()

    async def _compare(self, asked: Asked, group: ModelGroup, promise: Promise, text: str) -> None:
        step, chunks = await self._answering.whole(asked, promise.strong, "shadow")
        step.release()
        if step.usage is not None:
            self._metrics.models[promise.strong].settled(step.usage)
        step.agreement = agreement(text, "".join(chunk.text for chunk in chunks if chunk.index == 0))
        before = self.guard(group)
        after = observe(before, promise, step.agreement, step.cost / PICO)
        self._guards[group.name, promise] = int(time.time() // _DAY_S), after
        if after.moves > before.moves:
            logger.warning(
                "group %s: agreement with %s is below %g; the trade moves towards quality (scale %g)",
                group.name,
                promise.strong,
                promise.agreement,
                after.scale,
            )
