"""Who computes attention: every refusal by name, the automatic order, and what is told of it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from replicas.engine import SamplingParams, attention, flash
from replicas.engine.backend import pick, reason
from replicas.engine.flash import Flash, FlashAttention, Wanted
from replicas.engine.kv_format import choose_kv_format
from replicas.engine.ops import choose_ops
from replicas.engine.reference import Reference
from replicas.engine.triton import device as triton_device
from replicas.protocol import ConfigError
from tests.engine.conftest import MakeEngine
from tests.engine.triton.test_attention import Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF = torch.bfloat16
HEAD = choose_kv_format("fp8_e4m3_head", HALF)


def want(**changes: Any) -> Wanted:
    asked = {"device": CUDA, "dtype": HALF, "head_dim": 128, "block_size": 256, "kv": None, "capability": (9, 0)}
    return Wanted(**{**asked, **changes})


def test_flash_attention_serves_what_it_can() -> None:
    assert flash.obstacle(Flash(2, "2.8.3"), want()) == ""
    assert flash.obstacle(Flash(2, "2.8.3"), want(capability=(8, 0), block_size=512)) == ""
    assert flash.obstacle(Flash(3, "3.0.0"), want(block_size=16)) == ""
    assert flash.obstacle(Flash(3, "3.0.0"), want(block_size=16, kv=HEAD)) == ""


@pytest.mark.parametrize(
    ("found", "changes", "said"),
    [
        (None, {}, "neither flash_attn_interface nor flash_attn is installed"),
        (Flash(2, "2.8.3"), {"device": CPU, "capability": None}, "runs on cuda, not on cpu"),
        (Flash(2, "2.8.3"), {"dtype": torch.float32}, "not in float32"),
        (Flash(2, "2.8.3"), {"head_dim": 288}, "not 288"),
        (Flash(2, "2.8.3"), {"head_dim": 20}, "not 20"),
        (Flash(3, "3.0.0"), {"kv": choose_kv_format("fp8_e4m3", HALF)}, "kv_cache_dtype fp8_e4m3"),
        (Flash(3, "3.0.0"), {"kv": HEAD, "head_dim": 72}, "multiples of 16 in FP8, not 72"),
        (Flash(3, "3.0.0"), {"kv": HEAD, "capability": (8, 9)}, "runs on compute capability 9"),
        (Flash(2, "2.8.3"), {"kv": HEAD}, "takes no 8-bit keys and values, which kv_cache_dtype fp8_e4m3_head keeps"),
        (Flash(2, "2.8.3"), {"block_size": 16}, "multiple of 256, not 16"),
        (Flash(2, "2.5.9"), {}, "2.5.9 is older than 2.6"),
        (Flash(2, "2.8.3"), {"capability": (7, 5)}, "needs compute capability 8"),
        (Flash(3, "3.0.0"), {"capability": (8, 9)}, "runs on compute capability 9"),
        (Flash(3, "3.0.0"), {"capability": (10, 0)}, "runs on compute capability 9"),
    ],
)
def test_flash_attention_says_why_not(found: Flash | None, changes: dict[str, Any], said: str) -> None:
    assert said in flash.obstacle(found, want(**changes))


@pytest.fixture
def _fresh_look() -> Iterator[None]:
    flash.installed.cache_clear()
    yield
    flash.installed.cache_clear()


@pytest.mark.usefixtures("_fresh_look")
def test_the_newest_flash_attention_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"flash_attn"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name in present else None)
    monkeypatch.setattr(flash, "_version", lambda module: f"of {module}")
    assert flash.installed() == Flash(2, "of flash_attn")
    present.add("flash_attn_interface")
    assert flash.installed() == Flash(2, "of flash_attn"), "looked for once a process"
    flash.installed.cache_clear()
    assert flash.installed() == Flash(3, "of flash_attn_interface")


def test_automatic_order_and_reasons() -> None:
    obstacles = {"flash_attn": "not installed", "triton": "", "native": "runs on cpu", "torch": ""}
    assert pick("attention", "auto", obstacles) == "triton"
    assert reason("triton", obstacles, asked=False) == " (no flash_attn: not installed)"
    assert reason("triton", obstacles, asked=True) == " (asked for)"
    with pytest.raises(
        ConfigError, match="'flash_attn' cannot be used here: not installed; usable: auto, triton, torch"
    ):
        pick("attention", "flash_attn", obstacles)


def test_a_gpu_prefers_flash_attention_then_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(flash, "installed", lambda: Flash(3, "3.0.0"))
    found = attention.obstacles(CUDA, HALF, 128)
    assert list(found) == ["flash_attn", "triton", "native", "torch"]
    assert found["flash_attn"] == found["triton"] == ""
    assert attention.obstacles(CUDA, torch.float32, 128)["triton"] == ""
    fp8 = attention.obstacles(CUDA, HALF, 128, choose_kv_format("fp8_e4m3", HALF))
    assert "scale of each token" in fp8["flash_attn"]
    assert fp8["triton"] == ""
    by_head = attention.obstacles(CUDA, HALF, 128, HEAD)
    assert by_head["flash_attn"] == by_head["triton"] == ""
    assert "kv_cache_dtype fp8_e4m3_head has none" in attention.obstacles(CPU, torch.float32, 64, HEAD)["native"]
    assert "power of two" in attention.obstacles(CUDA, HALF, 128, block_size=24)["triton"]


def test_a_cpu_never_interprets_kernels_unasked() -> None:
    assert list(attention.obstacles(CPU, torch.float32, 64)) == ["native", "torch", "flash_attn", "triton"]
    assert choose_ops(CPU, torch.bfloat16).name == "torch"
    assert choose_ops(CPU, torch.float32, "triton").name == "triton"
    assert attention.choose_attention("triton", CPU, torch.float32, 64).name == "triton"


def test_triton_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not in float64" in triton_device.obstacle(CPU, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "runs on cuda, not on cpu" in triton_device.obstacle(CPU, HALF)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _=None: "an old card")
    assert triton_device.obstacle(CUDA, HALF) == "needs compute capability 8.0, an old card has 7.5"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert triton_device.obstacle(CUDA, HALF) == "triton is not installed"


@pytest.mark.parametrize("generation", [2, 3])
def test_flash_attention_is_called_by_its_own_names(generation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in records what each call is given and checks that the cache was written first."""
    name = "flash_attn" if generation == 2 else "flash_attn_interface"
    module, calls = ModuleType(name), []

    def call(kind: str) -> Any:
        def record(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **settings: Any) -> torch.Tensor:
            assert torch.isfinite(keys.flatten(0, 1)[batch.slot_mapping]).all(), "keys were not written yet"
            calls.append((kind, tuple(q.shape), settings))
            return q

        return record

    monkeypatch.setitem(sys.modules, name, module)
    module.flash_attn_with_kvcache, module.flash_attn_varlen_func = call("paged"), call("varlen")  # type: ignore[attr-defined]
    backend = FlashAttention(Flash(generation, "9.9"), CPU, torch.float32)
    assert backend.name == "flash_attn 9.9"
    for sequences, window in (([(2, 20), (2, 5)], None), ([(3, 20), (1, 5)], 7)):
        case = Case(sequences, window=window)
        batch = case.batch()
        backend(case.q, case.k, case.v, case.cache(), batch, scale=0.5, window=window)
    (same, same_shape, same_settings), (mixed, mixed_shape, mixed_settings) = calls
    assert same_settings["softmax_scale"] == 0.5
    assert same_settings["causal"]
    assert same_settings["window_size"] == (-1, -1)
    assert mixed_settings["window_size"] == (6, 0)
    if generation == 2:
        assert (same, same_shape) == ("paged", (2, 2, 6, 32))
        assert same_settings["cache_seqlens"].tolist() == [20, 5]
        assert (mixed, mixed_shape) == ("varlen", (4, 6, 32))
        assert mixed_settings["cu_seqlens_k"].tolist() == [0, 20, 25]
        assert (mixed_settings["max_seqlen_q"], mixed_settings["max_seqlen_k"]) == (3, 20)
    else:
        assert (same, mixed) == ("paged", "paged")
        assert mixed_settings["cu_seqlens_q"].tolist() == [0, 3, 4]
        assert mixed_settings["page_table"] is batch.block_tables


def test_an_engine_tells_what_it_runs_on(make_engine: MakeEngine) -> None:
    assert make_engine(attention="triton").card.backends.startswith("attention triton (asked for), ops ")
    with pytest.raises(ConfigError, match="'flash_attn' cannot be used here: neither flash_attn_interface"):
        make_engine(attention="flash_attn")


@pytest.mark.parametrize("graphs", ["off", "eager"])
def test_an_engine_on_the_kernels_rounds_as_the_reference_does(
    graphs: str, make_engine: MakeEngine, tiny_model: Path
) -> None:
    """With one scale a head: prompts, decodes and, with graphs, padding."""
    engine = make_engine(attention="triton", kv_cache_dtype=HEAD.name, step_graphs=graphs, max_model_len=40)
    reference = Reference.load(tiny_model, engine.loaded.kv, engine.loaded.kv_scales)
    asked = [list(range(40, 40 + length)) for length in (3, 17, 30)]
    done = engine.generate(asked, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
    answers = [list(one.outputs[0].token_ids) for one in done]
    assert answers == [reference.generate(prompt, 6, ignore_eos=True) for prompt in asked]
