"""A deterministic engine without torch: same interface, same refusals, same prefix cache, invented words.

It is a product, not a test double: gateways are measured against it and fleets are rehearsed with it. The text is a
function of prompt, seed and choice alone. Tokens fall due on a time-table (prompts are computed one after another at
`prefill_tokens_per_s`, then each choice brings a token every 1 / `tokens_per_s`), so a late step catches up and nothing
drifts. Its distributions give one token the probability 1: temperature, penalties and bias are honoured by changing
nothing; logprobs are one configured number, or refused.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tokenizers import Tokenizer

from replicas.engine.detokenizer import Detokenizer
from replicas.fake_blocks import PrefixBlocks
from replicas.fake_text import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, byte_tokenizer, script
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


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeSettings:
    """A fleet file's `engine_settings` when `engine: fake`. Rates of 0 mean as fast as possible.

    tokens_per_s: of each choice. prefill_tokens_per_s: of the whole engine.
    max_num_seqs: choices that run at once. max_waiting: requests that queue before QueueFull.
    reply_tokens: a choice ends by itself ("stop") after so many tokens; None lets it run to max_tokens.
    fail_after_tokens: a request that has brought so many tokens ends in an EngineFault.
    raise_after_tokens: then `step` itself raises. hang_after_tokens: then `step` does not return.
    crash_after_tokens: then the process dies as by kill -9. refuse_as_full: every `add` raises QueueFull.
    start_delay_s: the constructor takes so long. logprob: what every token is said to have; None refuses logprobs.
    """

    tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    max_num_seqs: int = 256
    max_waiting: int = 1024
    num_blocks: int = 65536
    block_size: int = 16
    max_model_len: int = 8192
    reply_tokens: int | None = None
    fail_after_tokens: int | None = None
    raise_after_tokens: int | None = None
    hang_after_tokens: int | None = None
    crash_after_tokens: int | None = None
    refuse_as_full: bool = False
    start_delay_s: float = 0.0
    logprob: float | None = None


@dataclass(slots=True, eq=False)
class _Job:
    """A request on its way. hashes: full blocks of its prompt; row_blocks: further ones of each choice."""

    request: GenerateRequest
    root: bytes
    hashes: list[bytes]
    row_blocks: int
    uncached: int
    cached: int = 0
    completed: int = 0
    ready_at: float = 0.0
    rows: list[_Row] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Row:
    """One choice; its next token is piece `position` of the script and falls due at `due`."""

    job: _Job
    index: int
    position: int
    due: float
    text: Detokenizer
    tokens: list[int] = field(default_factory=list)


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
        self._clock = clock
        self._card = card or fake_card(settings)
        self._script = script(tokenizer or byte_tokenizer())
        self._bytes = dict(zip(self._script.token_ids, self._script.pieces, strict=True))
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[str, _Job] = {}
        self._rows: list[_Row] = []
        self._blocks = PrefixBlocks(settings.num_blocks, settings.block_size)
        self._prefill_free_at = 0.0
        self._queued_tokens = 0
        self._prompt_tokens = self._generation_tokens = self._steps = 0
        self._queries = self._hits = 0

    @property
    def card(self) -> ModelCard:
        return self._card

    # ---------------------------------------------------------------- in and out

    def add(self, request: GenerateRequest) -> None:
        self._check(request)
        settings, prompt = self.settings, request.prompt_token_ids
        root = prefix_root(request.tenant, self._card.revision)
        hashes = self._blocks.chain(root, prompt)
        total = -(-(len(prompt) + request.sampling.max_tokens) // settings.block_size)
        job = _Job(request, root, hashes, total - len(hashes), len(prompt) - self._cached_tokens(prompt, hashes))
        if len(hashes) + request.sampling.n * job.row_blocks > settings.num_blocks:
            raise ContextLengthExceeded(
                f"the request needs more than the {settings.num_blocks} KV blocks there are", param="max_tokens"
            )
        self._jobs[request.request_id] = job
        self._waiting.append(job)
        self._queued_tokens += job.uncached

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
        if any(not 0 <= token < self._card.vocab_size for token in request.prompt_token_ids):
            raise InvalidRequest(f"token ids must be between 0 and {self._card.vocab_size - 1}", param="prompt")
        length = len(request.prompt_token_ids)
        if length + sampling.max_tokens > self._card.max_model_len:
            raise ContextLengthExceeded(
                f"{length} prompt tokens and max_tokens {sampling.max_tokens} exceed the context length of "
                f"{self._card.max_model_len} tokens",
                param="max_tokens",
            )
        if settings.refuse_as_full or len(self._waiting) >= settings.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests are waiting", retry_after_s=1.0)

    def abort(self, request_id: str) -> bool:
        job = self._jobs.get(request_id)
        if job is None:
            return False
        if job in self._waiting:
            self._waiting.remove(job)
            self._queued_tokens -= job.uncached
            del self._jobs[request_id]
        else:
            self._drop(job)
        return True

    def has_work(self) -> bool:
        return bool(self._jobs)

    def wait_s(self) -> float:
        if self._waiting and self._fits(self._waiting[0]):
            return 0.0
        return max(min((row.due for row in self._rows), default=0.0) - self._clock(), 0.0)

    def step(self) -> list[Chunk]:
        now = self._clock()
        while self._waiting and self._fits(self._waiting[0]):
            self._start(self._waiting.popleft(), now)
        self._steps += 1
        chunks: list[Chunk] = []
        for row in [row for row in self._rows if row.due <= now]:
            if row.job.request.request_id in self._jobs:  # else an earlier choice of this step failed the request
                chunks.append(self._emit(row))
        return chunks

    # ---------------------------------------------------------------- the life of a request

    def _cached_tokens(self, prompt: tuple[int, ...], hashes: list[bytes]) -> int:
        # At least one token must be computed, or there would be nothing to continue from.
        size = self.settings.block_size
        return self._blocks.num_cached(hashes[: (len(prompt) - 1) // size]) * size

    def _fits(self, job: _Job) -> bool:
        n = job.request.sampling.n
        return len(self._rows) + n <= self.settings.max_num_seqs and self._blocks.can_acquire(
            job.hashes, n * job.row_blocks
        )

    def _start(self, job: _Job, now: float) -> None:
        request, sampling = job.request, job.request.sampling
        prompt = request.prompt_token_ids
        self._queued_tokens -= job.uncached
        job.cached = self._cached_tokens(prompt, job.hashes)
        job.uncached = len(prompt) - job.cached
        self._blocks.acquire(job.root, job.hashes, sampling.n * job.row_blocks)
        rate = self.settings.prefill_tokens_per_s
        begin = max(now, self._prefill_free_at)
        job.ready_at = self._prefill_free_at = begin + (job.uncached / rate if rate else 0.0)
        for index in range(sampling.n):
            salt = (sampling.seed or 0, index) if sampling.temperature > 0 else ()
            start = self._script.start(prompt, salt)
            job.rows.append(_Row(job, index, start, job.ready_at, Detokenizer(sampling.stop)))
        self._rows += job.rows
        self._prompt_tokens += len(prompt)
        self._queries += len(prompt)
        self._hits += job.cached

    def _emit(self, row: _Row) -> Chunk:
        """The next token of one choice, with all that follows from it."""
        job, settings = row.job, self.settings
        request_id, sampling = job.request.request_id, job.request.sampling
        token, text, finish = self._next(row)
        row.tokens.append(token)
        job.completed += 1
        self._generation_tokens += 1
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
        )

    def _next(self, row: _Row) -> tuple[int, str, FinishReason | None]:
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

    def _logprobs(self, row: _Row, token: int) -> tuple[TokenLogprob, ...]:
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

    def _finish(self, row: _Row) -> Usage | None:
        """Take a choice out; the request's usage if it was the last."""
        job = row.job
        self._release_row(row)
        job.rows.remove(row)
        if job.rows:
            return None
        self._forget(job)
        prompt_tokens = len(job.request.prompt_token_ids)
        return Usage(prompt_tokens=prompt_tokens, completion_tokens=job.completed, cached_tokens=job.cached)

    def _drop(self, job: _Job) -> None:
        for row in job.rows:
            self._release_row(row)
        job.rows.clear()
        self._forget(job)

    def _release_row(self, row: _Row) -> None:
        job, size = row.job, self.settings.block_size
        tail = job.request.prompt_token_ids[len(job.hashes) * size :]
        parent = job.hashes[-1] if job.hashes else job.root
        # The last token's key and value were never computed.
        written = self._blocks.chain(parent, (*tail, *row.tokens[:-1]))
        self._blocks.release_private(job.row_blocks, parent, written)
        self._rows.remove(row)

    def _forget(self, job: _Job) -> None:
        self._blocks.release(job.hashes)
        del self._jobs[job.request.request_id]

    # ---------------------------------------------------------------- what it tells of itself

    def stats(self) -> EngineStats:
        settings, now = self.settings, self._clock()
        # What is being computed counts by the time that is left of it.
        computing = max(self._prefill_free_at - now, 0.0) * settings.prefill_tokens_per_s if self._rows else 0.0
        return EngineStats(
            num_requests_running=len(self._jobs) - len(self._waiting),
            num_requests_waiting=len(self._waiting),
            queued_tokens=self._queued_tokens + int(computing),
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
            if job not in self._waiting:
                held.update(job.hashes)
                private += len(job.rows) * job.row_blocks
        self._blocks.check_integrity(held, private)
        assert sum(len(job.rows) for job in self._jobs.values()) == len(self._rows), "a choice runs without its request"


def fake_card(settings: FakeSettings, model: str = "fake", default_max_tokens: int = 0) -> ModelCard:
    """Of the tokenizer of bytes."""
    tokenizer = byte_tokenizer()
    return ModelCard(
        model=model,
        revision="fake-1",
        max_model_len=settings.max_model_len,
        vocab_size=tokenizer.get_vocab_size(),
        block_size=settings.block_size,
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=CHAT_TEMPLATE,
        special_tokens={"bos_token": END_OF_TEXT, "eos_token": TURN_END, "pad_token": END_OF_TEXT},
        eos_token_ids=tuple(tokenizer.get_vocab()[text] for text in (TURN_END, END_OF_TEXT)),
        default_max_tokens=default_max_tokens,
    )
