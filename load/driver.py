"""One worker process: sends its share of a plan's requests on time and reports every one of them when it is over.

The worker's only thread is the event loop (and one that writes finished records to the parent's pipe). Requests are
made ready before they are due, so that composing a prompt does not delay its sending.
"""

from __future__ import annotations

import asyncio
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from load.http1 import Exchange, Pool, clock, with_body
from load.loop import run
from load.plan import ClosedLoop, Plan
from load.record import TIMEOUT, UNFINISHED, Answer, Record
from load.workload import Ask, Conversation

_AHEAD = 256  # requests made ready before they are due
_REPORT_S = 0.05  # small batches: packing and unpacking a large one would stop a shared core for milliseconds
_BURST = 8  # requests sent without looking at what has arrived
_BEAT_S = 0.02
_STALL_S = 0.01  # a beat that is later than this counts as standing still


@dataclass(frozen=True, slots=True)
class WorkerEnd:
    """What a worker says last. busy: share of one core that it used while it ran.

    stalled, longest: seconds in which its loop stood still and could neither send nor take the time of what arrived.
    """

    worker: int
    opened: int
    repeated: int
    busy: float
    fault: str = ""
    stalled: float = 0.0
    longest: float = 0.0
    lasted: float = 0.0


def work(plan: Plan, worker: int, address: str, pipe: Connection) -> None:
    """Entry of a worker process. Messages to the parent: "ready", lists of Record, WorkerEnd; from it: the start time,
    then at most once "stop". The parent's death closes the pipe, which stops the worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    driver = None
    try:
        driver = Driver(plan, worker, address, pipe)
        driver.prepare()
        pipe.send("ready")
        start = float(pipe.recv())
        run(driver.drive(start))
    except (EOFError, BrokenPipeError):
        return
    except Exception as error:
        pipe.send(WorkerEnd(worker, 0, 0, 0.0, f"{type(error).__name__}: {error}"))
        raise


class Dialogue:
    """One conversation under way. `request` is the next ask's bytes."""

    __slots__ = ("ask", "conversation", "exchange", "index", "request", "turn")

    def __init__(self, index: int, conversation: Conversation, ask: Ask, request: bytes) -> None:
        self.index, self.conversation, self.ask, self.request = index, conversation, ask, request
        self.turn = 0
        self.exchange: Exchange | None = None


