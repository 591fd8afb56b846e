"""From an EngineConfig to a model ready to run: device, dtype, backends, weights, tokenizer."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from replicas.engine.attention import choose_attention, obstacles
from replicas.engine.backend import reason
from replicas.engine.config import EngineConfig
from replicas.engine.kv_format import KVFormat, KVTensors, allocate_kv, choose_kv_format
from replicas.engine.kv_scales import choose_kv_scales
from replicas.engine.model import Decoder
from replicas.engine.model_config import ModelConfig
from replicas.engine.ops import choose_ops
from replicas.engine.quantized.checkpoint import seen_as
from replicas.engine.tokenizer import Tokenizer, model_card
from replicas.engine.weights import Checkpoint, open_checkpoint
from replicas.protocol import ConfigError, ModelCard

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_BUDGET, _CUDA_BUDGET = 256, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """kv: how keys and values are stored; its name, kv_format, is part of every prefix hash.
    kv_scales: float32 [layers, 2, KV heads] where the format has one for each.

    ops, attention: the backends' names. backends: the same with why they were taken, for logs and status.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    card: ModelCard
    device: torch.device
    dtype: torch.dtype
    max_num_batched_tokens: int
    kv_bytes_per_token: int
    kv: KVFormat
    ops: str
    attention: str
    backends: str
    kv_scales: Tensor | None = None

    @property
    def kv_format(self) -> str:
        return self.kv.name

    def allocate_kv(self, num_blocks: int, block_size: int) -> KVTensors:
        """Zeroed keys and values of all layers, in the format that was chosen."""
        return allocate_kv(
            num_blocks,
            block_size,
            num_layers=self.decoder.num_layers,
            num_kv_heads=self.decoder.num_kv_heads,
            head_dim=self.decoder.head_dim,
            kv=self.kv,
            device=self.device,
            scales=self.kv_scales,
        )


def use_device(device: torch.device) -> None:
    """Make it this thread's: Triton launches on, and torch makes events and streams of, the one that is current."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def load(config: EngineConfig, checkpoint: Checkpoint | None = None, tokenizer: Tokenizer | None = None) -> Loaded:
    """ConfigError for settings that contradict each other or the machine, and for models that cannot be served.

    checkpoint, tokenizer: in place of those that config.model names.
    """
    _check(config)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    use_device(device)
    kv = choose_kv_format(config.kv_cache_dtype, dtype)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    ops = choose_ops(device, dtype)
    stored = checkpoint or open_checkpoint(config.model)
    tokenizer = tokenizer or Tokenizer.load(stored)
    checkpoint = seen_as(stored, config.quantization, keep_gguf=ops.multiplies_quantized)
    model, size = checkpoint.config, config.block_size
    head_dim, heads = model.head_dim, (model.num_heads, model.num_kv_heads)
    attention = choose_attention(config.attention, device, dtype, head_dim, kv, size, heads)
    decoder = Decoder(checkpoint, ops, attention, device, dtype, config.max_model_len)
    budget = config.max_num_batched_tokens or (_CUDA_BUDGET if device.type == "cuda" else _CPU_BUDGET)
    why = reason(
        attention.name.split()[0], obstacles(device, dtype, head_dim, kv, size), asked=config.attention != "auto"
    )
    backends = f"attention {attention.name}{why}, ops {ops.name}, weights {checkpoint.quantization or 'in full'}"
    logger.info("%s on %s in %s, %s", config.model, device, dtype, backends)
    return Loaded(
        decoder=decoder,
        tokenizer=tokenizer,
        card=model_card(Path(config.model).stem, config, checkpoint, tokenizer),
        device=device,
        dtype=dtype,
        max_num_batched_tokens=budget,
        kv_bytes_per_token=_kv_bytes_per_token(checkpoint.config, kv),
        kv=kv,
        ops=ops.name,
        attention=attention.name,
        backends=backends,
        kv_scales=choose_kv_scales(decoder, kv, checkpoint.kv_scales, budget),
    )


def _kv_bytes_per_token(model: ModelConfig, kv: KVFormat) -> int:
    return 2 * model.num_layers * model.num_kv_heads * kv.bytes_per_vector(model.head_dim)


def _check(config: EngineConfig) -> None:
    """Refuse values that no engine can run with, naming the setting."""
    positive = ("block_size", "num_blocks", "kv_memory_gib", "max_model_len", "max_num_seqs", "max_num_batched_tokens")
    for name in (*positive, "max_waiting", "num_threads", "memory_fraction"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be greater than 0, got {value!r}", param=name)
    if config.memory_fraction is not None and config.memory_fraction > 1:
        raise ConfigError(f"memory_fraction must be at most 1, got {config.memory_fraction!r}", param="memory_fraction")
    if not 0 <= config.host_cache_gib < math.inf:
        raise ConfigError(f"host_cache_gib must be 0 or more, got {config.host_cache_gib!r}", param="host_cache_gib")
    if config.host_cache_gib and not config.enable_prefix_caching:
        raise ConfigError("host_cache_gib keeps prefix blocks: it needs enable_prefix_caching", param="host_cache_gib")
    if not 0 <= config.watermark < 1:
        raise ConfigError(f"watermark must be at least 0 and less than 1, got {config.watermark!r}", param="watermark")


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N", param="device") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N", param="device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices", param="device")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is not supported; use auto, {', '.join(_DTYPES)}", param="dtype")
    return _DTYPES[name]
