"""Quantised checkpoints of every layout: weights to the bit, logits and greedy text against what they stand for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.engine.quantized.checkpoint import seen_as
from replicas.engine.quantized.formats import format_of
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.reference import Reference
from replicas.engine.weights import expected_tensors, open_checkpoint
from replicas.protocol import ConfigError
from tests.engine.quant_packers import LAYOUTS, auto_round_config, compressed_config, write_quantized

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
PROMPTS = ["a", "hello world", "the quick brown fox jumps over the lazy dog, again and again"]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    """AWQ; tests that break it need no other."""
    write_quantized(small_model, tmp_path / "awq", LAYOUTS["awq gemm"])
    return tmp_path / "awq"


def generate(config: EngineConfig) -> list[tuple[int, ...]]:
    engine = Engine(config)
    together = [tuple(done.outputs[0].token_ids) for done in engine.generate(PROMPTS, GREEDY)]
    engine.check_integrity()
    assert engine.pool.num_free == engine.pool.num_blocks
    return together


@pytest.mark.parametrize(
    ("layout", "native"),
    [*((name, True) for name in LAYOUTS), *((name, False) for name in ("awq gemm", "gptq 2 bits", "gptq v1 desc_act"))],
)
def test_greedy_text_is_that_of_the_dequantised_weights(
    small_model: Path, tmp_path: Path, layout: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked (5 tokens a step), batched, from the prefix cache; the oracle has its weights from the packer's grid."""
    if not native:
        monkeypatch.setenv("SIGNALBOX_NATIVE", "0")
    weights = write_quantized(small_model, tmp_path / "model", LAYOUTS[layout])
    plain = load_file(small_model / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model")
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(name), weight), name
        assert isinstance(checkpoint.matrix(name.removesuffix(".weight")), QuantizedWeight)
    oracle = Reference(checkpoint.config, plain | weights)
    settings: dict[str, Any] = {"model": str(tmp_path / "model"), "block_size": 4, "num_blocks": 64}
    expected = [tuple(oracle.generate(list(prompt.encode()), 12, ignore_eos=True)) for prompt in PROMPTS]
    assert generate(EngineConfig(**settings, max_num_batched_tokens=5)) == expected
    if native:
        assert generate(EngineConfig(**settings)) == expected
        assert generate(EngineConfig(**settings, quantization="none")) == expected


def test_int8_at_load_equals_an_oracle_on_the_rounded_weights(small_model: Path) -> None:
    rounded = seen_as(open_checkpoint(small_model), "int8", keep_gguf=True)
    tensors = {name: rounded.tensor(name) for name in expected_tensors(rounded.config)}
    oracle = Reference(rounded.config, tensors)
    expected = [tuple(oracle.generate(list(prompt.encode()), 12, ignore_eos=True)) for prompt in PROMPTS]
    config = EngineConfig(model=str(small_model), block_size=4, num_blocks=64, quantization="int8")
    assert generate(config) == expected
    plain = open_checkpoint(small_model)
    for name, tensor in tensors.items():
        step = plain.tensor(name).abs().amax(-1, keepdim=True) / 127
        assert bool(((tensor - plain.tensor(name)).abs() <= step * 0.51).all()), name
    assert rounded.revision != plain.revision, "keys and values of other weights must not be shared"


def test_layers_that_are_stored_in_different_ways_are_joined(small_model: Path, tmp_path: Path) -> None:
    """v_proj was left out of the quantisation: q, k and v are one layer in two kinds."""
    weights = write_quantized(small_model, tmp_path / "model", LAYOUTS["gptq v1"])
    plain = load_file(small_model / "model.safetensors")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    for name in [name for name in weights if "v_proj" in name]:
        module = name.removesuffix(".weight")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(module)} | {name: plain[name]}
        del weights[name]
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    oracle = Reference(open_checkpoint(tmp_path / "model").config, plain | weights)
    expected = [tuple(oracle.generate(list(prompt.encode()), 12, ignore_eos=True)) for prompt in PROMPTS]
    assert generate(EngineConfig(model=str(tmp_path / "model"), block_size=4, num_blocks=64)) == expected


