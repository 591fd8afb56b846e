"""The vocabulary that gateway, policies and replicas share: frozen messages and one tree of errors.

Standard library only. Nothing here knows HTTP, Ray, sockets or tensors; `replicas.wire` puts these types on a socket
and `gateway.errors` holds the one table that maps the tree to HTTP.

    SignalboxError
    ├── RequestError                 the caller's fault; never retried
    │   ├── InvalidRequest           a field is wrong (`param` names it)
    │   ├── ContextLengthExceeded    prompt + max_tokens do not fit (message holds both counts)
    │   ├── NotSupported             a feature that is not built (`param` names it)
    │   ├── AuthenticationFailed     no key, or a wrong or revoked one
    │   ├── ModelNotFound            no model of that name behind this door
    │   ├── BudgetExceeded           a hard cap of money or tokens would be passed (`retry_after_s`: its window's end)
    │   ├── RateLimited              too much within the minute, or at once (`retry_after_s` is a promise)
    │   ├── PayloadTooLarge          body over the limit
    │   └── DeadlineExceeded         the caller's own time limit passed; trying elsewhere would only be later still
    ├── Unavailable                  not now; may be tried elsewhere while no token has been sent
    │   ├── QueueFull                the engine's bounded queue is full (`retry_after_s`)
    │   ├── ReplicaDraining          the replica takes no new work
    │   ├── ReplicaLost              its process or connection died
    │   └── NoReplica                no replica of the model is ready
    ├── EngineFault                  our bug or the machine's; the request is lost, the process may live
    └── ConfigError                  refused at start: fleet file, checkpoint, unsupported architecture
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import Protocol


class SignalboxError(Exception):
    """Root of every error that Signalbox raises on purpose.

    `message` is safe to show to the caller: it never holds prompt text, paths or keys.
    """

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(SignalboxError):
    """The caller's mistake; the same request would fail again."""


class InvalidRequest(RequestError):
    pass


class ContextLengthExceeded(RequestError):
    pass


class NotSupported(RequestError):
    pass


class AuthenticationFailed(RequestError):
    pass


class ModelNotFound(RequestError):
    pass


class BudgetExceeded(RequestError):
    pass


class RateLimited(RequestError):
    pass


class PayloadTooLarge(RequestError):
    pass


class DeadlineExceeded(RequestError):
    pass


class Unavailable(SignalboxError):
    """Not now, not here. The gateway may try another replica as long as the client has seen no token."""


class QueueFull(Unavailable):
    pass


class ReplicaDraining(Unavailable):
    pass


class ReplicaLost(Unavailable):
    pass


class NoReplica(Unavailable):
    pass


class EngineFault(SignalboxError):
    pass


class ConfigError(SignalboxError):
    pass


# What may cross the wire, by class name; a name from a newer peer falls back to EngineFault.
ERRORS: Mapping[str, type[SignalboxError]] = {
    cls.__name__: cls
    for cls in (
        InvalidRequest,
        ContextLengthExceeded,
        NotSupported,
        ModelNotFound,
        DeadlineExceeded,
        QueueFull,
        ReplicaDraining,
        ReplicaLost,
        NoReplica,
        EngineFault,
        ConfigError,
    )
}


