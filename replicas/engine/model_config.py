"""What a decoder needs to know of a model, read from a Hugging Face config.json or from GGUF metadata.

No torch, no tensors: only the numbers. Whatever the decoder cannot compute exactly is refused here by name, so that a
model either runs as its authors meant it or does not start.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from replicas.protocol import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the training length.

    kind "linear": all divided by `factor`. kind "llama3": Llama 3.1's rule, long wavelengths divided by `factor`, short
    ones kept, smooth in between. kind "factors": frequency i divided by factors[i] (GGUF's rope_freqs.weight, which is
    the llama3 rule already worked out).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and switches of one decoder.

    windows: for each layer the sliding window (a query sees that many positions, its own included), None for all.
    qkv_bias, o_bias, mlp_bias: which projections have one. qk_norm: RMS norm over head_dim on queries and keys.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ConfigError(f"head_dim must be even and positive for rotary embeddings, got {self.head_dim}")

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def matmul_parameters(self) -> int:
        """Weights that every generated token is multiplied with: all projections and the head, tied or not."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        layer = attention + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    def flops_per_token(self, context_len: int = 0) -> int:
        """Floating-point operations to compute one token and its logits, attending to `context_len` positions."""
        return 2 * self.matmul_parameters + 4 * self.num_layers * self.q_size * context_len

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of keys and values of one token, all layers together."""
        return 2 * self.num_layers * self.kv_size * element_size

    def model_len(self, wanted: int | None) -> int:
        """The longest sequence to serve: `wanted`, or the model's own limit; ConfigError if it wants more than that."""
        if wanted is None:
            return self.max_position_embeddings
        if not 1 <= wanted <= self.max_position_embeddings:
            raise ConfigError(
                f"max_model_len {wanted} is not between 1 and the model's own limit of {self.max_position_embeddings}"
            )
        return wanted


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture's code fixes, apart from its config file; `defaults` are those of its config class."""

    defaults: Mapping[str, Any]
    gguf: str | None = None
    qk_norm: bool = False
    always_qkv_bias: bool = False
    has_attention_bias: bool = False
    has_mlp_bias: bool = False


_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768}
_FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        gguf="llama",
        has_attention_bias=True,
        has_mlp_bias=True,
    ),
    "MistralForCausalLM": _Family(
        {
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "max_position_embeddings": 131072,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    ),
    "Qwen2ForCausalLM": _Family(_QWEN, gguf="qwen2", always_qkv_bias=True),
    "Qwen3ForCausalLM": _Family({**_QWEN, "head_dim": 128}, gguf="qwen3", qk_norm=True, has_attention_bias=True),
}
_MOST_LAYERS = 1024
_GGUF_ARCHITECTURES = {family.gguf: name for name, family in _FAMILIES.items() if family.gguf}