@pytest.mark.parametrize(
    ("layout", "key", "rules"),
    [
        (
            "gptq v1",
            "dynamic",
            {
                r"-:.*layers\.0\.self_attn\.v_proj.*": {},
                r"+:.*mlp\.down_proj.*": {"bits": 8, "group_size": 16, "sym": True},
            },
        ),
        (
            "auto-round as gptq",
            "extra_config",
            {"model.layers.0.self_attn.v_proj": {"bits": 16}, r".*mlp\.down_proj.*": {"bits": 8}},
        ),
    ],
)
def test_modules_may_have_bits_of_their_own(
    small_model: Path, tmp_path: Path, layout: str, key: str, rules: dict[str, dict[str, Any]]
) -> None:
    """As GPTQModel and auto-round state it: v_proj of layer 0 is left in floats, down_proj has 8 bits."""
    folder = tmp_path / "model"
    weights = write_quantized(small_model, folder, LAYOUTS[layout])
    wide = write_quantized(small_model, tmp_path / "wide", LAYOUTS["gptq 8 bits"])
    plain = load_file(small_model / "model.safetensors")
    tensors, others = load_file(folder / "model.safetensors"), load_file(tmp_path / "wide" / "model.safetensors")
    for name in [name for name in weights if "down_proj" in name or "layers.0.self_attn.v_proj" in name]:
        module = name.removesuffix("weight")
        tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(module)}
        if "v_proj" in name:
            weights[name] = tensors[name] = plain[name]
        else:
            weights[name] = wide[name]
            tensors |= {key: tensor for key, tensor in others.items() if key.startswith(module)}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = rules
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    for name, weight in weights.items():
        assert torch.equal(checkpoint.tensor(name), weight), name
    oracle = Reference(checkpoint.config, plain | weights)
    expected = [tuple(oracle.generate(list(prompt.encode()), 12, ignore_eos=True)) for prompt in PROMPTS]
    assert generate(EngineConfig(model=str(folder), block_size=4, num_blocks=64)) == expected


def test_zero_biases_and_old_config_files_of_autogptq_are_understood(small_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    weights = write_quantized(small_model, folder, LAYOUTS["gptq v1"])
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {f"{Q}.bias": torch.zeros(64)}, folder / "model.safetensors")
    assert torch.equal(open_checkpoint(folder).tensor(f"{Q}.weight"), weights[f"{Q}.weight"])
    save_file(tensors | {f"{Q}.bias": torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"model.safetensors: tensor '{Q}.bias' is unexpected"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("qweight", None, "is missing"),
        ("qweight", torch.zeros(64, 7, dtype=torch.int32), r"has shape \(64, 7\), expected \(64, 8\)"),
        ("qzeros", torch.zeros(4, 8), r"has the type F32, expected I32"),
        ("scales", torch.full((4, 64), torch.nan, dtype=torch.float16), "holds numbers that are not finite"),
        ("extra", torch.zeros(1), "is unexpected for LlamaForCausalLM"),
    ],
)
def test_what_is_missing_misshapen_or_broken_is_named_at_start(
    folder: Path, suffix: str, change: torch.Tensor | None, message: str
) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"{Q}.{suffix}", None)
    if change is not None:
        tensors[f"{Q}.{suffix}"] = change
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"model.safetensors: tensor '{Q}.{suffix}' {message}"):
        Engine(EngineConfig(model=str(folder), num_blocks=8))


def test_a_truncated_quantised_file_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated or corrupt"):
        Engine(EngineConfig(model=str(folder), num_blocks=8))