class FinishReason(StrEnum):
    """Why one choice ended. ABORT never reaches a client: nobody is listening any more."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens; names and meanings are vLLM's.

    Neutral values switch a feature off: temperature 0 (anything below 1e-5) is greedy (top_p, top_k, min_p and seed are
    then without effect), top_k 0 and top_p 1 keep the whole vocabulary. Penalties see prompt and output (repetition) or
    output only (presence, frequency), before temperature. `logprobs`: None for none, 0 for the chosen token's, k for
    the k most likely too; they are raw (before bias, penalties and temperature). `logit_bias` holds
    (token id, bias) pairs.
    `validate()` raises InvalidRequest naming the field.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def validate(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN fails both comparisons
                raise InvalidRequest(f"{name} must be between {low} and {high}, got {value!r}", param=name)
        if self.top_p == 0:
            raise InvalidRequest("top_p must be greater than 0", param="top_p")
        for name, most in (("stop_token_ids", 256), ("logit_bias", 1024)):
            if len(getattr(self, name)) > most:  # they are looked through for every token
                raise InvalidRequest(f"{name} must not have more than {most} entries", param=name)
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})", param="min_tokens"
            )
        if any(not text for text in self.stop):
            raise InvalidRequest("stop must not contain an empty string", param="stop")
        if any(not -100 <= bias <= 100 for _, bias in self.logit_bias):
            raise InvalidRequest("logit_bias values must be between -100 and 100", param="logit_bias")


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, 128),
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", 0, 2**31 - 1),
    ("min_p", 0, 1),
    ("seed", -(2**63), 2**63 - 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0.01, 100),
    ("logprobs", 0, 20),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One prompt to continue, as the engine sees it.

    `tenant` salts the prefix cache: requests of different tenants never share blocks ("" is a tenant too).
    `priority`: lower goes first, as in vLLM. `fair_key`: whose request it is; those who wait with one priority are
    served in turn, by what each has had so far ("" is nobody in particular: one more in turn, without a share).
    `deadline_s`: seconds from its submission after which nobody wants the answer (relative, so clocks need not agree);
    it then ends in DeadlineExceeded. None waits for ever.
    `max_queued`, `max_queued_per_key`: refused with QueueFull if so many wait already, of all keys or of its own;
    `max_queued_tokens`: if so many prompt tokens do. None leaves it to the engine's settings; only max_queued_per_key
    can widen them.
    `note`: who pays what, for the replica's journal to keep and give back; "" where nothing is reserved.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = ""
    priority: int = 0
    fair_key: str = ""
    deadline_s: float | None = None
    max_queued: int | None = None
    max_queued_per_key: int | None = None
    note: str = ""
    max_queued_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's raw log-probability. `token` is the token's own bytes, which need not be whole UTF-8 characters."""

    token_id: int
    token: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request, all of its n choices together; cached_tokens is the part of prompt_tokens not computed."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where a request's time went in the engine, in seconds by the engine's own clock.

    queued_s: accepted → first scheduled; prefill_s: from there to its first token, whatever came between (other
    requests' steps, preemption); decode_s: from there to its last token, 0 in what goes out with the first.
    cached_tokens: of its prompt, as in Usage, so that an answer that is cut short can be paid for as well.
    """

    queued_s: float
    prefill_s: float
    decode_s: float = 0.0
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one engine step brought for one choice of one request.

    `text` may be empty while a character or a possible stop string is incomplete; `token_ids` then still counts.
    `finish_reason` ends choice `index`. `usage` is set on exactly one chunk, the last of the request: it is the
    terminal event. `error` is the other terminal event; it stands alone. `timing` comes with a request's first token
    and with its last.
    """

    request_id: str
    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: SignalboxError | None = None
    timing: Timing | None = None

    @property
    def terminal(self) -> bool:
        return self.usage is not None or self.error is not None


class ReplicaState(StrEnum):
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An engine's load and counters at one instant. Rates are measured by the engine itself; 0 means not yet known.

    queued_tokens: prompt tokens accepted but not yet computed and not found in the cache.
    kv_blocks_free: blocks nobody references, cached ones included.
    prefill_rate: prompt tokens a second while prefilling. decode_step_s: seconds of a step without prefill.
    block_release_rate: blocks returned to the pool a second while busy.
    Counters only grow: prefix_cache_queries/hits and *_tokens count tokens, the others events.
    host_cache_*: the host-memory tier, all 0 without one. blocks_total, blocks_used: its slots; block_bytes: of one;
    offloaded_blocks, fetched_blocks: copied there and back; hits: of prefix_cache_hits, tokens that were fetched.
    spec_decode_num_drafts: proposals that were checked; _per_pos: accepted tokens by their place in the proposal.
    """

    num_requests_running: int = 0
    num_requests_waiting: int = 0
    queued_tokens: int = 0
    kv_blocks_total: int = 0
    kv_blocks_free: int = 0
    prefill_rate: float = 0.0
    decode_step_s: float = 0.0
    block_release_rate: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    steps: int = 0
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    spec_decode_num_accepted_tokens_per_pos: tuple[int, ...] = ()
    host_cache_blocks_total: int = 0
    host_cache_blocks_used: int = 0
    host_cache_block_bytes: int = 0
    host_cache_offloaded_blocks: int = 0
    host_cache_fetched_blocks: int = 0
    host_cache_hits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """What a replica publishes of itself after every few steps.

    `incarnation` is new with every process start; frames of an old one are dropped. `admitted` maps a gateway's id to
    the last sequence number of its submissions that the numbers in `stats` include.
    """

    replica_id: str
    incarnation: str
    model: str
    state: ReplicaState
    stats: EngineStats
    admitted: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVEvent:
    """A change of a replica's prefix cache, in the order it happened. Blocks in its host-memory tier are in it, too.

    kind "stored": `hashes` are now cached, each the successor of the one before, the first of `parent` (a
    block's hash or a `prefix_root`).
    kind "removed": `hashes` are gone. kind "cleared": everything is gone.
    Hashes are those of `block_hash`.
    """

    kind: str
    hashes: tuple[bytes, ...] = ()
    parent: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDecision:
    """Which replica a policy chose, and its whole reasoning.

    `terms` maps each part of the score, and "score" itself, to one number per candidate, in the candidates' order;
    the lowest score won (where it is a tie, by lot). `generation` numbers the policy document it was taken under.
    `uncached_tokens` and `new_blocks` are what the chosen replica is expected to compute and allocate for the prompt;
    `predicted_ms` is the expected time to first token, None for a policy that predicts none.
    """

    policy: str
    replica_id: str
    candidates: tuple[str, ...]
    terms: Mapping[str, Sequence[float]]
    generation: int = 0
    uncached_tokens: int = 0
    new_blocks: int = 0
    predicted_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What a gateway must know of a model to speak for it; a replica answers `describe` with it.

    `tokenizer_json` is the file's content as Hugging Face `tokenizers` reads it; `chat_template` is Jinja source or ""
    (then /v1/chat/completions is not supported). `special_tokens` has bos_token, eos_token, … for the template.
    `revision` identifies the weights: it is part of the prefix-hash root and of system_fingerprint. `kv_format` says
    how keys and values are stored, and is part of that root too. `backends`: which kernels compute, and why these.
    """

    model: str
    revision: str
    max_model_len: int
    vocab_size: int
    block_size: int
    tokenizer_json: bytes
    chat_template: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    add_bos: bool = False
    eos_token_ids: tuple[int, ...] = ()
    default_max_tokens: int = 0
    kv_format: str = ""
    backends: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaAddress:
    """Where one incarnation of a replica listens. Endpoints are zmq's, e.g. "tcp://127.0.0.1:5555"."""

    replica_id: str
    incarnation: str
    model: str
    endpoint: str
    events_endpoint: str


class TokenEngine(Protocol):
    """What a replica drives, one thread only: the torch engine and the fake engine both are one.

    Every request that `add` accepts ends in exactly one terminal Chunk from `step`, unless it is aborted first;
    an aborted request yields nothing more. `wait_s` is how long `step` would have nothing to bring although
    `has_work()`; a real engine answers 0.
    """

    @property
    def card(self) -> ModelCard: ...
    def add(self, request: GenerateRequest) -> None:
        """Accept or raise RequestError / QueueFull; an id that is already running is InvalidRequest."""
        ...

    def abort(self, request_id: str) -> bool: ...
    def has_work(self) -> bool: ...
    def wait_s(self) -> float: ...
    def step(self) -> list[Chunk]: ...
    def stats(self) -> EngineStats: ...
    def take_events(self) -> list[KVEvent]:
        """KV events since the last call, oldest first."""
        ...

    def cached_hashes(self) -> Sequence[bytes]:
        """Every block that is cached now; with the events that follow, what a late listener needs."""
        ...

    def check_integrity(self) -> None: ...


def prefix_root(tenant: str, revision: str, kv_format: str = "") -> bytes:
    """The hash that stands before a prompt's first block: nothing is shared between tenants, weights or KV formats."""
    return blake2b("\0".join((tenant, revision, kv_format)).encode(), digest_size=16).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """blake2b-128 of the parent's hash and one full block's token ids, each an int32 in native byte order."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


def block_hashes(root: bytes, token_ids: Sequence[int], block_size: int) -> tuple[bytes, ...]:
    """The chain of `block_hash` over the full blocks of a prompt; what is left over at its end has no hash."""
    packed, width = array("i", token_ids).tobytes(), 4 * block_size
    hashes, parent = [], root
    for start in range(0, len(packed) - width + 1, width):
        parent = blake2b(parent + packed[start : start + width], digest_size=16).digest()
        hashes.append(parent)
    return tuple(hashes)


def error_from_name(
    name: str, message: str, *, param: str | None = None, retry_after_s: float | None = None
) -> SignalboxError:
    """Rebuild an error that crossed the wire; unknown names become EngineFault."""
    return ERRORS.get(name, EngineFault)(message, param=param, retry_after_s=retry_after_s)
