"""A deterministic engine without torch: same interface, same refusals, same prefix cache, invented words.

It is a product, not a test double: gateways are measured against it and fleets are rehearsed with it. The text is a
function of prompt, seed and choice alone. Tokens fall due on a time-table (prompts are computed one after another at
`prefill_tokens_per_s`, then each choice brings a token every 1 / `tokens_per_s`), so a late step catches up and nothing
drifts. Who is next, who is refused and who is too late is decided as in the real engine, but nobody is preempted.
Its distributions give one token the probability 1: temperature, penalties and bias are honoured by changing
nothing; logprobs are one configured number, or refused.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from tokenizers import Tokenizer

from replicas.engine.deadlines import Deadlines, too_late
from replicas.engine.detokenizer import Detokenizer
from replicas.engine.phases import Phases
from replicas.engine.waiting import OUTPUT_WEIGHT, WaitingLine
from replicas.fake_blocks import PrefixBlocks
from replicas.fake_jobs import Job, Row
from replicas.fake_settings import FakeSettings, fake_card
from replicas.fake_text import byte_tokenizer, script
from replicas.protocol import (
    Chunk,
    ContextLengthExceeded,
    EngineFault,
    EngineStats,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    KVEvent,
    ModelCard,
    NotSupported,
    QueueFull,
    TokenLogprob,
    Usage,
    prefix_root,
)

__all__ = ["FakeEngine", "FakeSettings", "fake_card"]


class FakeEngine:
    """A TokenEngine. A step that hangs waits for `hang`: setting it lets the step go on."""

    def __init__(
        self,
        settings: FakeSettings | None = None,
        *,
        card: ModelCard | None = None,
        tokenizer: Tokenizer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`card` and `tokenizer` go together; without them the tokenizer of bytes is used."""
        self.settings = settings = settings or FakeSettings()
        time.sleep(settings.start_delay_s)
        self.hang = threading.Event()
        self._tally = -1
        if settings.tally:
            self._tally = os.open(settings.tally, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._clock = clock
        self._card = card or fake_card(settings)
        self._script = script(tokenizer or byte_tokenizer(), multibyte=settings.multibyte)
        self._bytes = dict(zip(self._script.token_ids, self._script.pieces, strict=True))
        self._limits = settings.line_limits
        self._waiting: WaitingLine[Job] = WaitingLine(self._limits)
        self._deadlines = Deadlines()
        self._jobs: dict[str, Job] = {}
        self._rows: list[Row] = []
        self._blocks = PrefixBlocks(settings.num_blocks, settings.block_size)
        self._computing: list[Job] = []  # prompts, in the order of ready_at
        self._prefill_free_at = self._released_at = 0.0
        self._prompt_tokens = self._generation_tokens = self._steps = 0
        self._queries = self._hits = 0

    @property
    def card(self) -> ModelCard:
        return self._card

    # ---------------------------------------------------------------- in and out

    def add(self, request: GenerateRequest) -> None:
        self._check(request)
        now = self._clock()
        if request.deadline_s is not None and not request.deadline_s > 0:  # NaN, too
            raise too_late()
        if self.settings.refuse_as_full:
            raise QueueFull("the fake engine was told to be full", retry_after_s=1.0)
        self._waiting.check(request, now)
        settings, prompt = self.settings, request.prompt_token_ids
        root = prefix_root(request.tenant, self._card.revision)
        hashes = self._blocks.chain(root, prompt)
        total = -(-(len(prompt) + request.sampling.max_tokens) // settings.block_size)
        uncached = len(prompt) - self._cached_tokens(prompt, hashes)
        job = Job(request, Phases(now), root, hashes, total - len(hashes), uncached, came=now)
        if len(hashes) + request.sampling.n * job.row_blocks > settings.num_blocks:
            raise ContextLengthExceeded(
                f"the request needs more than the {settings.num_blocks} KV blocks there are", param="max_tokens"
            )
        self._jobs[request.request_id] = job
        self._waiting.add(job, request, job.uncached, now)
        if request.deadline_s is not None:
            self._deadlines.add(request.request_id, now + request.deadline_s)

    def _check(self, request: GenerateRequest) -> None:
        settings, sampling = self.settings, request.sampling
        sampling.validate()
        if request.request_id in self._jobs:
            raise InvalidRequest(f"request {request.request_id!r} is already running")
        if sampling.logprobs is not None and settings.logprob is None:
            raise NotSupported("this fake engine has no logprobs", param="logprobs")
        if sampling.n > settings.max_num_seqs:
            raise InvalidRequest(f"n must not exceed max_num_seqs ({settings.max_num_seqs})", param="n")
        if not request.prompt_token_ids:
            raise InvalidRequest("the prompt must not be empty", param="prompt")
        if min(request.prompt_token_ids) < 0 or max(request.prompt_token_ids) >= self._card.vocab_size:
            raise InvalidRequest(f"token ids must be between 0 and {self._card.vocab_size - 1}", param="prompt")
        length = len(request.prompt_token_ids)
        if length + sampling.max_tokens > self._card.max_model_len:
            raise ContextLengthExceeded(
                f"{length} prompt tokens and max_tokens {sampling.max_tokens} exceed the context length of "
                f"{self._card.max_model_len} tokens",
                param="max_tokens",
            )

    def abort(self, request_id: str) -> bool:
        job = self._jobs.get(request_id)
        if job is None:
            return False
        self._end(job)
        return True

    def _end(self, job: Job) -> None:
        """Before its time, wherever it is."""
        if self._waiting.remove(job):
            del self._jobs[job.request.request_id]
            self._deadlines.discard(job.request.request_id)
        else:
            self._drop(job)

    def has_work(self) -> bool:
        return bool(self._jobs)

    def wait_s(self) -> float:
        now = self._clock()
        instants = [row.due for row in self._rows]
        head = self._waiting.head(now)
        if head is not None and self._fits(head, now):
            instants.append(self._turn_of(head, now))
        if (deadline := self._deadlines.next()) is not None:
            instants.append(deadline)
        return max(min(instants, default=0.0) - now, 0.0)

    def step(self) -> list[Chunk]:
        now = self._clock()
        late = self._deadlines.take_late(now)
        for request_id in late:
            self._end(self._jobs[request_id])
        # Prompts are computed one after another, so the next one starts, and is chosen, when the last one is done.
        while (job := self._waiting.head(now)) is not None and self._turn_of(job, now) <= now:
            if self._is_hopeless(job, now):
                late.append(job.request.request_id)
                self._end(job)
                continue
            self._make_way(job, now)
            if self._fits(job, now):
                self._waiting.take(job, now, job.request.sampling.n)
                self._start(job, now)
            else:
                break
        self._steps += 1
        chunks = [Chunk(request_id=request_id, error=too_late()) for request_id in late]
        for row in [row for row in self._rows if row.due <= now]:
            if row.job.request.request_id in self._jobs:  # else an earlier choice of this step failed the request
                chunks.append(self._emit(row))
        return chunks

    # ---------------------------------------------------------------- the life of a request

    def _cached_tokens(self, prompt: tuple[int, ...], hashes: list[bytes]) -> int:
        # At least one token must be computed, or there would be nothing to continue from.
        size = self.settings.block_size
        return self._blocks.num_cached(hashes[: (len(prompt) - 1) // size]) * size

    def _fits(self, job: Job, now: float) -> bool:
        n, seats, blocks = job.request.sampling.n, self.settings.max_num_seqs, 0
        if self._floods(job, now):
            seats -= self._limits.reserved(seats)
            blocks = self._limits.reserved(self.settings.num_blocks)
        return len(self._rows) + n <= seats and self._blocks.can_acquire(job.hashes, n * job.row_blocks + blocks)

    def _floods(self, job: Job, now: float) -> bool:
        return self._waiting.shared(now) and self._waiting.floods(job.account, now)

    def _turn_of(self, job: Job, now: float) -> float:
        """When the prompt of `job` may be begun: one of a key that floods is interrupted for those of others."""
        self._computing = [one for one in self._computing if one.ready_at > now]
        ahead = [one.ready_at for one in self._computing if not self._floods(one, now)]
        if len(ahead) == len(self._computing) or self._floods(job, now):
            return self._prefill_free_at
        return max(ahead, default=0.0)

    def _make_way(self, head: Job, now: float) -> None:
        """Where `head` does not fit, the youngest of a key that floods leave their places to it, as in the engine."""
        if not self._waiting.shared(now) or self._floods(head, now):
            return
        running = (job for job in reversed(self._jobs.values()) if job.rows)
        for job in [job for job in running if job.account.cost > head.account.cost and self._floods(job, now)]:
            if self._fits(head, now):
                return
            if job.account.priority >= head.account.priority:
                self._park(job, now)

    def _park(self, job: Job, now: float) -> None:
        job.parked = job.rows.copy()
        for row in job.parked:
            self._release_row(row)
        job.rows.clear()
        self._blocks.release(job.hashes)
        if job in self._computing:
            self._computing.remove(job)
        self._waiting.put_back(job, now)

    def _is_hopeless(self, job: Job, now: float) -> bool:
        """Whether it would be too late even if nothing else ran from here on."""
        deadline, settings = self._deadlines.get(job.request.request_id), self.settings
        if deadline is None:
            return False
        uncached = len(job.request.prompt_token_ids) - self._cached_tokens(job.request.prompt_token_ids, job.hashes)
        later = max(job.request.sampling.min_tokens, 1) - 1
        needed = uncached / settings.prefill_tokens_per_s if settings.prefill_tokens_per_s else 0.0
        needed += later / settings.tokens_per_s if settings.tokens_per_s else 0.0
        return now + needed > deadline

    def _start(self, job: Job, now: float) -> None:
        request, sampling = job.request, job.request.sampling
        prompt = request.prompt_token_ids
        cached = self._cached_tokens(prompt, job.hashes)
        job.uncached = len(prompt) - cached
        # A step that is late does not make the time-table late, unless what the job waited for was a place.
        begin = min(now, max(self._turn_of(job, now), self._released_at, job.came))
        self._blocks.acquire(job.root, job.hashes, sampling.n * job.row_blocks)
        self._waiting.charge(job.account, job.uncached, now)
        self._compute(job, begin)
        if job.parked:
            job.rows, job.parked = job.parked, []
            for row in job.rows:
                row.due = job.ready_at
        else:
            job.cached = cached
            job.phases.scheduled(begin)
            for index in range(sampling.n):
                salt = (sampling.seed or 0, index) if sampling.temperature > 0 else ()
                start = self._script.start(prompt, salt)
                job.rows.append(Row(job, index, start, job.ready_at, Detokenizer(sampling.stop)))
            self._prompt_tokens += len(prompt)
            self._queries += len(prompt)
            self._hits += job.cached
        self._rows += job.rows

    def _compute(self, job: Job, begin: float) -> None:
        """The prompt's place in the time-table; those that it interrupts are ready so much later."""
        rate = self.settings.prefill_tokens_per_s
        seconds = job.uncached / rate if rate else 0.0
        interrupted = [one for one in self._computing if one.ready_at > begin] if begin < self._prefill_free_at else []
        for one in interrupted:
            one.ready_at += seconds
            for row in one.rows:
                row.due += seconds
        job.ready_at = begin + seconds
        self._prefill_free_at = max(self._prefill_free_at + seconds, job.ready_at) if interrupted else job.ready_at
        self._computing.append(job)

    def _emit(self, row: Row) -> Chunk:
        """The next token of one choice, with all that follows from it."""
        job, settings = row.job, self.settings
        request_id, sampling = job.request.request_id, job.request.sampling
        token, text, finish = self._next(row)
        row.tokens.append(token)
        job.completed += 1
        self._waiting.charge(job.account, OUTPUT_WEIGHT, self._clock())
        self._generation_tokens += 1
        if self._tally >= 0:
            os.write(self._tally, f"{request_id}\n".encode())
        self._misbehave(len(row.tokens))
        if len(row.tokens) == settings.fail_after_tokens:
            self._drop(job)
            return Chunk(request_id=request_id, error=EngineFault("the fake engine was told to fail here"))
        if finish is None and len(row.tokens) == sampling.max_tokens:
            finish = FinishReason.LENGTH
            text += row.text.flush()
        row.due += 1.0 / settings.tokens_per_s if settings.tokens_per_s else 0.0
        usage = self._finish(row) if finish else None
        return Chunk(
            request_id=request_id,
            index=row.index,
            text=text,
            token_ids=(token,),
            logprobs=self._logprobs(row, token),
            finish_reason=finish,
            usage=usage,
            timing=job.phases.token(self._clock(), last=usage is not None, cached=job.cached),
        )

    def _next(self, row: Row) -> tuple[int, str, FinishReason | None]:
        sampling, length = row.job.request.sampling, len(row.tokens) + 1
        may_stop = length >= sampling.min_tokens
        ends = self.settings.reply_tokens is not None and length >= self.settings.reply_tokens
        if ends and may_stop and not sampling.ignore_eos and self._card.eos_token_ids:
            return self._card.eos_token_ids[0], row.text.flush(), FinishReason.STOP
        token, piece = self._script.token_ids[row.position], self._script.pieces[row.position]
        row.position = (row.position + 1) % len(self._script.token_ids)
        if may_stop and token in sampling.stop_token_ids:
            return token, row.text.flush(), FinishReason.STOP
        text, stopped = row.text.push(piece, check_stop=may_stop)
        return token, text, FinishReason.STOP if stopped else None

    def _logprobs(self, row: Row, token: int) -> tuple[TokenLogprob, ...]:
        wanted, logprob = row.job.request.sampling.logprobs, self.settings.logprob
        if wanted is None or logprob is None:
            return ()
        alone = TokenLogprob(token, self._bytes.get(token, b""), logprob)
        return (replace(alone, top=(alone,) * min(wanted, 1)),)

    def _misbehave(self, tokens: int) -> None:
        settings = self.settings
        if tokens == settings.crash_after_tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if tokens == settings.hang_after_tokens:
            self.hang.wait()
        if tokens == settings.raise_after_tokens:
            raise RuntimeError("the fake engine was told to break here")

    def _finish(self, row: Row) -> Usage | None:
        """Take a choice out; the request's usage if it was the last."""
        job = row.job
        self._release_row(row)
        job.rows.remove(row)
        if job.rows:
            return None
        self._forget(job)
        prompt_tokens = len(job.request.prompt_token_ids)
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=job.completed, cached_tokens=job.cached)

    def _drop(self, job: Job) -> None:
        for row in job.rows:
            self._release_row(row)
        job.rows.clear()
        self._forget(job)

    def _release_row(self, row: Row) -> None:
        job, size = row.job, self.settings.block_size
        tail = job.request.prompt_token_ids[len(job.hashes) * size :]
        parent = job.hashes[-1] if job.hashes else job.root
        # The last token's key and value were never computed.
        written = self._blocks.chain(parent, (*tail, *row.tokens[:-1]))
        self._blocks.release_private(job.row_blocks, parent, written)
        job.account.seats -= 1
        self._released_at = self._clock()
        self._rows.remove(row)

    def _forget(self, job: Job) -> None:
        self._blocks.release(job.hashes)
        self._released_at = self._clock()
        self._deadlines.discard(job.request.request_id)
        del self._jobs[job.request.request_id]

    # ---------------------------------------------------------------- what it tells of itself

    def stats(self) -> EngineStats:
        settings, now = self.settings, self._clock()
        # What is being computed counts by the time that is left of it.
        computing = max(self._prefill_free_at - now, 0.0) * settings.prefill_tokens_per_s if self._rows else 0.0
        return EngineStats(
            num_requests_running=len(self._jobs) - len(self._waiting),
            num_requests_waiting=len(self._waiting),
            queued_tokens=self._waiting.tokens + int(computing),
            kv_blocks_total=settings.num_blocks,
            kv_blocks_free=self._blocks.num_free,
            prefill_rate=settings.prefill_tokens_per_s,
            decode_step_s=1.0 / settings.tokens_per_s if settings.tokens_per_s else 0.0,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=self._queries,
            prefix_cache_hits=self._hits,
            steps=self._steps,
        )

    def take_events(self) -> list[KVEvent]:
        events, self._blocks.events = self._blocks.events, []
        return events

    def cached_hashes(self) -> list[bytes]:
        return list(self._blocks.refs)

    def check_integrity(self) -> None:
        held: Counter[bytes] = Counter()
        private = 0
        for job in self._jobs.values():
            if job.rows:
                held.update(job.hashes)
                private += len(job.rows) * job.row_blocks
        self._blocks.check_integrity(held, private)
        assert sum(len(job.rows) for job in self._jobs.values()) == len(self._rows), "a choice runs without its request"
        waiting = sum(not job.rows for job in self._jobs.values())
        assert waiting == len(self._waiting), f"{len(self._waiting)} stand in line, {waiting} have not begun"