class Driver:
    def __init__(self, plan: Plan, worker: int, address: str, pipe: Connection) -> None:
        self._plan, self._worker, self._pipe = plan, worker, pipe
        self._head = plan.target.head()
        self._address = address
        self._running: dict[Dialogue, Answer] = {}
        self._thinking = 0
        self._out: list[Record] = []
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ready: deque[tuple[float, Dialogue]] = deque()
        self._stopped = False
        self._load_end = float("inf")  # no request begins after it
        self._closed = isinstance(plan.arrivals, ClosedLoop)
        self._upcoming = self._coming()

    # -------------------------------------------------------------------------------------------------- making ready

    def _coming(self) -> Iterator[tuple[float, int]]:
        """(due, index) of this worker's conversations in order; due times count from the start."""
        arrivals, workers = self._plan.arrivals, self._plan.workers
        if isinstance(arrivals, ClosedLoop):
            index = self._worker
            while arrivals.limit is None or index < arrivals.limit:
                yield 0.0, index
                index += workers
            return
        times = arrivals.times(self._plan.seed)
        for index in range(self._worker, len(times), workers):
            yield float(times[index]), index

    def prepare(self) -> None:
        while len(self._ready) < _AHEAD and self._prepare_one():
            pass

    def _prepare_one(self) -> bool:
        coming = next(self._upcoming, None)
        if coming is None:
            return False
        due, index = coming
        conversation = self._plan.workload.conversation(index)
        ask = next(conversation)
        self._ready.append((due, Dialogue(index, conversation, ask, self._compose(ask))))
        return True

    def _compose(self, ask: Ask) -> bytes:
        return with_body(self._head, self._plan.target.body(ask))

    # -------------------------------------------------------------------------------------------------------- driving

    async def drive(self, start: float) -> None:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._start = start
        self._pool = Pool(self._plan.target.origin, self._address, verify=self._plan.target.verify_tls)
        if self._plan.arrivals.duration_s is not None:
            self._load_end = start + self._plan.arrivals.duration_s
        loop.add_reader(self._pipe.fileno(), self._on_message)
        sender = threading.Thread(target=self._send_reports, daemon=True)
        sender.start()
        watch = loop.create_task(self._watch())
        self._stalled = self._longest = 0.0
        heart = loop.create_task(self._beat())
        cpu = time.process_time()
        try:
            await (self._drive_closed() if self._closed else self._drive_open())
            await self._drain()
        finally:
            watch.cancel()
            heart.cancel()
            self._give_up(UNFINISHED, "still running when the run was over")
            loop.remove_reader(self._pipe.fileno())
            await self._pool.close()
            lasted = max(clock() - start, 1e-9)
            end = WorkerEnd(
                self._worker,
                self._pool.opened,
                self._pool.repeated,
                busy=(time.process_time() - cpu) / lasted,
                stalled=self._stalled,
                longest=self._longest,
                lasted=lasted,
            )
            self._outbox.put(self._out)
            self._outbox.put(end)
            self._outbox.put(None)
            sender.join()

    async def _drive_open(self) -> None:
        sent = 0
        while not self._stopped:
            now = clock()
            if self._ready and self._start + self._ready[0][0] <= now:
                due, dialogue = self._ready.popleft()
                self._ask(dialogue, self._start + due)
                sent += 1
                if sent % _BURST == 0:
                    await asyncio.sleep(0)
            elif len(self._ready) < _AHEAD and self._prepare_one():
                await asyncio.sleep(0)
            elif self._ready:
                # in steps, so that a stop is heard
                await asyncio.sleep(min(self._start + self._ready[0][0] - now, 0.5))
            else:
                return

    async def _drive_closed(self) -> None:
        arrivals = self._plan.arrivals
        assert isinstance(arrivals, ClosedLoop), "chosen by its type"
        await asyncio.sleep(max(0.0, self._start - clock()))
        share = len(range(self._worker, arrivals.concurrency, self._plan.workers))
        for _ in range(share):
            self._next_caller(self._start)
        while (self._running or self._thinking) and not self._stopped and clock() < self._load_end:
            if not self._prepare_ahead():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0)

    def _prepare_ahead(self) -> bool:
        return len(self._ready) < _AHEAD and self._prepare_one()

    def _next_caller(self, due: float) -> None:
        if self._stopped or due >= self._load_end or not (self._ready or self._prepare_one()):
            return
        self._ask(self._ready.popleft()[1], due)

    def _ask(self, dialogue: Dialogue, due: float) -> None:
        ask = dialogue.ask
        record = Record(dialogue.index, dialogue.turn, due, ask.prompt_tokens, ask.max_tokens or -1)
        target = self._plan.target
        answer = Answer(
            record,
            lambda over, text: self._over(dialogue, over, text),
            asked_stream=target.stream,
            wants_done=target.ends_with_done,
        )
        self._running[dialogue] = answer
        record.begun = clock()
        exchange = dialogue.exchange = self._pool.send(dialogue.request, answer)
        answer.hang_up = exchange.cancel

    def _over(self, dialogue: Dialogue, record: Record, text: str) -> None:
        """A request ended, well or not: report it, go on with its conversation or, in a closed loop, the next."""
        del self._running[dialogue]
        if self._plan.keep_text:
            record.text = text
        self._out.append(record)
        if self._stopped:
            return
        now = record.end
        following = None
        if not record.error:
            try:
                following = dialogue.conversation.send(text)
            except StopIteration:
                following = None
        if following is not None:
            dialogue.ask, dialogue.turn = following, dialogue.turn + 1
            dialogue.request = self._compose(following)
            self._later(following.think_s, now, lambda due: self._again(dialogue, due))
        elif self._closed:
            assert isinstance(self._plan.arrivals, ClosedLoop), "chosen by its type"
            pause = self._plan.arrivals.think_s
            # a server that refuses at once is not asked in a tight loop
            self._later(max(pause, 0.01) if record.error else pause, now, self._next_caller)

    def _again(self, dialogue: Dialogue, due: float) -> None:
        if not self._stopped and due < self._load_end:
            self._ask(dialogue, due)

    def _later(self, pause: float, now: float, action: Any) -> None:
        """Call action(due) when it is due; through the loop, so that the stack does not grow."""
        self._thinking += 1

        def act() -> None:
            self._thinking -= 1
            action(now + pause)

        if pause > 0:
            self._loop.call_at(now + pause, act)
        else:
            self._loop.call_soon(act)

    async def _drain(self) -> None:
        deadline = clock() + self._plan.drain_s
        while (self._running or self._thinking) and not self._stopped and clock() < deadline:
            await asyncio.sleep(0.01)

    # ------------------------------------------------------------------------------------------------------- watching

    async def _beat(self) -> None:
        """Notice when the whole process does not run: busy, or stopped by the system."""
        while True:
            due = clock() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            late = clock() - max(due, self._start)
            if late > _STALL_S:
                self._stalled += late
                self._longest = max(self._longest, late)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_S)
            oldest = clock() - self._plan.timeout_s
            late = []
            for dialogue, answer in self._running.items():  # in the order they began
                if answer.record.begun > oldest:
                    break
                late.append((dialogue, answer))
            for dialogue, answer in late:
                self._abandon(dialogue, answer, TIMEOUT, f"no end within {self._plan.timeout_s:g} s")
            if self._out:
                self._outbox.put(self._out)
                self._out = []

    def _give_up(self, kind: str, detail: str) -> None:
        self._stopped = True
        for dialogue, answer in list(self._running.items()):
            self._abandon(dialogue, answer, kind, detail)

    def _abandon(self, dialogue: Dialogue, answer: Answer, kind: str, detail: str) -> None:
        assert dialogue.exchange is not None, "what runs has been sent"
        dialogue.exchange.cancel()
        answer.give_up(kind, detail, clock())

    def _on_message(self) -> None:
        try:
            self._pipe.recv()
        except (EOFError, OSError):
            self._loop.remove_reader(self._pipe.fileno())
        self._give_up(UNFINISHED, "the run was stopped")

    def _send_reports(self) -> None:
        try:
            while (report := self._outbox.get()) is not None:
                self._pipe.send(report)
        except (BrokenPipeError, OSError):
            pass  # the parent is gone; the loop hears of it through the same pipe
