"""GGUF files, written here with gguf's own writer in every quantisation named, read back and compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from replicas.engine.gguf_file import GGUFFile
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.reference import Reference
from replicas.engine.weights import expected_tensors, linear_matrices, open_checkpoint
from replicas.protocol import ConfigError

QUANTISED_BY_GGUF = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
# gguf dequantises these but cannot write them: random blocks, with sane half-precision scales at these byte offsets.
RANDOM_BLOCKS = {Kind.Q2_K: (80, 82), Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,)}
HIDDEN, INNER, VOCAB = 256, 512, 64
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def random_blocks(kind: Kind, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // per_block, block_bytes), dtype=np.uint8)
    for at in RANDOM_BLOCKS[kind]:
        scales = rng.uniform(0.0001, 0.001, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*shape[:-1], -1)


def gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, suffix = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{suffix}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.{suffix}"


def permute(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's convert_hf_to_gguf.py does to the rows of q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


Write = Callable[..., tuple[Any, Path]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(family, kind) -> (transformers model with float32 weights, GGUF file with its matrices in `kind`)."""

    def make(family: str, kind: Kind = Kind.F32, extra: Any = None, **settings: Any) -> tuple[Any, Path]:
        import transformers

        shape: dict[str, Any] = {
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        config = getattr(transformers, f"{family}Config")(**{**shape, **settings})
        torch.manual_seed(1)
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        path = tmp_path / "tiny.gguf"
        arch = family.lower()
        writer = gguf.GGUFWriter(path, arch)
        writer.add_context_length(128)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_block_count(2)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(10000.0)
        if "head_dim" in settings:
            writer.add_key_length(settings["head_dim"])
            writer.add_value_length(settings["head_dim"])
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{at}" for at in range(VOCAB)])
        writer.add_eos_token_id(2)
        if extra is not None:
            extra(writer)
        with torch.no_grad():
            for seed, (name, parameter) in enumerate(model.named_parameters()):
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
                rows = parameter.numpy()
                if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
                    rows = permute(rows, 4 if ".q_proj." in name else 2)
                add(writer, gguf_name(name), rows, kind, seed)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return model, path

    return make


def add(writer: Any, name: str, rows: np.ndarray[Any, Any], kind: Kind, seed: int) -> None:
    if rows.ndim == 1:
        writer.add_tensor(name, rows)
    elif kind in RANDOM_BLOCKS:
        writer.add_tensor(name, random_blocks(kind, rows.shape, seed), raw_dtype=kind)
    else:
        writer.add_tensor(name, gguf.quants.quantize(rows, kind), raw_dtype=kind)


@pytest.mark.parametrize("kind", [*QUANTISED_BY_GGUF, *RANDOM_BLOCKS], ids=lambda kind: kind.name)
def test_every_type_is_dequantised_bit_for_bit_as_gguf_does(kind: Kind, write: Write) -> None:
    _, path = write("Qwen2", kind)
    ours = GGUFFile(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert set(ours.tensors) == set(theirs)
    assert ours.tensors["blk.1.ffn_down.weight"].kind_name == kind.name
    for name, tensor in theirs.items():
        expected = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        got = ours.read(name).numpy()
        assert got.dtype == np.float32
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, expected.reshape(got.shape))


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Llama", {"attention_bias": True}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 32}),
    ],
)
def test_a_gguf_is_the_model_it_was_written_from(family: str, settings: dict[str, Any], write: Write) -> None:
    model, path = write(family, **settings)
    ids = [5, 3, 60, 11, 2, 7, 7, 30]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Reference.load(path).logits(ids), expected, atol=1e-4, rtol=1e-4)
    checkpoint = open_checkpoint(path.parent)
    state = model.state_dict()
    for name in expected_tensors(checkpoint.config):
        torch.testing.assert_close(checkpoint.tensor(name), state[name], atol=0, rtol=0)


