"""What config.json and GGUF metadata may say, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from replicas.engine.model_config import RopeScaling, config_from_gguf, config_from_hf
from replicas.protocol import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 512,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": 16,
    "tokenizer.ggml.eos_token_id": 2,
}
GGUF_SHAPES = {"token_embd.weight": (100, 64), "output.weight": (100, 64)}


def test_absent_keys_take_the_defaults_of_the_architectures_own_config_class() -> None:
    config = config_from_hf(LLAMA)
    assert (config.num_kv_heads, config.head_dim, config.rms_norm_eps, config.rope_theta) == (4, 16, 1e-6, 10000.0)
    assert (config.max_position_embeddings, config.eos_token_ids, config.bos_token_id) == (2048, (2,), 1)
    assert config.windows == (None,) * 4
    assert not config.tie_word_embeddings
    qwen3 = config_from_hf({**LLAMA, "architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 2})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.qkv_bias, qwen3.eos_token_ids) == (128, True, False, ())


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_defaults_agree_with_transformers(family: str) -> None:
    import transformers

    theirs = getattr(transformers, f"{family}Config")(num_hidden_layers=4)
    ours = config_from_hf({**LLAMA, "architectures": [f"{family}ForCausalLM"], "num_attention_heads": 32})
    heads = getattr(theirs, "num_key_value_heads", None)
    assert ours.num_kv_heads == heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))


def test_eos_ids_of_generation_config_come_first_and_none_is_repeated() -> None:
    config = config_from_hf({**LLAMA, "eos_token_id": [7, 9]}, {"eos_token_id": [9, 5]})
    assert config.eos_token_ids == (9, 5, 7)
    assert config_from_hf({**LLAMA, "eos_token_id": 7}, {"temperature": 0.6}).eos_token_ids == (7,)


@pytest.mark.parametrize("names", [["MixtralForCausalLM"], ["GPT2LMHeadModel", "LlamaForCausalLM"], [], None])
def test_an_unsupported_architecture_is_refused_with_the_list_of_supported_ones(names: list[str] | None) -> None:
    with pytest.raises(ConfigError) as caught:
        config_from_hf({**LLAMA, "architectures": names})
    assert repr((names or ["(none)"])[0]) in caught.value.message
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert name in caught.value.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "layer type"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'rope_scaling.factor'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"hidden_size": "64"}, "'hidden_size' .* '64'"),
        ({"num_attention_heads": 2.5}, "'num_attention_heads' .* 2.5"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1"),
        ({"num_attention_heads": 0}, "num_heads must be at least 1"),
        ({"num_key_value_heads": 3}, "4 attention heads .* 3 KV heads"),
        ({"head_dim": 15}, "head_dim .* 15"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_hf({**LLAMA, **change})


def test_rope_scaling_is_read_as_transformers_4_and_5_write_it() -> None:
    llama3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    llama3["original_max_position_embeddings"] = 512
    wanted = RopeScaling(kind="llama3", factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position=512)
    four = config_from_hf({**LLAMA, "rope_theta": 5e5, "rope_scaling": llama3})
    five = config_from_hf({**LLAMA, "rope_parameters": {**llama3, "rope_theta": 5e5}})
    assert (four.rope_theta, four.rope_scaling) == (five.rope_theta, five.rope_scaling) == (5e5, wanted)
    oldest = config_from_hf({**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert oldest.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert config_from_hf({**LLAMA, "rope_scaling": None}).rope_scaling is None


def test_windows_follow_each_architectures_own_rule() -> None:
    window = {"sliding_window": 8, "num_key_value_heads": 2}
    assert config_from_hf({**LLAMA, **window}).windows == (None,) * 4
    mistral = {**LLAMA, **window, "architectures": ["MistralForCausalLM"]}
    assert config_from_hf(mistral).windows == (8,) * 4
    assert config_from_hf({**mistral, "sliding_window": None}).windows == (None,) * 4
    qwen = {**LLAMA, **window, "architectures": ["Qwen2ForCausalLM"], "max_window_layers": 3}
    assert config_from_hf(qwen).windows == (None,) * 4
    assert config_from_hf({**qwen, "use_sliding_window": True}).windows == (None, None, None, 8)
    with pytest.raises(ConfigError, match="'chunked_attention'"):
        config_from_hf({**qwen, "layer_types": ["chunked_attention"] * 4})
    with pytest.raises(ConfigError, match="1 entries for 4 layers"):
        config_from_hf({**qwen, "layer_types": ["full_attention"]})


def test_gguf_metadata_is_read() -> None:
    config = config_from_gguf({**GGUF, "tokenizer.ggml.eot_token_id": 9}, GGUF_SHAPES)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.num_kv_heads, config.head_dim, config.rope_theta) == (100, 2, 16, 5000.0)
    assert config.eos_token_ids == (2, 9)
    assert not config.tie_word_embeddings
    assert config_from_gguf(GGUF, {"token_embd.weight": (100, 64)}).tie_word_embeddings
    assert config_from_gguf(GGUF, {**GGUF_SHAPES, "blk.0.attn_q.bias": (64,)}).qkv_bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma2"}, r"'gemma2' is not supported; supported: llama .*qwen2 .*qwen3"),
        ({"llama.expert_count": 8}, "experts"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "'yarn'"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count 8"),
        ({"llama.block_count": None}, "'llama.block_count'"),
    ],
)
def test_gguf_metadata_beyond_the_decoder_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_from_gguf({**GGUF, **change}, GGUF_SHAPES)


def test_gguf_rope_scaling() -> None:
    linear = {**GGUF, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert config_from_gguf(linear, GGUF_SHAPES).rope_scaling == RopeScaling(kind="linear", factor=4.0)
    older = {**GGUF, "llama.rope.scale_linear": 2.0}
    assert config_from_gguf(older, GGUF_SHAPES).rope_scaling == RopeScaling(kind="linear", factor=2.0)
    factors = tuple(float(at + 1) for at in range(8))
    assert config_from_gguf(GGUF, GGUF_SHAPES, factors).rope_scaling == RopeScaling(kind="factors", factors=factors)
    with pytest.raises(ConfigError, match=r"rope_freqs.weight has 3 values"):
        config_from_gguf(GGUF, GGUF_SHAPES, factors[:3])