def config_from_hf(raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read config.json (and generation_config.json, for its eos ids) as transformers 4 or 5 wrote them."""
    names = raw.get("architectures") or ["(none)"]
    family = _FAMILIES.get(names[0])
    if family is None:
        raise ConfigError(f"architecture {names[0]!r} is not supported; supported: {', '.join(_FAMILIES)}")
    values = _Values({**family.defaults, **raw}, "config.json")
    _refuse_what_is_not_built(values)
    num_heads, num_layers = values.integer("num_attention_heads"), values.layers("num_hidden_layers")
    hidden_size, max_position = values.integer("hidden_size"), values.integer("max_position_embeddings")
    head_dim = values.integer("head_dim", hidden_size // max(num_heads, 1))
    theta, scaling = _hf_rope(values, max_position)
    own_eos = values.token_ids("eos_token_id")
    attention_bias = family.has_attention_bias and bool(values.get("attention_bias", False))
    return ModelConfig(
        architecture=names[0],
        vocab_size=values.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=values.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=values.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        rms_norm_eps=values.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=max_position,
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family.always_qkv_bias or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family.has_mlp_bias and bool(values.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
        windows=_hf_windows(names[0], values, num_layers),
        eos_token_ids=_once(*_Values(generation or {}, "generation_config.json").token_ids("eos_token_id"), *own_eos),
        bos_token_id=next(iter(values.token_ids("bos_token_id")), None),
    )


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_freqs: tuple[float, ...] = ()
) -> ModelConfig:
    """Read GGUF metadata. `shapes`: of the file's tensors by GGUF name; `rope_freqs`: rope_freqs.weight if present."""
    arch = str(metadata.get("general.architecture", "(none)"))
    architecture = _GGUF_ARCHITECTURES.get(arch)
    if architecture is None:
        supported = ", ".join(f"{gguf} ({name})" for gguf, name in _GGUF_ARCHITECTURES.items())
        raise ConfigError(f"GGUF architecture {arch!r} is not supported; supported: {supported}")
    prefix = arch + "."
    own = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    values = _Values(own, "GGUF metadata", prefix)
    if values.integer("expert_count", 0):
        raise ConfigError(f"GGUF architecture {arch!r} with experts (mixture of experts) is not supported")
    num_heads, hidden_size = values.integer("attention.head_count"), values.integer("embedding_length")
    head_dim = values.integer("attention.key_length", hidden_size // max(num_heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if values.integer(key, head_dim) != head_dim:
            raise ConfigError(f"{prefix}{key} {values.integer(key)} differs from the head size {head_dim}: unsupported")
    num_layers, window = values.layers("block_count"), values.integer("attention.sliding_window", 0) or None
    vocab = shapes["token_embd.weight"][0] if "token_embd.weight" in shapes else values.integer("vocab_size")
    ids = _Values(metadata, "GGUF metadata")
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=values.integer("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=values.integer("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        rms_norm_eps=values.number("attention.layer_norm_rms_epsilon"),
        rope_theta=values.number("rope.freq_base", 10000.0),
        rope_scaling=_gguf_rope_scaling(values, rope_freqs, head_dim),
        max_position_embeddings=values.integer("context_length"),
        tie_word_embeddings="output.weight" not in shapes,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        o_bias="blk.0.attn_output.bias" in shapes,
        mlp_bias="blk.0.ffn_gate.bias" in shapes,
        qk_norm=_FAMILIES[architecture].qk_norm,
        windows=(window,) * num_layers,
        eos_token_ids=ids.token_ids(*(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))),
        bos_token_id=next(iter(ids.token_ids("tokenizer.ggml.bos_token_id")), None),
    )


class _Values:
    """Typed look-ups in a mapping; a missing or ill-typed key is a ConfigError that names it and its file."""

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        self._values, self._file, self._prefix = values, file, prefix

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"{self._file} lacks {self._prefix + key!r}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{self._prefix + key!r} in {self._file} must be a number, got {value!r}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise ConfigError(f"{self._prefix + key!r} in {self._file} must be a whole number, got {value!r}")
        return int(value)

    def layers(self, key: str) -> int:
        """A number of layers; a corrupt file must not make us lay out billions of them."""
        value = self.integer(key)
        if value > _MOST_LAYERS:
            raise ConfigError(f"{self._prefix + key!r} in {self._file} is {value}, more than {_MOST_LAYERS}")
        return value

    def token_ids(self, *keys: str) -> tuple[int, ...]:
        """The ids under all keys, each once, in order; a key may hold one id, a list of them or nothing."""
        found: list[int] = []
        for key in keys:
            value = self.get(key, [])
            for token_id in value if isinstance(value, list | tuple) else [value]:
                if isinstance(token_id, bool) or not isinstance(token_id, int):
                    raise ConfigError(f"{self._prefix + key!r} in {self._file} must hold token ids, got {token_id!r}")
                found.append(token_id)
        return _once(*found)


def _refuse_what_is_not_built(values: _Values) -> None:
    activation = values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"hidden_act {activation!r} is not supported; supported: silu")


def _hf_rope(values: _Values, max_position: int) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from transformers 5's rope_parameters or its predecessors rope_theta and rope_scaling."""
    rope = {**values.get("rope_scaling", {}), **values.get("rope_parameters", {})}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ConfigError("rope parameters that differ by layer type are not supported")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor {partial!r} is not supported; supported: 1.0")
    fields = _Values(rope, "config.json", "rope_scaling.")
    theta = float(rope.get("rope_theta") or values.number("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in (None, "default"):
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=fields.number("factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3",
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_position=fields.integer("original_max_position_embeddings", max_position),
        )
    raise ConfigError(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3")


def _hf_windows(architecture: str, values: _Values, num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window as the transformers model of that architecture applies it."""
    window = values.get("sliding_window")
    if architecture == "LlamaForCausalLM":
        return (None,) * num_layers
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not values.get("use_sliding_window", False):
        window = None
    first = values.integer("max_window_layers")
    default = ["full_attention" if layer < first else "sliding_attention" for layer in range(num_layers)]
    types = values.get("layer_types", default)
    if len(types) != num_layers:
        raise ConfigError(f"layer_types in config.json has {len(types)} entries for {num_layers} layers")
    unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(f"layer type {unknown[0]!r} is not supported; supported: full_attention, sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _gguf_rope_scaling(values: _Values, rope_freqs: tuple[float, ...], head_dim: int) -> RopeScaling | None:
    kind = values.get("rope.scaling.type", "none")
    if rope_freqs:
        if len(rope_freqs) != head_dim // 2:
            raise ConfigError(f"rope_freqs.weight has {len(rope_freqs)} values for a head size of {head_dim}")
        return RopeScaling(kind="factors", factors=rope_freqs)
    factor = values.number("rope.scaling.factor", values.number("rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise ConfigError(f"rope scaling {kind!r} is not supported in a GGUF; supported: none, linear, rope_freqs")
    return (
        None
        if factor == 1.0 or (kind == "none" and not values.get("rope.scale_linear"))
        else RopeScaling(kind="linear", factor=factor)
    )


def _once(*token_ids: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token_ids))