@pytest.mark.parametrize("name", ["gptq v1 desc_act", "pack-quantized by activation order"])
def test_groups_that_cannot_be_are_named(small_model: Path, tmp_path: Path, name: str) -> None:
    write_quantized(small_model, tmp_path / "model", LAYOUTS[name])
    suffix = "g_idx" if "gptq" in name else "weight_g_idx"
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"{Q}.{suffix}"][0] = 77
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ConfigError, match=f"model.safetensors: tensor '{Q}.{suffix}' does not put 16 inputs in every"):
        Engine(EngineConfig(model=str(tmp_path / "model"), num_blocks=8))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' in config.json is not supported"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 16}, "bits 3 in config.json is not supported"),
        ({"quant_method": "awq", "bits": 8, "group_size": 16}, "bits 8 in config.json is not supported"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "marlin"}, "version 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "group_size": 7}, "group_size 7"),
        ({"quant_method": "awq", "bits": 4, "group_size": 20}, "has 64 inputs, which groups of 20 do not divide"),
        (compressed_config(4, 16, symmetric=True, form="marlin-24"), "format 'marlin-24'"),
        (compressed_config(4, 16, symmetric=True, form="pack-quantized", type="float"), "type 'float'"),
        (
            compressed_config(4, 16, symmetric=True, form="pack-quantized")
            | {"transform_config": {"config_groups": {"v": {"apply": [{"location": "input"}]}}}},
            "transform_config.config_groups.v",
        ),
        (auto_round_config(4, "auto_round:mlx", symmetric=True), "packing_format 'auto_round:mlx'"),
        (auto_round_config(4, "auto_round", symmetric=True, data_type="mx_fp"), "data_type 'mx_fp'"),
        (auto_round_config(4, "auto_round", symmetric=True, extra_config={"[": {"bits": 8}}), "no regular expression"),
        (
            compressed_config(4, None, symmetric=True, form="pack-quantized", actorder="group"),
            "actorder 'group' in config.json is not supported",
        ),
    ],
)
def test_unknown_methods_and_impossible_settings_are_refused_by_name(
    folder: Path, config: dict[str, Any], message: str
) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "quantization_config": config}))
    with pytest.raises(ConfigError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(("quantization", "message"), [("int8", "are awq already"), ("int5", "use auto, none, int8")])
def test_a_setting_that_does_not_go_with_the_checkpoint_is_refused(
    folder: Path, quantization: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        Engine(EngineConfig(model=str(folder), quantization=quantization, num_blocks=8))
    assert refused.value.param == "quantization"


def test_two_bits_are_served_with_a_warning(
    small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_quantized(small_model, tmp_path / "model", LAYOUTS["gptq 2 bits"])
    with caplog.at_level(logging.WARNING):
        open_checkpoint(tmp_path / "model")
    assert "weights of 2 bits lose much quality" in caplog.text


@pytest.mark.parametrize(
    ("name", "bits", "group", "symmetric"),
    [("int4_group", 4, 16, True), ("int4_group_zeros", 4, 16, False), ("int8_channel", 8, None, True)],
)
def test_what_compressed_tensors_packed_itself_is_read_to_the_bit(
    name: str, bits: int, group: int | None, symmetric: bool
) -> None:
    """data/compressed_tensors.safetensors: matrices [16, 48] that its version 0.20.1 packed, and what it unpacks."""
    stored = {
        key.removeprefix(f"{name}."): tensor
        for key, tensor in load_file(Path(__file__).parent / "data" / "compressed_tensors.safetensors").items()
        if key.startswith(f"{name}.")
    }
    config = compressed_config(bits, group, symmetric=symmetric, form="pack-quantized")
    form = format_of({"quantization_config": config})
    assert form is not None
    for suffix, need in form.needs("m", 16, 48).items():
        assert stored[suffix].shape in need.shapes
    read = form.read("m", {key: tensor for key, tensor in stored.items() if key != "expected"}, 16, 48)
    assert torch.equal(read.dequantise().half(), stored["expected"].half())
