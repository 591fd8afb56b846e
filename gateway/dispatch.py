"""Carries a request to a replica and its chunks back, through the loss of replicas where that is still honest.

Until a first chunk was handed on nothing was promised, so an Unavailable replica only means another one; afterwards the
error is the caller's to tell, because repeating would repeat text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace

from gateway.billing import Meter, charge
from gateway.config import Retries
from gateway.deadline import left_s
from gateway.fleet import Fleet
from gateway.jobs import Job
from gateway.ledger.entries import attempt_id
from gateway.retrying import breaker_settings, later, may_retry, outcome_at_replica, pause_s
from gateway.routes import Choice, Routes
from policies.breaker import Outcome, Permit
from replicas.protocol import (
    Chunk,
    GenerateRequest,
    NoReplica,
    QueueFull,
    ReplicaDraining,
    ReplicaLost,
    SignalboxError,
)

Chunks = AsyncGenerator[list[Chunk], None]


async def generate(fleet: Fleet, job: Job, retries: Retries) -> Chunks:
    """Yield what the engine brings, up to the terminal chunk. Raises the protocol's errors.

    Unavailable is raised only after `retries.attempts` replicas or `retries.wait_s` seconds, with retry_after_s set; a
    full queue is not waited for, only tried elsewhere. Closing the generator aborts the request in the engine.
    """
    request, route = job.request, job.route
    assert isinstance(request, GenerateRequest), "an upstream's jobs are its own"
    assert route is not None, "a replica's job says by what to choose"
    routes = fleet.routes[job.model]
    until = time.monotonic() + retries.wait_s
    tried = set(job.avoid)
    last: SignalboxError | None = None
    for attempt in range(retries.attempts):
        choice: Choice | None = None
        permit: Permit | None = None
        outcome = Outcome.NEUTRAL
        held: list[Chunk] = []
        meter = await _begin(job, attempt, last, retries)
        try:
            choice = _choose(fleet, job, tried) or await _wait_for_replica(fleet, job, tried, last, until, retries)
            job.began(choice.decision, choice.connection.address.endpoint)
            permit = routes.permit(choice)
            named = _named(request, attempt, meter.handed_over(), job, choice, routes)
            with routes.counted(route, choice):
                async with aclosing(choice.connection.generate(named)) as stream:
                    async for ready in stream:
                        job.saw(ready)
                        meter.saw(ready)
                        if permit is not None:
                            routes.started(choice, permit)
                        if job.whole:
                            held += ready
                        else:
                            job.shown = True
                            yield ready
            outcome = Outcome.SUCCESS
            if held:
                yield held
            return
        except SignalboxError as error:
            if choice is None:
                raise
            outcome = outcome_at_replica(error)
            job.failed(error)
            meter.failed(error, shown=job.shown)
            if job.shown or not may_retry(error, retries):
                later(error, retries)
                raise
            last = _sooner(last, error)
            tried.add(choice.decision.replica_id)
        finally:
            meter.end()
            job.ended()
            if permit is not None or outcome is Outcome.FAILURE:
                routes.judge(choice, permit, outcome, breaker_settings(retries))
    assert last is not None, "at least one attempt is configured"
    raise later(last, retries)


def _sooner(last: SignalboxError | None, error: SignalboxError) -> SignalboxError:
    """The error to tell; of several full queues, with the time at which the first of them has a place."""
    if isinstance(last, QueueFull) and isinstance(error, QueueFull):
        known = [one.retry_after_s for one in (last, error) if one.retry_after_s is not None]
        error.retry_after_s = min(known, default=None)
    return error


async def _begin(job: Job, attempt: int, last: SignalboxError | None, retries: Retries) -> Meter:
    if attempt:
        await asyncio.sleep(pause_s(last, retries, attempt - 1))
    return await charge(job, attempt)


def _named(
    request: GenerateRequest, attempt: int, note: str, job: Job, choice: Choice, routes: Routes
) -> GenerateRequest:
    """The request as that attempt sends it."""
    # an id of its own per attempt: the one before may still run on a replica that only we lost
    named = replace(request, request_id=attempt_id(request.request_id, attempt), note=note)
    if job.until is None and job.bounds is None:
        return named
    return _bounded(routes, job, choice, named)


def _bounded(routes: Routes, job: Job, choice: Choice, request: GenerateRequest) -> GenerateRequest:
    """The request with the time that is left to it and the share of the queue that its replica may hold."""
    if job.until is not None:
        request = replace(request, deadline_s=left_s(job.until))
    if job.bounds is None:
        return request
    share = routes.share(job.bounds, choice.decision.replica_id)
    return replace(
        request,
        max_queued=share.queued,
        max_queued_tokens=share.queued_tokens,
        max_queued_per_key=share.queued_per_key,
    )


def _choose(fleet: Fleet, job: Job, avoid: Collection[str]) -> Choice | None:
    assert job.route is not None, "asked for only with one"
    return fleet.choose(job.model, job.route, avoid, job.policy, job.generation)


async def _wait_for_replica(
    fleet: Fleet, job: Job, tried: set[str], last: SignalboxError | None, until: float, retries: Retries
) -> Choice:
    """The first replica outside `tried` to become ready; `last` or NoReplica when none does in time.

    Only what is lost or leaves is worth waiting for: a full queue and a replica that keeps failing are told at once.
    """
    if last is not None and not isinstance(last, ReplicaLost | ReplicaDraining):
        raise later(last, retries)
    nobody = last or NoReplica(f"no replica of {job.model!r} is ready")
    most = job.bounds.queued if job.bounds is not None else None
    if most is not None and fleet.waiting[job.model] >= most:
        raise later(QueueFull(f"{most} requests are waiting for a replica already"), retries)
    fleet.waiting[job.model] += 1
    try:
        async with asyncio.timeout(max(0.0, until - time.monotonic())):
            while (choice := _choose(fleet, job, tried)) is None:
                if (wait_s := fleet.routes[job.model].wait_for_spared_s(tried)) is not None:
                    raise last or _failing(job.model, wait_s)
                await fleet.change()
            return choice
    except TimeoutError:
        raise later(nobody, retries) from None
    finally:
        fleet.waiting[job.model] -= 1


def _failing(model: str, wait_s: float) -> NoReplica:
    return NoReplica(f"every replica of {model!r} is failing and is left alone", retry_after_s=wait_s or None)


async def merged(streams: Sequence[Chunks], choices: int) -> Chunks:
    """Several prompts as one stream: prompt p's choice c comes as index p * choices + c. Usage stays per prompt.

    The first error ends all of them; closing closes all of them.
    """
    arrived: asyncio.Queue[list[Chunk] | None] = asyncio.Queue()

    async def pump(number: int, stream: Chunks) -> None:
        try:
            async with aclosing(stream):
                async for ready in stream:
                    arrived.put_nowait([replace(chunk, index=number * choices + chunk.index) for chunk in ready])
        finally:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        ended = 0
        while ended < len(tasks):
            ready = await arrived.get()
            if ready is not None:
                yield ready
                continue
            ended += 1
            for task in tasks:
                if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                    raise error
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
