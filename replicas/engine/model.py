"""The decoder: a model's weights on one device, and the function from a step's tokens to logits.

Embeddings, layers (stack.py), head. Knows neither requests nor block tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from replicas.engine.attention import Attention, LayerCache
from replicas.engine.batch import StepBatch
from replicas.engine.config import EngineConfig
from replicas.engine.kv_format import KVTensors, allocate_kv, plain_format
from replicas.engine.model_config import ModelConfig
from replicas.engine.ops import JoinedLinear, Linear, Ops
from replicas.engine.quantized.checkpoint import seen_as
from replicas.engine.quantized.weight import QuantizedWeight, concatenate
from replicas.engine.stack import Layer, Weights, choose_stack
from replicas.engine.weights import Checkpoint, open_checkpoint


class Decoder:
    """A model's weights on one device and the function from a step's tokens to logits.

    num_layers, num_kv_heads, head_dim: the shape of the cache it writes. weight_bytes: all weights as held, tied ones
    once; layer_bytes, head_bytes: those of the matrices of the layers and of the head. max_model_len: positions its
    rotary table covers. embedding: a table [V, H], or the layer whose rows it is. stack: the layers.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Ops,
        attention: Attention,
        device: torch.device,
        dtype: torch.dtype,
        max_model_len: int | None = None,
        shared: Decoder | None = None,
    ) -> None:
        """shared: whose embedding and head to use; `checkpoint` then needs none of its own."""
        self.config = config = checkpoint.config
        self.device, self.dtype, self.revision = device, dtype, checkpoint.revision
        self.num_layers, self.num_kv_heads, self.head_dim = config.num_layers, config.num_kv_heads, config.head_dim
        self.max_model_len = config.model_len(max_model_len)
        with torch.inference_mode(), _one_thread():
            loader = _Loader(checkpoint, ops, device, dtype)
            layers = [loader.layer(index) for index in range(config.num_layers)]
            self.layer_bytes = sum(matrix.nbytes for layer in layers for matrix in layer.matrices)
            final_norm = loader.tensor("model.norm.weight")
            self._head: Linear
            self.embedding: Linear | Tensor
            if shared is not None:
                self._head, self.embedding = shared._head, shared.embedding
            elif config.tie_word_embeddings:  # one copy, in the layout that the head's product wants
                self._head = self.embedding = loader.linear(["model.embed_tokens"], bias=False)
            else:
                self._head = loader.linear(["lm_head"], bias=False)
                self.embedding = loader.tensor("model.embed_tokens.weight")
            self.head_bytes = self._head.nbytes
            cos_sin = rope_table(config, self.max_model_len).to(device)
        self.stack = choose_stack(Weights(layers, final_norm, cos_sin), config, ops, attention)
        self.weight_bytes = loader.bytes_read

    @classmethod
    def load(
        cls, config: EngineConfig, ops: Ops, attention: Attention, device: torch.device, dtype: torch.dtype
    ) -> Decoder:
        """Open `config.model` and load it; ConfigError if it is unsupported, incomplete or corrupt."""
        checkpoint = seen_as(open_checkpoint(config.model), config.quantization, keep_gguf=ops.multiplies_quantized)
        return cls(checkpoint, ops, attention, device, dtype, config.max_model_len)

    def flops_per_token(self, context_len: int = 0) -> int:
        return self.config.flops_per_token(context_len)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, caches: Sequence[LayerCache]) -> Tensor:
        """Write every token's keys and values to `caches` (one a layer) and return logits, float32 [R, V], of
        batch.logits_rows."""
        return self.logits(self.hidden(batch, caches))

    @torch.inference_mode()
    def hidden(self, batch: StepBatch, caches: Sequence[LayerCache]) -> Tensor:
        """`forward` up to the head: the normed hidden states [R, H]."""
        return self.layers(self.embed(batch.token_ids), batch, caches)

    @torch.inference_mode()
    def layers(self, inputs: Tensor, batch: StepBatch, caches: Sequence[LayerCache]) -> Tensor:
        """`hidden` of inputs [T, H], which may be overwritten, in place of the embeddings of batch.token_ids."""
        return self.stack(inputs, batch, caches)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [R, H] -> logits, float32 [R, V]."""
        if not len(hidden):
            return torch.empty(0, self.config.vocab_size, device=self.device)
        return self._head(hidden).float()

    @torch.inference_mode()
    def head_rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the output layer: int64 [N] -> [N, H]."""
        return self._head.rows(token_ids)

    def plain_cache(self, num_blocks: int, block_size: int) -> KVTensors:
        """A cache of keys and values as the model computes them."""
        return allocate_kv(
            num_blocks,
            block_size,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kv=plain_format(self.dtype),
            device=self.device,
        )

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        if isinstance(self.embedding, Tensor):
            return torch.nn.functional.embedding(token_ids, self.embedding)
        return self.embedding.rows(token_ids).to(self.dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Load on one thread: thousands of short parallel loops each wait for their slowest thread, and while other
    processes start on the same cores that wait is a scheduler's time slice (SmolLM2 on 2 busy cores: 2-4 s against
    15-25)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _alike(parts: Sequence[Tensor | QuantizedWeight]) -> bool:
    """Whether these matrices can be laid on top of one another."""
    first, rest = parts[0], parts[1:]
    if isinstance(first, Tensor):
        return all(isinstance(part, Tensor) for part in rest)
    return all(isinstance(part, QuantizedWeight) and first.joins(part) for part in rest)


