"""One scale a layer and KV head: measured the same way every time, or taken from the checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from replicas.engine import Engine, EngineConfig, SamplingParams
from replicas.engine.kv_format import choose_kv_format
from replicas.engine.kv_scales import largest_magnitudes, sample
from replicas.engine.loading import Loaded, load
from replicas.engine.quantized import compressed
from replicas.engine.quantized.settings import Settings
from replicas.engine.reference import Reference
from replicas.engine.weights import open_checkpoint
from replicas.protocol import ConfigError
from tests.engine.quant_packers import compressed_config
from tests.small_model import write_small_model

HEAD = "fp8_e4m3_head"
ATTENTION = "model.layers.{}.self_attn.{}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two layers of two KV heads."""
    return write_small_model(tmp_path)


def head_scales(folder: Path, **changes: Any) -> Loaded:
    return load(EngineConfig(model=str(folder), kv_cache_dtype=HEAD, **changes))


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors")


def stored(k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """Layer 0 has these, layer 1 twice as much."""
    return {
        ATTENTION.format(layer, f"{kind}_scale"): scale * (layer + 1)
        for layer in range(2)
        for kind, scale in (("k", k), ("v", v))
    }


# ---------------------------------------------------------------- measured


@settings(max_examples=30, deadline=None)
@given(vocab=st.integers(1, 200_000), tokens=st.integers(1, 512))
def test_the_sample_leaves_no_part_of_the_vocabulary_out(vocab: int, tokens: int) -> None:
    ids = sample(vocab, tokens)
    assert 0 <= int(ids.min())
    assert int(ids.max()) < vocab
    gaps = torch.cat([torch.tensor([-1]), ids.sort().values, torch.tensor([vocab])]).diff()
    assert int(gaps.max()) <= 3 * vocab / tokens + 1
    assert torch.equal(sample(vocab, 600)[:tokens], ids)


def test_measured_scales_are_the_same_every_time_and_leave_room(folder: Path) -> None:
    first, second, pieces = head_scales(folder), head_scales(folder), head_scales(folder, max_num_batched_tokens=9)
    assert first.kv_scales is not None
    assert second.kv_scales is not None
    assert pieces.kv_scales is not None
    assert torch.equal(first.kv_scales, second.kv_scales)
    torch.testing.assert_close(pieces.kv_scales, first.kv_scales, rtol=1e-5, atol=0)
    assert torch.equal(first.kv_scales, 4 * largest_magnitudes(first.decoder, 256) / 448)
    assert load(EngineConfig(model=str(folder))).kv_scales is None


def test_nothing_saturates_on_the_sample(folder: Path) -> None:
    """What is stored of it: codes up to about a quarter of the greatest, of keys and of values, in every layer."""
    engine = Engine(EngineConfig(model=str(folder), kv_cache_dtype=HEAD, num_blocks=16))
    prompt = sample(257, 255).tolist()
    engine.generate([prompt], SamplingParams(max_tokens=1, temperature=0))
    codes = engine._kv.data[:-1].view(torch.float8_e4m3fn).float().abs().amax(dim=(0, 3, 5))
    assert torch.equal(codes[0, 0], torch.full((2,), 112.0)), "keys of layer 0 come from unrounded inputs"
    assert (codes < 150).all()
    assert (codes > 75).all()
    engine.check_integrity()


def test_a_model_that_overflows_is_refused(folder: Path) -> None:
    name = ATTENTION.format(1, "v_proj.weight")
    add(folder, {name: load_file(folder / "model.safetensors")[name] * 1e6})
    with pytest.raises(ConfigError, match=r"kv_cache_dtype fp8_e4m3_head: .* not finite in torch.float16"):
        head_scales(folder, dtype="float16")


# ---------------------------------------------------------------- a checkpoint's own


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1), (1,), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoints_scales_are_used(folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k = (
        torch.full(shape, 0.0625, dtype=dtype)
        if len(shape) < 1
        else torch.arange(1, shape[0] + 1).to(dtype).view(shape) / 16
    )
    add(folder, stored(k, 2 * k) | {ATTENTION.format(0, "q_scale"): torch.ones(1)})
    loaded = head_scales(folder)
    per_head = k.float().flatten().expand(2)
    wanted = torch.stack([per_head, 2 * per_head])
    assert loaded.kv_scales is not None
    assert torch.equal(loaded.kv_scales, torch.stack([wanted, 2 * wanted]))
    engine = Engine(EngineConfig(model=str(folder), kv_cache_dtype=HEAD, num_blocks=16))
    [done] = engine.generate([list(b"Hello")], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    reference = Reference.load(folder, choose_kv_format(HEAD, torch.float32), loaded.kv_scales)
    assert list(done.outputs[0].token_ids) == reference.generate(list(b"Hello"), 8, ignore_eos=True)


def test_other_formats_take_no_notice_of_them_but_say_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(folder, stored(torch.ones(1), torch.ones(1)))
    for name in ("auto", "fp8_e4m3"):
        assert load(EngineConfig(model=str(folder), kv_cache_dtype=name)).kv_scales is None
    assert "are for another kv_cache_dtype than fp8_e4m3" in caplog.text
    for name in ("none", "int8"):  # however the weights are seen
        assert head_scales(folder, quantization=name).kv_scales is not None


K0 = ATTENTION.format(0, "k_scale")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({K0: None}, f"model.safetensors: tensor '{K0}' is missing, other layers have theirs"),
        ({K0: torch.ones(3)}, r"k_scale' has shape (3,), expected one number or 2"),
        ({K0: torch.tensor([0.0])}, "k_scale' holds scales that are not finite and greater than 0"),
        ({K0: torch.tensor([float("inf")])}, "k_scale' holds scales that are not finite"),
        ({K0: torch.ones(1, dtype=torch.int32)}, "k_scale' has the type I32, expected F16 or BF16 or F32"),
        ({ATTENTION.format(1, "v_zero_point"): torch.ones(1)}, "v_zero_point' is not zero"),
        ({ATTENTION.format(2, "v_scale"): torch.ones(1)}, "model.layers.2.self_attn.v_scale' is unexpected"),
    ],
)
def test_what_cannot_be_scales_is_refused_by_name(
    folder: Path, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors = {**stored(torch.ones(1), torch.ones(1)), **changes}
    add(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_checkpoint(folder)


def test_zero_points_of_zero_are_let_pass(folder: Path) -> None:
    add(folder, stored(torch.ones(1), torch.ones(1)) | {ATTENTION.format(1, "k_zero_point"): torch.zeros(1)})
    assert open_checkpoint(folder).kv_scales is not None


FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def with_scheme(scheme: dict[str, Any]) -> dict[str, Any]:
    return compressed_config(4, 16, symmetric=True, form="pack-quantized") | {"kv_cache_scheme": scheme}


def test_the_scheme_of_llm_compressor_is_accepted() -> None:
    for scheme in (FP8, {**FP8, "strategy": "attn_head"}):
        assert compressed.parse(Settings(with_scheme(scheme))).bits == 4


@pytest.mark.parametrize("change", [{"type": "int"}, {"num_bits": 4}, {"dynamic": True}, {"symmetric": False}])
def test_other_schemes_are_refused_by_name(change: dict[str, Any]) -> None:
    [(key, value)] = change.items()
    said = re.escape(f"quantization_config.kv_cache_scheme.{key} {value!r} in config.json is not supported")
    with pytest.raises(ConfigError, match=said):
        compressed.parse(Settings(json.loads(json.dumps(with_scheme({**FP8, **change})))))
