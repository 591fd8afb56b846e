"""A replica in virtual time: a block cache with real hashes, and the engine's scheduling at the price of arithmetic.

What `replicas.engine` decides is repeated here, without its tensors and without its per-token work: steps under a
token budget, running sequences first, whole prompts admitted under a watermark, blocks findable as soon as they are
scheduled, the least recently used evicted first and of one prefix the tail first, the youngest preempted. A stretch of
steps in which only decodes run is one step here, as long as nobody ends or can be admitted and blocks do not run out;
the blocks that it needs are taken at its end, which evicts the same ones in the same order.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from policies.sim_cache import BlockCache, Key
from replicas.protocol import EngineStats

_WEIGHT = 0.2  # of the newest sample in the engine's moving averages


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaModel:
    """How fast a replica is and how much it holds. A step takes

        step_s + max(floor_s, decode_s * decoding sequences + prompt tokens / prefill_rate)
               + context_s * tokens that the decoding sequences attend to           seconds:

    a roofline, where floor_s is the time to read the weights however few tokens they are read for. num_blocks and what
    follows are the engine's settings of these names. one_by_one: every step is simulated by itself, an oracle for tests
    and many times as slow. The defaults are near a 135M-parameter model on two AVX2 cores.
    """

    num_blocks: int = 4000
    block_size: int = 16
    prefill_rate: float = 450.0
    step_s: float = 0.006
    decode_s: float = 0.004
    floor_s: float = 0.0
    context_s: float = 0.0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 256
    max_waiting: int = 1 << 30
    max_model_len: int = 0
    watermark: float = 0.01
    one_by_one: bool = False

    def __post_init__(self) -> None:
        positive = (self.num_blocks, self.block_size, self.prefill_rate, self.max_num_seqs, self.max_num_batched_tokens)
        times = (self.step_s, self.decode_s, self.floor_s, self.context_s, self.watermark)
        if not all(0 < one < math.inf for one in positive) or not all(0 <= one < math.inf for one in times):
            raise ValueError("a replica's sizes and rates must be positive, its times at least 0, all of them finite")
        if self.step_s + self.decode_s + self.floor_s <= 0:
            raise ValueError("a step that only decodes must take some time: give step_s, floor_s or decode_s")

    def step_seconds(self, decoding: int, prefill: int, context: float = 0.0) -> float:
        work = self.decode_s * decoding + prefill / self.prefill_rate
        return self.step_s + max(self.floor_s, work) + self.context_s * context


@dataclass(slots=True, eq=False)
class SimSequence:
    """One request at a replica. hashes: of the prompt's full blocks. known: tokens it has, prompt and output.

    queued: the prompt tokens still to compute, as the replica counts them. ends: the step after which it is complete,
    in the replica's count, while it decodes. life: grows when it loses its place, so that stale alarms are ignored.
    tag: the caller's.
    """

    number: int
    prompt_tokens: int
    output_tokens: int
    hashes: tuple[bytes, ...]
    root: bytes
    known: int = 0
    computed: int = 0
    stored: int = 0
    queued: int = 0
    cached: int = -1
    blocks: list[Key] = field(default_factory=list)
    ends: int = 0
    life: int = 0
    tag: Any = None


@dataclass(slots=True)
class StepResult:
    """What a step brought: sequences with their first token, and complete ones."""

    first: list[SimSequence] = field(default_factory=list)
    done: list[SimSequence] = field(default_factory=list)


class SimReplica:
    """Driven by the simulator: `add`, then `begin` a step, then `finish` it after the seconds that `begin` said."""

    def __init__(self, model: ReplicaModel) -> None:
        self.model = model
        self.cache = BlockCache(model.num_blocks)
        self.waiting: deque[SimSequence] = deque()
        self.running: dict[SimSequence, None] = {}  # oldest first
        self.steps = 0
        self.busy_s = 0.0
        self.prompt_tokens = self.computed_tokens = self.generation_tokens = 0
        self.prefix_queries = self.prefix_hits = self.num_preemptions = 0
        self._prefilling: list[SimSequence] = []
        self._ends: list[tuple[int, int, int, SimSequence]] = []
        self._grows: list[tuple[int, int, int, SimSequence]] = []
        self._queued = 0
        self._watermark = int(model.watermark * model.num_blocks)
        self._chunks: list[tuple[SimSequence, int]] = []
        self._stretch = 1
        self._step_s = self._longer_s = 0.0
        self._prefill_rate = self._decode_step_s = self._release_rate = 0.0
        self._sample_s = 0.0
        self._sampled = 0

    # ---------------------------------------------------------------- requests

    def fits(self, seq: SimSequence) -> bool:
        """Whether it could run with the replica to itself; one that could not is refused, as a context too long."""
        tokens, most = seq.prompt_tokens + seq.output_tokens, self.model.max_model_len
        return tokens <= self.model.num_blocks * self.model.block_size and not 0 < most < tokens

    def is_full(self) -> bool:
        """Whether one more is refused with QueueFull."""
        return len(self.waiting) >= self.model.max_waiting

    def add(self, seq: SimSequence) -> None:
        seq.known = seq.prompt_tokens
        seq.queued = seq.known - self._hits(seq) * self.model.block_size
        self._queued += seq.queued
        self.waiting.append(seq)
        self.prompt_tokens += seq.prompt_tokens

    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # ---------------------------------------------------------------- steps

    def begin(self) -> float:
        """Schedule a step, or a stretch of equal ones; its seconds."""
        budget = self.model.max_num_batched_tokens
        self._chunks = []
        preempted = self._grow(self.steps)
        decoding = len(self.running) - len(self._prefilling)
        budget -= decoding
        for seq in self._prefilling:
            if budget <= 0:
                break
            budget -= self._schedule(seq, budget)
        if not preempted:
            self._admit(budget)
        prefill = sum(count for _, count in self._chunks)
        self._step_s = self.model.step_seconds(decoding, prefill, self._context() if self.model.context_s else 0.0)
        self._longer_s = self.model.context_s * decoding
        self._stretch = 1 if prefill or preempted or self.model.one_by_one else self._steps_alike()
        return self._seconds()

    def cut(self, elapsed_s: float) -> float:
        """Something arrived `elapsed_s` into the step: end the stretch with the step under way; its seconds."""
        if self._stretch > 1:
            whole, self._stretch = self._stretch, max(1, min(self._stretch, -int(-elapsed_s // self._step_s)))
            while self._stretch > 1 and self._seconds(self._stretch - 1) >= elapsed_s:
                self._stretch -= 1  # steps grow longer: those that fit were fewer
            assert self._stretch <= whole, "a stretch is only ever cut"
        return self._seconds()

    def finish(self) -> StepResult:
        """Take in what the step computed."""
        result = StepResult()
        decoding = len(self.running) - len(self._prefilling)
        self.steps += self._stretch
        self.generation_tokens += decoding * self._stretch
        if self._stretch > 1:
            self._grow(self.steps - 1)
        # In the order of the running set, which is that of eviction later: who prefills was admitted last.
        while self._ends and self._ends[0][0] <= self.steps:
            _, _, life, seq = heapq.heappop(self._ends)
            if life == seq.life:
                self._end(seq, result)
        prefill = 0
        for seq, count in self._chunks:
            prefill += count
            self._dequeue(seq, count)
            seq.computed += count
            if seq.computed == seq.known:
                self._prefilling.remove(seq)
                self._decode_from_here(seq, result)
        self._measure(prefill)
        return result

    # ---------------------------------------------------------------- inside a step

    def _seconds(self, steps: int = 0) -> float:
        """Of so many steps of the stretch, by default all: each reads as many tokens more as there are sequences."""
        count = steps or self._stretch
        return count * (self._step_s + self._longer_s * (count - 1) / 2)

    def _context(self) -> int:
        """Tokens that the decoding sequences have written."""
        waiting = set(self._prefilling)
        ahead = self.steps + 1
        return sum(s.prompt_tokens + s.output_tokens - s.ends + ahead for s in self.running if s not in waiting)

    def _schedule(self, seq: SimSequence, budget: int) -> int:
        count = min(seq.known - seq.computed, budget)
        self._chunks.append((seq, count))
        self.computed_tokens += count
        full = min((seq.computed + count) // self.model.block_size, len(seq.hashes))
        if full > seq.stored:
            self.cache.store(seq.blocks, seq.hashes, seq.stored, full, seq.root)
            seq.stored = full
        return count

    def _admit(self, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.model.max_num_seqs:
            seq = self.waiting[0]
            if not self._place(seq):
                return
            self.waiting.popleft()
            self.running[seq] = None
            self._prefilling.append(seq)
            budget -= self._schedule(seq, budget)

    def _place(self, seq: SimSequence) -> bool:
        """All the blocks of the prompt, or none."""
        size = self.model.block_size
        hits = seq.hashes[: self._hits(seq)]
        needed = -(-seq.known // size) - len(hits)
        free = self.cache.num_free - self.cache.idle_among(hits)
        if needed > free - (self._watermark if self.running else 0):
            return False
        self.cache.acquire(hits)
        seq.blocks = [*hits, *self.cache.allocate(needed)]
        seq.computed = len(hits) * size
        seq.stored = len(hits)
        self._dequeue(seq, seq.queued - (seq.known - seq.computed))
        if seq.cached < 0:
            seq.cached = seq.computed
            self.prefix_queries += seq.prompt_tokens
            self.prefix_hits += seq.cached
        return True

    def _hits(self, seq: SimSequence) -> int:
        # At least one token must be computed, or there would be no logits to sample from.
        return self.cache.leading(seq.hashes[: (seq.known - 1) // self.model.block_size])

    def _dequeue(self, seq: SimSequence, count: int) -> None:
        seq.queued -= count
        self._queued -= count

    def _decode_from_here(self, seq: SimSequence, result: StepResult) -> None:
        """The prompt is computed, which brought one token; the others come one a step."""
        if seq.known == seq.prompt_tokens:
            result.first.append(seq)
        seq.known += 1
        self.generation_tokens += 1
        seq.ends = self.steps + seq.prompt_tokens + seq.output_tokens - seq.known
        if seq.ends == self.steps:
            self._end(seq, result)
        else:
            heapq.heappush(self._ends, (seq.ends, seq.number, seq.life, seq))
            self._set_growth(seq)

    def _set_growth(self, seq: SimSequence) -> None:
        """An alarm before the step that would write beyond the last block, if that comes before the end."""
        written_at_end = seq.prompt_tokens + seq.output_tokens - 1  # the last token is never written
        room = len(seq.blocks) * self.model.block_size
        if written_at_end > room:
            heapq.heappush(self._grows, (seq.ends - (written_at_end - room), seq.number, seq.life, seq))

    def _grow(self, step: int) -> bool:
        """Blocks for the decodes that need them at `step`; True if somebody lost its place for it."""
        preempted = False
        while self._grows and self._grows[0][0] <= step:
            _, _, life, seq = heapq.heappop(self._grows)
            if life != seq.life:
                continue
            known = seq.prompt_tokens + seq.output_tokens - max(seq.ends - step, 1)
            needed = -(-known // self.model.block_size) - len(seq.blocks)
            while life == seq.life and self.cache.num_free < needed:
                self._preempt_youngest()
                preempted = True
            if life == seq.life:
                seq.blocks += self.cache.allocate(needed)
                self._set_growth(seq)
        return preempted

    def _preempt_youngest(self) -> None:
        seq, _ = self.running.popitem()
        if seq in self._prefilling:
            self._prefilling.remove(seq)
            written = seq.computed
        else:
            seq.known = seq.prompt_tokens + seq.output_tokens - (seq.ends - self.steps)
            written = seq.known - 1
        self._dequeue(seq, seq.queued - seq.known)
        self._release(seq, written)
        seq.computed = seq.stored = 0
        seq.life += 1
        self.waiting.appendleft(seq)
        self.num_preemptions += 1

    def _end(self, seq: SimSequence, result: StepResult) -> None:
        del self.running[seq]
        self._release(seq, seq.prompt_tokens + seq.output_tokens - 1)  # the last token is never written
        result.done.append(seq)

    def _release(self, seq: SimSequence, written: int) -> None:
        self.cache.release(seq.blocks, range(len(seq.hashes), written // self.model.block_size))
        seq.blocks = []

    def _steps_alike(self) -> int:
        """Decode steps until somebody ends or, where blocks might run out before, needs one."""
        steps = self._next_alarm(self._ends) - self.steps
        most = (1 + steps // self.model.block_size) * len(self.running)
        if most > self.cache.num_free:
            steps = min(steps, self._next_alarm(self._grows) - self.steps)
        return max(1, steps)

    def _next_alarm(self, alarms: list[tuple[int, int, int, SimSequence]]) -> int:
        while alarms and alarms[0][2] != alarms[0][3].life:
            heapq.heappop(alarms)
        return alarms[0][0] if alarms else self.steps + 1

    # ---------------------------------------------------------------- what it says of itself

    def _measure(self, prefill: int) -> None:
        """The engine's own moving averages; a stretch of equal steps counts as so many samples."""
        seconds = self._seconds()
        self.busy_s += seconds
        if prefill:
            alone = max(seconds - self._decode_step_s, seconds / 2)
            self._prefill_rate = _blend(self._prefill_rate, prefill / alone, 1)
        else:
            self._decode_step_s = _blend(self._decode_step_s, seconds / self._stretch, self._stretch)
        self._sample_s += seconds
        if self._sample_s >= 1.0:
            rate = (self.cache.released - self._sampled) / self._sample_s
            self._release_rate = _blend(self._release_rate, rate, 1)
            self._sample_s, self._sampled = 0.0, self.cache.released

    def numbers(self) -> tuple[float, ...]:
        """The part of `stats` that gateways keep, in the order of `FleetLoads.heard`."""
        return (
            len(self.running),
            len(self.waiting),
            self._queued,
            self.cache.num_blocks,
            self.cache.num_free,
            self._prefill_rate,
            self._decode_step_s,
            self._release_rate,
        )

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=len(self.running),
            num_requests_waiting=len(self.waiting),
            queued_tokens=self._queued,
            kv_blocks_total=self.cache.num_blocks,
            kv_blocks_free=self.cache.num_free,
            prefill_rate=self._prefill_rate,
            decode_step_s=self._decode_step_s,
            block_release_rate=self._release_rate,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            prefix_cache_queries=self.prefix_queries,
            prefix_cache_hits=self.prefix_hits,
            num_preemptions=self.num_preemptions,
            steps=self.steps,
        )

    def check_integrity(self) -> None:
        """Recount blocks and queue; AssertionError says what leaked."""
        self.cache.check_integrity([seq.blocks for seq in (*self.running, *self.waiting)])
        queued = sum(seq.queued for seq in (*self.running, *self.waiting))
        assert queued == self._queued, f"{self._queued} tokens counted as queued, {queued} are"
        assert set(self._prefilling) <= set(self.running), "a sequence computes its prompt without a place"


def _blend(old: float, new: float, samples: int) -> float:
    return new if old == 0 else new + (old - new) * (1 - _WEIGHT) ** samples