class _Loader:
    """Moves tensors from a checkpoint to a device, fusing projections that read the same input."""

    def __init__(self, checkpoint: Checkpoint, ops: Ops, device: torch.device, dtype: torch.dtype) -> None:
        self._checkpoint, self._ops, self._device, self._dtype = checkpoint, ops, device, dtype
        self.bytes_read = 0

    def tensor(self, name: str) -> Tensor:
        # copy=True: what the decoder holds must not be a view of the file, which someone may replace or truncate.
        held = self._checkpoint.tensor(name).to(self._device, self._dtype, copy=True).contiguous()
        self.bytes_read += held.nbytes
        return held

    def linear(self, names: list[str], *, bias: bool) -> Linear:
        """One layer out of several that read the same input, in the form that they are stored in if that is one."""
        parts = [self._checkpoint.matrix(name) for name in names]
        biases = [self._checkpoint.tensor(f"{name}.bias") for name in names] if bias else []
        if len(parts) > 1 and not _alike(parts):
            return JoinedLinear([self._linear([part], biases[i : i + 1]) for i, part in enumerate(parts)])
        return self._linear(parts, biases)

    def _linear(self, parts: Sequence[Tensor | QuantizedWeight], biases: Sequence[Tensor]) -> Linear:
        fused_bias = self._stacked(biases) if biases else None
        quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
        if quantized:
            made = self._ops.quantized_linear(concatenate(quantized), fused_bias)
        else:
            made = self._ops.linear(self._stacked([part for part in parts if isinstance(part, Tensor)]), fused_bias)
        self.bytes_read += made.nbytes + (0 if fused_bias is None else fused_bias.nbytes)
        return made

    def _stacked(self, parts: Sequence[Tensor]) -> Tensor:
        fused = torch.empty(
            (sum(part.shape[0] for part in parts), *parts[0].shape[1:]), device=self._device, dtype=self._dtype
        )
        for part, rows in zip(parts, torch.split(fused, [part.shape[0] for part in parts]), strict=True):
            rows.copy_(part)
        return fused

    def layer(self, index: int) -> Layer:
        config, prefix = self._checkpoint.config, f"model.layers.{index}."
        attention = prefix + "self_attn."
        return Layer(
            input_norm=self.tensor(prefix + "input_layernorm.weight"),
            qkv=self.linear([f"{attention}{name}_proj" for name in "qkv"], bias=config.qkv_bias),
            q_norm=self.tensor(attention + "q_norm.weight") if config.qk_norm else None,
            k_norm=self.tensor(attention + "k_norm.weight") if config.qk_norm else None,
            o=self.linear([attention + "o_proj"], bias=config.o_bias),
            post_norm=self.tensor(prefix + "post_attention_layernorm.weight"),
            gate_up=self.linear([prefix + "mlp.gate_proj", prefix + "mlp.up_proj"], bias=config.mlp_bias),
            down=self.linear([prefix + "mlp.down_proj"], bias=config.mlp_bias),
            window=config.windows[index],
        )


def rope_table(config: ModelConfig, positions: int) -> Tensor:
    """float32 [positions, head_dim]: cosines of each frequency, then sines (Su et al. 2021, arXiv:2104.09864).

    Computed in float32 on the CPU, as transformers does: at long positions another order of rounding shows.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freqs = _scale_rope(1.0 / config.rope_theta**exponents, config)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), freqs)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _scale_rope(freqs: Tensor, config: ModelConfig) -> Tensor:
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    if scaling.kind == "linear":
        return freqs / scaling.factor
    if scaling.kind == "factors":
        return freqs / torch.tensor(scaling.factors)
    assert scaling.kind == "llama3", f"ModelConfig let the rope scaling {scaling.kind!r} pass"
    # How many turns a frequency makes within the training length decides how much it is slowed (Llama 3.1 model card).
    turns = scaling.original_max_position * freqs / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return (1 - keep) * freqs / scaling.factor + keep * freqs
