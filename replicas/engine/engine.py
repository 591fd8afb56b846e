"""The engine: requests in, one chunk a step for every sequence that moved. One thread drives it.

    engine = Engine(EngineConfig(model="path/to/model"))
    for completion in engine.generate(["Hello", "The sky is"], SamplingParams(max_tokens=32, temperature=0)):
        print(completion.outputs[0].text)

Knows nothing of sockets, Ray or HTTP; `replicas.server` drives it for a fleet.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import zip_longest

import torch

from replicas.engine.blocks import BlockPool
from replicas.engine.config import EngineConfig
from replicas.engine.deadlines import too_late
from replicas.engine.detokenizer import Detokenizer
from replicas.engine.draw import choose_draw
from replicas.engine.flight import Flight, choose_async, needs_history
from replicas.engine.forward import Forward
from replicas.engine.graphs import choose_graphs
from replicas.engine.host_cache import build_host_cache, staging_bytes
from replicas.engine.layout import Layout
from replicas.engine.loading import Loaded, load, use_device
from replicas.engine.memory import choose_num_blocks
from replicas.engine.meter import Meter
from replicas.engine.offline import Completion, collect
from replicas.engine.phases import Phases
from replicas.engine.rehearsal import measure_steps, run_largest_steps
from replicas.engine.sampler import Sampled, Sampler
from replicas.engine.scheduler import Scheduler, Step
from replicas.engine.sequence import Group, Sequence, sampled_rows
from replicas.engine.spec.build import build_speculation, typical_rule
from replicas.engine.spec.speculation import Speculation
from replicas.engine.staging import staged
from replicas.engine.waiting import OUTPUT_WEIGHT
from replicas.protocol import (
    Chunk,
    ConfigError,
    ContextLengthExceeded,
    EngineFault,
    EngineStats,
    FinishReason,
    GenerateRequest,
    InvalidRequest,
    KVEvent,
    SamplingParams,
    TokenLogprob,
    Usage,
    prefix_root,
)

logger = logging.getLogger(__name__)

_RECORDING = 20.0  # times as long as measuring what is not recorded


class Engine:
    """A `protocol.TokenEngine` over real weights. ConfigError where the model or the settings cannot work.

    loaded: in place of what `config` names. speculation: in place of what `config.speculative` describes.
    """

    def __init__(
        self, config: EngineConfig, loaded: Loaded | None = None, speculation: Speculation | None = None
    ) -> None:
        loaded = loaded or load(config)
        use_device(loaded.device)
        self.config = config
        self.loaded: Loaded = loaded
        self._decoder, self._tokenizer = loaded.decoder, loaded.tokenizer
        self.max_model_len = loaded.decoder.max_model_len
        self._eos = frozenset(loaded.card.eos_token_ids)
        self._sampler = Sampler(loaded.card.eos_token_ids, typical_rule(config.speculative), choose_draw(loaded.device))
        self._random = random.Random(config.seed)
        budget = loaded.max_num_batched_tokens
        # Drafts come before the KV cache, which takes what is left. No two recorded steps run at once: one pool of
        # memory is enough for the model's and the draft's.
        make_graph = choose_graphs(config.step_graphs, loaded.device, loaded.attention)
        self._speculation = speculation or build_speculation(config, loaded, self.max_model_len, make_graph)
        bytes_per_block = loaded.kv_bytes_per_token * config.block_size
        num_blocks = choose_num_blocks(
            config,
            loaded.device,
            bytes_per_block,
            self.max_model_len,
            lambda: run_largest_steps(loaded, config, self._sampler) + staging_bytes(config),
        )
        self._fit_context(num_blocks * config.block_size)
        self._kv = loaded.allocate_kv(num_blocks + 1, config.block_size)  # the last is scratch for padded steps
        self.host_cache = build_host_cache(config, self._kv, num_blocks, bytes_per_block)
        self.pool = BlockPool(
            num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            host=self.host_cache.store if self.host_cache else None,
        )
        self._forward = Forward(loaded, config, self._kv, self.max_model_len, num_blocks, make_graph)
        self._graphs = self._forward.graphs
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=budget,
            watermark=config.watermark,
            limits=config.line_limits,
            tokens_per_step=config.tokens_per_step,
        )
        self._layout = Layout(config.max_num_seqs, self.max_model_len, config.block_size, loaded.device)
        self._groups: dict[str, Group] = {}
        self._texts: dict[Sequence, Detokenizer] = {}
        self._async = choose_async(config, loaded.device)
        self._flight: Flight | None = None
        self._landed_at = 0.0
        self._meter = Meter()
        self._steps = self._prompt_tokens = self._generation_tokens = 0
        if config.speculative is not None and config.speculative.adaptive:
            self._speculation.cost.calibrate(self.measure_steps())
        self._tokenizer.token_bytes(0)  # builds its table now, not in the first request's first token
        self.card = replace(
            loaded.card,
            max_model_len=self.max_model_len,
            block_size=config.block_size,
            kv_format=loaded.kv_format,
            backends=loaded.backends
            + (", overlapping kernels" if self._forward.overlaps else "")
            + (f", {self.host_cache}" if self.host_cache else ""),
        )

    # ---------------------------------------------------------------- requests

    def add(self, request: GenerateRequest) -> None:
        """Queue a request. Those of `check`, QueueFull and DeadlineExceeded leave no trace of it."""
        self.check(request)
        self.scheduler.check(request)
        params = request.sampling
        prompt = list(request.prompt_token_ids)
        seed = self._random.getrandbits(63) if params.seed is None else params.seed
        root = prefix_root(request.tenant, self.card.revision, self.loaded.kv_format)
        sequences = [
            Sequence(request.request_id, index, prompt.copy(), len(prompt), params, seed, root)
            for index in range(params.n)
        ]
        first = sequences[0]
        first.queued_tokens = len(prompt) - self.scheduler.cached_tokens(first)
        self._groups[request.request_id] = Group(
            request, sequences, sequences[1:], params.n, Phases(time.perf_counter())
        )
        self._texts.update((seq, Detokenizer(params.stop)) for seq in sequences)
        self.scheduler.add(first, request)
        self._prompt_tokens += len(prompt)

    def abort(self, request_id: str) -> bool:
        """Drop a request at once: its blocks are free when this returns. False if there is none of that id."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return False
        self.scheduler.deadlines.discard(request_id)
        for seq in group.sequences:
            self._drop(seq)
        return True

    def has_work(self) -> bool:
        return bool(self._groups)

    def use(self, speculation: Speculation) -> None:
        """Let others guess from now on. The engine must be idle: what the present ones know of requests is lost."""
        assert not self._groups, "the proposers of an engine at work were to be replaced"
        self._speculation = speculation

    @property
    def speculation(self) -> Speculation:
        """What guesses, with its counters."""
        return self._speculation

    def queue_full(self) -> bool:
        return self.scheduler.waiting.full()

    def wait_s(self) -> float:
        return 0.0

    # ---------------------------------------------------------------- the loop

    def step(self) -> list[Chunk]:
        """Schedule, compute, sample, commit. A fault ends the step's requests, not the engine.

        Where the engine runs ahead (`EngineConfig.async_scheduling`), what is committed is the step before the one that
        is begun, so that the device has work while the host waits for tokens and tells of them.
        """
        started = time.perf_counter()
        use_device(self.loaded.device)  # whichever thread this is
        flight = self._flight
        chunks = self._land() if flight is not None and flight.waits else []
        chunks += self._end_late(self.scheduler.take_late())
        if self._flight is not None:
            self._flight.assume(self._texts.__contains__, self.max_model_len)
        self._speculation.propose(self.scheduler.running, self.scheduler.tokens_at_hand())
        step = self.scheduler.schedule()
        chunks += self._end_late([seq.request_id for seq in step.hopeless])
        if not step.items:
            assert self._flight or not self._groups, "requests wait, nothing runs, and the scheduler found no step"
            return chunks + self._land()
        try:
            before, self._flight = self._flight, self._launch(step, started)
        except Exception:
            logger.exception("step of %d sequences failed", len(step.items))
            return chunks + self._land() + self._fail(step)
        if before is not None:
            chunks += self._commit(before)
        if not self._runs_ahead:
            chunks += self._land()
        return chunks

    @property
    def _runs_ahead(self) -> bool:
        # Drafts are guessed from tokens: whoever speculates has to know the last ones.
        return self._async and not self._speculation.active

    def _measure(self, seconds: float, step: Step) -> None:
        copying = self.host_cache.settle() if self.host_cache else 0.0
        self._meter.record(seconds - min(copying, seconds / 2), step.num_prefill_tokens, self.pool.released)
        if self.host_cache:
            self.host_cache.store.rule.prefill_rate = self._meter.prefill_rate

    @torch.inference_mode()
    def _launch(self, step: Step, started: float) -> Flight:
        """Begin a step: when this returns, its sequences stand as if what was known of them were computed."""
        for seq in step.preempted:
            self._layout.release(seq)
            self._speculation.forget(seq)
        if self.host_cache:
            self.host_cache.move(step.offloads, step.fetches)
        self._copy_blocks(step.copies)
        batch = self._layout(step.items, self._flight.drawn.tokens if self._flight else None)
        logits, hidden = self._forward(batch)
        rows = [row for seq, count in step.items for row in sampled_rows(seq, count)]
        self._speculation.computed(rows, hidden)
        drawn = self._sampler.draw(logits, rows)
        wanted = [seq.logits_wanted(count) for seq, count in step.items]
        for (seq, count), sampled in zip(step.items, wanted, strict=True):
            group = self._groups[seq.request_id]
            if seq.num_output == 0:
                group.phases.scheduled(started)
            known = min(count, seq.num_tokens - seq.num_computed)
            seq.num_computed += known
            seq.queued_tokens = max(seq.queued_tokens - known, 0)
            if sampled and group.unforked:
                self.scheduler.fork(group, seq)
        return Flight(step, drawn, wanted, started, waits=any(map(needs_history, rows)))

    def _land(self) -> list[Chunk]:
        """Wait for the step in flight, if there is one."""
        flight, self._flight = self._flight, None
        return [] if flight is None else self._commit(flight)

    def _commit(self, flight: Flight) -> list[Chunk]:
        """What a step brought, for those who are still here."""
        try:
            results = flight.results()
        except Exception:  # a device tells of a failure when it is asked for results
            logger.exception("step of %d sequences failed", len(flight.step.items))
            return self._fail(flight.step)
        chunks = [self._append(seq, sampled) for seq, sampled in results if seq in self._texts]
        if self._flight is not None and not self._flight.alive(self._texts.__contains__):
            self._flight = None
        now = time.perf_counter()
        seconds, self._landed_at = now - max(flight.started, self._landed_at), now
        self._steps += 1
        self._speculation.record(seconds, flight.num_rows)
        self._measure(seconds, flight.step)
        self.scheduler.record(seconds, flight.step)
        return chunks

    def _append(self, seq: Sequence, sampled: list[Sampled]) -> Chunk:
        """Give `seq` its next tokens; what a client sees of them; the end of the choice and of the request, if it is.

        sampled[i] was drawn as if the drafts before it were tokens: it counts as long as they are.
        """
        group = self._groups[seq.request_id]
        drafts, seq.drafts = seq.drafts, []
        assert len(sampled) == len(drafts) + 1, f"{len(sampled)} rows were sampled for {len(drafts)} drafts"
        text, accepted = "", 0
        logprobs: tuple[TokenLogprob, ...] = ()
        for drawn, draft in zip_longest(sampled, drafts):
            seq.learn(drawn.token_id)
            text += self._advance(seq, drawn.token_id)
            logprobs += self._logprobs(drawn)
            if seq.finish_reason is not None or drawn.token_id != draft:
                break
            accepted += 1
        seq.num_computed += accepted  # beyond them the cache holds keys of tokens that never came: overwritten next
        seq.account.cost += OUTPUT_WEIGHT * accepted
        self._generation_tokens += accepted + 1
        self._speculation.verified(seq, len(drafts), accepted)
        usage = None
        if seq.finish_reason is not None:
            self._drop(seq)
            group.num_unfinished -= 1
            if group.num_unfinished == 0:
                del self._groups[seq.request_id]
                self.scheduler.deadlines.discard(seq.request_id)
                usage = Usage(
                    prompt_tokens=seq.num_prompt,
                    completion_tokens=sum(s.num_output for s in group.sequences),
                    cached_tokens=group.sequences[0].num_cached,
                )
        return Chunk(
            request_id=seq.request_id,
            index=seq.index,
            text=text,
            token_ids=tuple(seq.tokens[-accepted - 1 :]),
            logprobs=logprobs,
            finish_reason=seq.finish_reason,
            usage=usage,
            timing=group.phases.token(
                time.perf_counter(), last=usage is not None, cached=group.sequences[0].num_cached
            ),
        )

    def _advance(self, seq: Sequence, token: int) -> str:
        """The text that `token` sets free; sets seq.finish_reason when it ends the choice."""
        params, detokenizer = seq.sampling, self._texts[seq]
        may_stop = seq.num_output > params.min_tokens
        ends = (token in self._eos and not params.ignore_eos) or token in params.stop_token_ids
        if ends:
            seq.finish_reason = FinishReason.STOP
            return detokenizer.flush(check_stop=may_stop)
        text, stopped = detokenizer.push(self._text_bytes(token), check_stop=may_stop)
        if stopped:
            seq.finish_reason = FinishReason.STOP
        elif seq.num_output >= params.max_tokens or seq.num_tokens >= self.max_model_len:
            seq.finish_reason = FinishReason.LENGTH
            text += detokenizer.flush(check_stop=may_stop)
        return text

    def _text_bytes(self, token: int) -> bytes:
        return b"" if token in self._tokenizer.special_ids else self._tokenizer.token_bytes(token)

    def _logprobs(self, sampled: Sampled) -> tuple[TokenLogprob, ...]:
        if sampled.logprob is None:
            return ()
        name = self._tokenizer.token_bytes
        top = tuple(TokenLogprob(token, name(token), logprob) for token, logprob in sampled.top)
        return (TokenLogprob(sampled.token_id, name(sampled.token_id), sampled.logprob, top),)

    def _drop(self, seq: Sequence) -> None:
        self.scheduler.drop(seq)
        self._layout.release(seq)
        self._speculation.forget(seq)
        self._texts.pop(seq, None)

    def _end_late(self, request_ids: list[str]) -> list[Chunk]:
        """End requests whose deadline came, or cannot be met: their blocks are free for the step to come."""
        for request_id in request_ids:
            self.abort(request_id)
        return [Chunk(request_id=request_id, error=too_late()) for request_id in request_ids]

    def _fail(self, step: Step) -> list[Chunk]:
        """End every request of a failed step. Blocks it was to fill may hold anything: forget the whole cache, and what
        a step after it computed from them."""
        self._flight = None
        failed = [id for id in dict.fromkeys(seq.request_id for seq, _ in step.items) if self.abort(id)]
        for seq in (*self.scheduler.waiting, *self.scheduler.running):
            # Forks and preempted sequences may share what the failed step left half-written.
            self.pool.release(seq.forget_blocks())
            self._layout.release(seq)
            self._speculation.forget(seq)
        self.pool.clear_cache()
        error = EngineFault("the engine failed while computing this request")
        return [Chunk(request_id=request_id, error=error) for request_id in failed]

    # ---------------------------------------------------------------- what others ask

    def stats(self) -> EngineStats:
        scheduler, host = self.scheduler, self.pool.host
        stats = EngineStats(
            num_requests_running=len(scheduler.running),
            num_requests_waiting=len(scheduler.waiting),
            queued_tokens=sum(s.queued_tokens for s in (*scheduler.waiting, *scheduler.running)),
            kv_blocks_total=self.pool.num_blocks,
            kv_blocks_free=self.pool.num_free,
            prefill_rate=self._meter.prefill_rate,
            decode_step_s=self._meter.decode_step_s,
            block_release_rate=self._meter.block_release_rate,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=scheduler.prefix_queries,
            prefix_cache_hits=scheduler.prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            steps=self._steps,
            spec_decode_num_drafts=self._speculation.num_drafts,
            spec_decode_num_draft_tokens=self._speculation.num_draft_tokens,
            spec_decode_num_accepted_tokens=self._speculation.num_accepted_tokens,
            spec_decode_num_accepted_tokens_per_pos=tuple(self._speculation.accepted_per_position),
        )
        if host is None:
            return stats
        return replace(
            stats,
            host_cache_blocks_total=host.num_slots,
            host_cache_blocks_used=len(host),
            host_cache_block_bytes=host.rule.block_bytes,
            host_cache_offloaded_blocks=host.offloaded,
            host_cache_fetched_blocks=host.fetched,
            host_cache_hits=scheduler.host_hits,
        )

    def take_events(self) -> list[KVEvent]:
        return self.pool.take_events()

    def cached_hashes(self) -> list[bytes]:
        return self.pool.cached_hashes()

    def check_integrity(self) -> None:
        """Recount blocks and rows; AssertionError says what leaked. Costs O(pool): for tests and after faults."""
        live = [seq for group in self._groups.values() for seq in group.sequences if seq.finish_reason is None]
        self.pool.check_integrity([seq.blocks for seq in live])
        rows = sum(seq.row >= 0 for seq in live)
        assert self._layout.rows_in_use == rows, f"{self._layout.rows_in_use} rows in use, {rows} held"
        placed = len(self.scheduler.waiting) + len(self.scheduler.running)
        unforked = sum(len(group.unforked) for group in self._groups.values())
        assert placed + unforked == len(live), f"{placed} sequences placed, {unforked} unforked, {len(live)} alive"
        self._speculation.check_integrity(self.scheduler.running)
        assert set(self._texts) == set(live), "a detokeniser outlived its sequence"

    def generate(
        self, prompts: str | Seq[str] | Seq[Seq[int]], sampling: SamplingParams | Seq[SamplingParams]
    ) -> list[Completion]:
        """Run prompts (texts or token ids) to their ends, all in one batch; results in the prompts' order.

        `sampling` is one for all or one each. InvalidRequest and ContextLengthExceeded name the first bad prompt's
        fault, and then nothing is generated.
        """
        texts = [prompts] if isinstance(prompts, str) else prompts
        return collect(self, [self.encode(p) if isinstance(p, str) else list(p) for p in texts], sampling)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` with the special tokens that the model puts before a plain prompt."""
        return self._tokenizer.encode(text)

    # ---------------------------------------------------------------- checks and set-up

    def check(self, request: GenerateRequest) -> None:
        """Raise what `add` would raise of the request itself; nothing is queued."""
        params, prompt = request.sampling, request.prompt_token_ids
        params.validate()
        vocab = self.card.vocab_size
        if request.request_id in self._groups:
            raise InvalidRequest(f"request id {request.request_id!r} is already running", param="request_id")
        if not prompt:
            raise InvalidRequest("prompt must hold at least one token", param="prompt")
        _check_ids(prompt, vocab, "prompt")
        _check_ids(params.stop_token_ids, vocab, "stop_token_ids")
        _check_ids([token for token, _ in params.logit_bias], vocab, "logit_bias")
        if len(prompt) + params.max_tokens > self.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested "
                f"{len(prompt) + params.max_tokens} tokens ({len(prompt)} in the prompt, {params.max_tokens} in the "
                "completion). Please reduce the length of the prompt or of the completion.",
                param="messages",
            )

    def _fit_context(self, pool_tokens: int) -> None:
        if pool_tokens < self.max_model_len:
            if self.config.max_model_len is not None:
                raise ConfigError(
                    f"max_model_len {self.max_model_len} does not fit into a KV cache of {pool_tokens} tokens; "
                    "lower it or raise num_blocks or kv_memory_gib"
                )
            logger.warning("max_model_len lowered from %d to the KV cache's %d", self.max_model_len, pool_tokens)
            self.max_model_len = pool_tokens

    @torch.inference_mode()
    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        if not copies:
            return
        source, target = staged(copies, self.loaded.device).unbind(dim=1)
        self._kv.copy_blocks(source, target)

    def measure_steps(self, limit_s: float = 1.0) -> dict[int, float]:
        """Least seconds of steps by their rows, measured now. The engine must be idle."""
        use_device(self.loaded.device)
        most = min(self.max_model_len, self.pool.num_blocks * self.config.block_size)
        if self._graphs is None:
            return measure_steps(self._forward, self._sampler, self._layout, most, most, limit_s)
        # As steps with drafts are run: several sequences, and recorded in the second round, which takes its time.
        width = self.config.tokens_per_step
        most //= -(-width // self.config.block_size) * self.config.block_size
        return measure_steps(self._forward, self._sampler, self._layout, most * width, width, _RECORDING * limit_s)


def _check_ids(token_ids: Seq[int], vocab_size: int, param: str) -> None:
    if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        bad = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise InvalidRequest(f"{param} holds token id {bad}, which is not in 0..{vocab_size - 1}", param=param)
