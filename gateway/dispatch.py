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

from gateway.billing import charge
from gateway.config import Retries
from gateway.fleet import Fleet
from gateway.jobs import Job
from gateway.ledger.entries import attempt_id
from gateway.routes import Choice
from replicas.protocol import (
    Chunk,
    GenerateRequest,
    NoReplica,
    QueueFull,
    ReplicaLost,
    SignalboxError,
    Unavailable,
)

Chunks = AsyncGenerator[list[Chunk], None]

# Before the same request is given to the next replica after one was lost: long enough for a dying fleet to be noticed.
_PAUSE_S = 0.05


async def generate(fleet: Fleet, job: Job, retries: Retries) -> Chunks:
    """Yield what the engine brings, up to the terminal chunk. Raises the protocol's errors.

    Unavailable is raised only after `retries.attempts` replicas or `retries.wait_s` seconds, with retry_after_s set; a
    full queue is not waited for, only tried elsewhere. Closing the generator aborts the request in the engine.
    """
    request, route = job.request, job.route
    assert isinstance(request, GenerateRequest), "an upstream's jobs are its own"
    assert route is not None, "a replica's job says by what to choose"
    deadline = time.monotonic() + retries.wait_s
    tried: set[str] = set()
    last: Unavailable | None = None
    for attempt in range(retries.attempts):
        choice: Choice | None = None
        held: list[Chunk] = []
        meter = await charge(job, attempt)
        try:
            choice = _choose(fleet, job, tried) or await _wait_for_replica(fleet, job, tried, last, deadline, retries)
            job.began(choice.decision, choice.connection.address.endpoint)
            # an id of its own per attempt: the one before may still run on a replica that only we lost
            named = replace(request, request_id=attempt_id(request.request_id, attempt), note=meter.note)
            with fleet.routes[job.model].counted(route, choice):
                async with aclosing(choice.connection.generate(named)) as stream:
                    async for ready in stream:
                        job.saw(ready)
                        meter.saw(ready)
                        if job.whole:
                            held += ready
                        else:
                            job.shown = True
                            yield ready
            if held:
                yield held
            return
        except SignalboxError as error:
            if choice is None:
                raise
            job.failed(error)
            meter.void = not job.shown
            if job.shown or not isinstance(error, Unavailable):
                raise
            last = error
            tried.add(choice.decision.replica_id)
        finally:
            meter.end()
            job.ended()
        if isinstance(last, ReplicaLost):
            await asyncio.sleep(_PAUSE_S * (attempt + 1))
    assert last is not None, "at least one attempt is configured"
    raise _later(last, retries)


def _choose(fleet: Fleet, job: Job, avoid: Collection[str]) -> Choice | None:
    assert job.route is not None, "asked for only with one"
    return fleet.choose(job.model, job.route, avoid, job.policy, job.generation)


async def _wait_for_replica(
    fleet: Fleet, job: Job, tried: set[str], last: Unavailable | None, deadline: float, retries: Retries
) -> Choice:
    """The first replica outside `tried` to become ready; `last` or NoReplica when none does before the deadline."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            while (choice := _choose(fleet, job, tried)) is None:
                if isinstance(last, QueueFull):
                    raise _later(last, retries)
                await fleet.change()
            return choice
    except TimeoutError:
        raise _later(last or NoReplica(f"no replica of {job.model!r} is ready"), retries) from None


def _later(error: Unavailable, retries: Retries) -> Unavailable:
    error.retry_after_s = error.retry_after_s or retries.retry_after_s
    return error


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
