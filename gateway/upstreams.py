"""The servers elsewhere that answer for some models, each behind a circuit breaker.

The same promise as `gateway.dispatch` gives for replicas: what fails before anything was handed on is tried again or
left to another model; afterwards the error is the caller's to tell.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from typing import Any

from gateway.billing import Meter, charge
from gateway.config import GatewayConfig, Retries
from gateway.jobs import Job
from gateway.retrying import breaker_settings, later, may_retry, pause_s
from policies.breaker import Breaker, BreakerState, Outcome, outcome_of
from replicas.protocol import NoReplica, QueueFull, RouteDecision, SignalboxError, Unavailable, Usage
from replicas.upstream import UpstreamCard, UpstreamConnection
from replicas.upstream_errors import UpstreamFailed
from replicas.upstream_messages import UpstreamChunk, UpstreamRequest
from replicas.upstream_tokens import prompt_tokens

# From here on tokens are counted on a thread; tiktoken, at about 10 MB/s, lets others run meanwhile.
_LONG_BYTES = 32 * 1024


class UpstreamModel:
    """A model that another server has."""

    def __init__(self, connection: UpstreamConnection) -> None:
        upstream = connection.upstream
        self.name = upstream.name
        origin = hashlib.blake2s(f"{upstream.origin} {upstream.model}".encode(), digest_size=5).hexdigest()
        self.fingerprint = f"fp_{origin}"
        self.connection = connection
        self.breaker = Breaker()
        self._rng = random.Random()

    @property
    def card(self) -> UpstreamCard:
        return self.connection.card

    @property
    def ready(self) -> bool:
        return self.connection.alive and self.breaker.can_acquire(time.monotonic())

    @property
    def state(self) -> BreakerState:
        return self.breaker.state(time.monotonic())

    async def prompt_tokens(self, body: Mapping[str, Any], size: int) -> int:
        """Of a body of `size` bytes. Estimated: the upstream's own count decides."""
        if size < _LONG_BYTES:
            return prompt_tokens(body, self.connection.count)
        return await asyncio.to_thread(prompt_tokens, body, self.connection.count)

    async def generate(self, job: Job, retries: Retries) -> AsyncGenerator[list[UpstreamChunk], None]:
        """Yield what the upstream brings. Raises the protocol's errors; NoReplica while the breaker is open."""
        self.breaker.settings = breaker_settings(retries)
        for attempt in range(retries.attempts):
            last = attempt == retries.attempts - 1
            meter = await charge(job, attempt)
            try:
                async with aclosing(self._once(job, meter)) as stream:
                    async for ready in stream:
                        yield ready
                return
            except Unavailable as error:
                meter.void = not job.shown
                # one that is busy has said when to come again, and its breaker sees to that
                if last or job.shown or isinstance(error, QueueFull) or not may_retry(error, retries):
                    later(error, retries)
                    raise
                failed = error
            finally:
                meter.end()
                job.ended()
            await asyncio.sleep(pause_s(failed, retries, attempt))

    async def _once(self, job: Job, meter: Meter) -> AsyncGenerator[list[UpstreamChunk], None]:
        if self.connection.full:  # our own bound: it says nothing of the upstream's health
            raise QueueFull(f"the upstream of {self.name!r} has all the requests it is allowed at a time")
        now = time.monotonic()
        permit = self.breaker.acquire(now)
        if permit is None:
            wait_s = self.breaker.wait_s(now)
            raise NoReplica(f"the upstream of {self.name!r} is failing and is left alone", retry_after_s=wait_s)
        assert isinstance(job.request, UpstreamRequest), "jobs for upstreams are made with their requests"
        job.began(self._decision(job.generation), self.connection.upstream.origin)
        request = _traced(job, job.request)
        held: list[UpstreamChunk] = []
        outcome = Outcome.SUCCESS
        retry_after_s: float | None = None

        def settle(usage: Usage) -> None:
            meter.used = usage

        try:
            async with aclosing(self.connection.generate(request, settle=settle)) as stream:
                async for ready in stream:
                    job.saw(ready)
                    self.breaker.started(permit, time.monotonic())
                    if job.whole:
                        held += ready
                    else:
                        job.shown = True
                        yield ready
            if held:
                yield held
        except BaseException as error:
            outcome = outcome_of(error)
            # some servers answer what is wrong with the request as if it were a fault of theirs; it may be one
            if isinstance(error, UpstreamFailed) and request.doubt is not None:
                error, outcome = request.doubt, Outcome.NEUTRAL
            if isinstance(error, SignalboxError):
                retry_after_s = error.retry_after_s
                job.failed(error)
            raise error
        finally:
            self.breaker.record(permit, outcome, time.monotonic(), self._rng, retry_after_s)

    def _decision(self, generation: int) -> RouteDecision:
        name = self.connection.address.replica_id
        return RouteDecision(
            policy="upstream", replica_id=name, candidates=(name,), terms={"score": (0.0,)}, generation=generation
        )


def _traced(job: Job, request: UpstreamRequest) -> UpstreamRequest:
    """The request with this attempt as its caller, where somebody traces."""
    if job.trace is None:
        return request
    parent, state = job.trace.carried(job.span)
    return replace(request, traceparent=parent, tracestate=state)


async def connect_all(config: GatewayConfig, stack: AsyncExitStack) -> dict[str, UpstreamModel]:
    """Every upstream of the configuration by its model's name; `stack` closes them. ConfigError without its key."""
    models: dict[str, UpstreamModel] = {}
    for upstream in config.upstreams:
        connection = await UpstreamConnection.connect(upstream)
        stack.push_async_callback(connection.aclose)
        models[upstream.name] = UpstreamModel(connection)
    return models