def transformers_model(path: Path) -> Any:
    """What transformers makes of a GGUF file; from_pretrained would do the same, but only with accelerate installed."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("kind", [Kind.Q4_1, Kind.Q4_K, Kind.Q8_0], ids=lambda kind: kind.name)
def test_quantised_llama_gives_the_logits_that_transformers_gives_for_the_same_file(kind: Kind, write: Write) -> None:
    _, path = write("Llama", kind)
    ids = [5, 3, 60, 11, 2, 7, 7, 30]
    with torch.inference_mode():
        expected = transformers_model(path)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Reference.load(path).logits(ids), expected, atol=1e-4, rtol=1e-4)


def test_llama_3_frequency_factors_stored_as_a_tensor_are_applied(write: Write) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    factors = np.full(HIDDEN // 4 // 2, 4.0, dtype=np.float32)
    model, path = write(
        "Llama", extra=lambda writer: writer.add_tensor("rope_freqs.weight", factors), rope_parameters=rope
    )
    ids = [5, 3, 60, 11, 2, 7, 7, 30]
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(Reference.load(path).logits(ids), expected, atol=1e-4, rtol=1e-4)


def test_every_truncation_is_noticed_at_opening(write: Write) -> None:
    _, path = write("Llama", Kind.Q8_0)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    data_begins = GGUFFile(path).tensors["token_embd.weight"].begin
    cuts = [0, 3, 4, 8, 23, *rng.integers(24, data_begins, 60).tolist(), data_begins, len(content) - 40]
    for cut in cuts:
        path.write_bytes(content[:cut])
        with pytest.raises(ConfigError, match=r"tiny\.gguf"):
            open_checkpoint(path)


def test_a_flipped_header_byte_is_a_config_error_or_harmless_never_a_crash(write: Write) -> None:
    _, path = write("Llama", Kind.Q8_0)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(0, GGUFFile(path).tensors["token_embd.weight"].begin, 300).tolist():
        broken = bytearray(content)
        broken[at] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        try:
            open_checkpoint(path)
        except ConfigError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04" + bytes(40), "is not a GGUF file"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(40), "GGUF version 1"),
        (b"GGUF" + (3).to_bytes(4, "big") + bytes(40), "GGUF version 50331648"),
        (b"", "cannot be read"),
    ],
)
def test_files_that_are_no_gguf_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"x\.gguf .*{message}|x\.gguf {message}|x\.gguf has {message}"):
        open_checkpoint(tmp_path / "x.gguf")


def test_missing_and_foreign_tensors_of_a_gguf_are_named(write: Write) -> None:
    _, path = write("Llama", extra=lambda writer: writer.add_tensor("mystery.weight", np.ones(3, np.float32)))
    with pytest.raises(ConfigError, match=r"tiny.gguf: tensor 'mystery.weight' is unexpected"):
        open_checkpoint(path)
    _, path = write("Llama", extra=lambda writer: writer.add_uint16("split.count", 2))
    with pytest.raises(ConfigError, match=r"tiny.gguf is one part of a split GGUF"):
        open_checkpoint(path)


def test_without_the_gguf_package_the_error_says_what_is_missing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = write("Llama")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(ConfigError, match=r"reading tiny\.gguf needs the package gguf"):
        open_checkpoint(path)


def test_a_type_without_dequantiser_is_named(write: Write) -> None:
    _, path = write("Llama", extra=lambda writer: writer.add_tensor("numbers", np.ones(4, np.int32)))
    with pytest.raises(ConfigError, match=r"tiny.gguf: 'numbers' has the unsupported type I32"):
        GGUFFile(path).read("numbers")


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_blocks_are_kept_quantised_and_stand_for_the_same_numbers(kind: Kind, family: str, write: Write) -> None:
    """Llama's q and k lie interleaved in the file: their rows move with scales and codes."""
    _, path = write(family, kind)
    checkpoint = open_checkpoint(path)
    assert checkpoint.quantization == "gguf"
    for module in linear_matrices(checkpoint.config):
        matrix = checkpoint.matrix(module)
        assert isinstance(matrix, QuantizedWeight)
        assert (matrix.bits, matrix.group_size) == (8 if kind is Kind.Q8_0 else 4, 32)
        assert torch.equal(matrix.dequantise(), checkpoint.tensor(f"{module}.weight"))


def test_a_block_whose_scale_is_not_finite_is_named_with_its_file(write: Write) -> None:
    _, path = write("Qwen2", Kind.Q4_1)
    stored = GGUFFile(path).tensors["blk.1.ffn_down.weight"]
    content = bytearray(path.read_bytes())
    content[stored.begin : stored.begin + 2] = np.float16(np.nan).tobytes()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tiny.gguf: tensor 'blk.1.ffn_down.weight' holds scales that"):
        open_checkpoint(path).matrix("model.layers.1.mlp.down_proj")
