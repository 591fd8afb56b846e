"""What one engine is told: frozen values, each default written here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from replicas.engine.spec.config import Speculative
from replicas.engine.waiting import FAIR_RESERVE, MAX_WAITING, PRIORITY_AGING_S, LineLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine; a fleet file's `engine_settings` has exactly these keys (without `model`).

    model: folder with config.json + *.safetensors, a *.gguf file, or a folder holding exactly one *.gguf file.
    device: "auto", "cpu", "cuda" or "cuda:N".
    dtype: of weights, activations and KV cache; "auto" is float32 on CPU, bfloat16 on CUDA.
    quantization: of weights. "auto" keeps them as the checkpoint stores them (AWQ, GPTQ, compressed-tensors; a GGUF's
        Q4_0, Q4_1 and Q8_0 where kernels multiply with them as they are); "none" dequantises them at load; "int8"
        rounds a full-precision checkpoint or a GGUF to 8 bits at load.
    kv_cache_dtype: "auto" keeps keys and values in `dtype`; "fp8_e4m3" and "int8" in 8 bits with a scale for each token
        and KV head, "fp8_e4m3_head" with one for each layer and KV head (see kv_format.py, kv_scales.py).
    attention: "auto" takes the best backend that can serve device, dtype, head size and kv_cache_dtype; "flash_attn",
        "triton", "native" and "torch" ask for one (docs/gpu.md).
    step_graphs: "auto" replays decodes from CUDA graphs where device and attention allow it; "off" never does; "eager"
        goes through the same padding and bookkeeping on any device and records nothing: to find faults.
    async_scheduling: lay out and launch a step while the one before it computes; None does where the device is another
        than the host (CUDA) and nothing speculates. Steps after one with penalties wait for its tokens.
    block_size: tokens per KV block.
    num_blocks: KV blocks; None sizes the pool from memory.
    kv_memory_gib: memory for the KV pool when num_blocks is None; None takes `memory_fraction` of what is really free
        after weights and, on CUDA, after profiling activations and sampler.
    memory_fraction: None is 0.25 on CPU, 0.92 of the card on CUDA.
    host_cache_gib: host memory for prefix blocks that the KV pool has no room for any more; they are fetched back where
        that is faster than computing them again, by measured rates (host_store.py). 0 keeps none.
    max_model_len: prompt + output tokens of one sequence; None takes the model's own limit.
    max_num_seqs: sequences in one step.
    max_num_batched_tokens: token budget of one step; None is 256 on CPU (at most half a second of prefill stands
        between two tokens of a small model), 2048 on CUDA.
    max_waiting: requests in the waiting queue; one more is refused with QueueFull.
    max_waiting_tokens: prompt tokens to compute that wait; while so many do, requests are refused. None: no bound.
    max_waiting_per_key: requests of one key in the queue; None lets a key have four times the places that are left.
    priority_aging_s: waiting so much longer outweighs one rank of priority; None goes strictly by rank.
    fair_reserve: share of max_num_seqs and of the blocks that is kept for keys that run on less than an equal part,
        while there are several keys; 0 keeps nothing.
    watermark: share of blocks kept free when a new prompt is admitted, so that running sequences seldom preempt.
    num_threads: torch CPU threads; None leaves the number that is set.
    seed: of the requests that bring none; None draws one from the operating system at start.
    speculative: guesses at several tokens for one step (spec/config.py); None computes them one by one.
    """

    model: str
    device: str = "auto"
    dtype: str = "auto"
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    attention: str = "auto"
    step_graphs: str = "auto"
    async_scheduling: bool | None = None
    block_size: int = 16
    num_blocks: int | None = None
    kv_memory_gib: float | None = None
    memory_fraction: float | None = None
    host_cache_gib: float = 0.0
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_waiting: int = MAX_WAITING
    max_waiting_tokens: int | None = None
    max_waiting_per_key: int | None = None
    priority_aging_s: float | None = PRIORITY_AGING_S
    fair_reserve: float = FAIR_RESERVE
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    num_threads: int | None = None
    seed: int | None = None
    speculative: Speculative | None = None

    def __post_init__(self) -> None:
        given: object = self.speculative
        if isinstance(given, Mapping):  # a fleet file's section
            object.__setattr__(self, "speculative", Speculative(**given))

    @property
    def tokens_per_step(self) -> int:
        """What one sequence may bring in a step, at most: more than one with drafts."""
        return 1 + (self.speculative.max_draft_tokens if self.speculative else 0)

    @property
    def line_limits(self) -> LineLimits:
        """Bounds and order of the waiting queue; ConfigError names a setting that cannot be."""
        return LineLimits(
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            max_waiting_per_key=self.max_waiting_per_key,
            priority_aging_s=self.priority_aging_s,
            fair_reserve=self.fair_reserve,
        )
