"""The parent of a run: checks that the server answers, starts workers, gathers records, watches the server's load.

    collected = execute(plan, progress)

Ctrl-C (SIGINT) ends the run early and keeps what there is; so does a server of which every answer is a failure.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import signal
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from load.driver import WorkerEnd, work
from load.http1 import Origin, Unreachable, clock, resolve
from load.plan import ClosedLoop, Plan, Target
from load.record import REJECTED, UNFINISHED, Record
from load.scrape import Scraper, Series
from load.units import LoadError

_HOPELESS = 20  # so many failures without one success end a run
_POLL_S = 0.2
_HEAD_START_S = 0.4  # for workers to set up their loops; on a busy machine 0.1 s made the first requests late


class ServerRefuses(LoadError):
    """The server answers, but not to us: wrong key, no such model."""


@dataclass
class Collected:
    """What a run brought. start and load_end are on the records' clock; wall is the start in seconds of the epoch.

    stopped: "" for a run that went its whole way, else why it ended early.
    """

    records: list[Record] = field(default_factory=list)
    start: float = 0.0
    load_end: float = 0.0
    wall: float = 0.0
    stopped: str = ""
    interrupted: bool = False
    ends: list[WorkerEnd] = field(default_factory=list)
    server: list[Series] = field(default_factory=list)


Progress = Callable[[Collected, float], None]  # (so far, now)


# --------------------------------------------------------------------------------------------------------- before a run


def connect(origin: Origin, *, verify: bool = True, timeout_s: float = 10.0) -> http.client.HTTPConnection:
    """A plain blocking connection for the questions beside the load."""
    if origin.scheme == "http":
        return http.client.HTTPConnection(origin.host, origin.port, timeout=timeout_s)
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return http.client.HTTPSConnection(origin.host, origin.port, timeout=timeout_s, context=context)


def models(target: Target) -> list[str]:
    """What /v1/models lists; [] where the server has no such page. Raises Unreachable, ServerRefuses."""
    connection = connect(target.origin, verify=target.verify_tls)
    url = target.origin.url
    try:
        connection.request("GET", f"{target.origin.path}/v1/models", headers=target.authorization())
        response = connection.getresponse()
        status, body = response.status, response.read(4_000_000)
    except ConnectionRefusedError:
        raise Unreachable(f"nobody listens at {url} (connection refused)") from None
    except TimeoutError:
        raise Unreachable(f"{url} does not answer within 10 s") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreachable(f"{url} does not speak HTTP or cannot be reached: {reason}") from None
    finally:
        connection.close()
    if status in (401, 403):
        hint = "is the key right?" if target.api_key else "it wants a key: set SIGNALBOX_API_KEY or --api-key-env"
        raise ServerRefuses(f"{url} refuses the key with {status}; {hint}")
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]] if status == 200 else []
    except (ValueError, KeyError, TypeError):
        return []


def choose_model(target: Target, wanted: str | None) -> str:
    """The model to ask: the wanted one, or the only one there is. Raises like models(), and where it must guess."""
    found = models(target)
    if wanted:
        if found and wanted not in found:
            raise ServerRefuses(f"{target.origin.url} has no model {wanted!r}; it lists {', '.join(found[:20])}")
        return wanted
    if not found:
        raise ServerRefuses(f"{target.origin.url} lists no model: name one with --model")
    if len(found) > 1:
        raise ServerRefuses(f"{target.origin.url} has several models, choose with --model: {', '.join(found[:20])}")
    return found[0]


# ---------------------------------------------------------------------------------------------------------------- a run


def execute(plan: Plan, progress: Progress | None = None) -> Collected:
    """Run a plan to its end. Raises LoadError if it cannot begin; after that whatever happened is in the result."""
    address = resolve(plan.target.origin)
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    collected = Collected()
    scraper = Scraper(plan.target.origin, plan.target.verify_tls) if plan.scrape else None
    with _interruptible() as interrupted:
        try:
            for worker in range(plan.workers):
                ours, theirs = context.Pipe()
                process: BaseProcess = context.Process(target=work, args=(plan, worker, address, theirs), daemon=True)
                process.start()
                theirs.close()
                pipes.append(ours)
                processes.append(process)
            _await_ready(pipes, collected, interrupted)
            if not collected.stopped:
                _begin(plan, pipes, collected)
                if scraper is not None:
                    scraper.start(collected.start)
                _gather(pipes, collected, interrupted, progress)
        finally:
            if scraper is not None:
                collected.server = scraper.stop()
            for pipe in pipes:
                pipe.close()
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
    collected.records.sort(key=lambda record: record.scheduled)
    return collected


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event for the time of the run, once; a second one breaks through."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _await_ready(pipes: list[Connection], collected: Collected, interrupted: threading.Event) -> None:
    for pipe in pipes:
        while not pipe.poll(_POLL_S):
            if interrupted.is_set():
                collected.stopped, collected.interrupted = "interrupted", True
                return
        try:
            said = pipe.recv()
        except EOFError:
            raise LoadError("a worker process died before it began") from None
        if isinstance(said, WorkerEnd):
            raise LoadError(f"a worker could not begin: {said.fault}")


def _begin(plan: Plan, pipes: list[Connection], collected: Collected) -> None:
    collected.start = clock() + _HEAD_START_S
    collected.wall = time.time() + _HEAD_START_S
    for pipe in pipes:
        pipe.send(collected.start)
    if plan.arrivals.duration_s is not None:
        collected.load_end = collected.start + plan.arrivals.duration_s


def _gather(
    pipes: list[Connection], collected: Collected, interrupted: threading.Event, progress: Progress | None
) -> None:
    left = list(pipes)
    hopeless = _Hopeless()
    while left:
        for ready in wait(left, _POLL_S):
            assert isinstance(ready, Connection), "what we wait for"
            try:
                said = ready.recv()
            except EOFError:
                left.remove(ready)
                collected.stopped = collected.stopped or "a worker process died"
                continue
            if isinstance(said, WorkerEnd):
                left.remove(ready)
                collected.ends.append(said)
                if said.fault:
                    collected.stopped = collected.stopped or f"a worker failed: {said.fault}"
            else:
                collected.records += said
                hopeless.see(said)
        if not collected.stopped and (interrupted.is_set() or hopeless.reason):
            collected.interrupted = interrupted.is_set()
            collected.stopped = "interrupted" if collected.interrupted else hopeless.reason
            _stop(left)
        if progress is not None:
            progress(collected, clock())
    if not collected.load_end or collected.stopped:
        collected.load_end = max((record.begun for record in collected.records), default=collected.start)


def _stop(pipes: list[Connection]) -> None:
    for pipe in pipes:
        try:
            pipe.send("stop")
        except OSError:
            pass  # it has ended by itself


class _Hopeless:
    """Notices that the first answers are all failures (not rejects): going on would only repeat them."""

    def __init__(self) -> None:
        self._over = False
        self._failed = 0
        self.reason = ""

    def see(self, records: list[Record]) -> None:
        for record in records:
            if self._over or record.error == UNFINISHED:
                continue
            if record.error in ("", REJECTED):
                self._over = True
                continue
            self._failed += 1
            if self._failed >= _HOPELESS:
                self._over = True
                self.reason = f"the first {_HOPELESS} requests all failed; the last: {record.detail}"


def planned_end(plan: Plan) -> float | None:
    """Seconds from the start to the last due request, where that is known beforehand; for progress bars."""
    if isinstance(plan.arrivals, ClosedLoop):
        return plan.arrivals.duration_s
    times = plan.arrivals.times(plan.seed)
    return plan.arrivals.duration_s or (float(times[-1]) if times.size else 0.0)
