"""The benchmark on random weights: what is drawn, what is counted, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from replicas.engine import bench, bench_shapes, random_weights
from replicas.engine.bench import Ceilings
from replicas.engine.bench_cost import Cost, Held, decode_step
from replicas.engine.bench_shapes import build_engine, decode_figures, idle_of
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.random_weights import SHAPES, RandomCheckpoint, byte_tokenizer, shape_config
from replicas.engine.weights import expected_tensors
from replicas.protocol import ConfigError
from tests.engine.test_bench import CONFIG, HEAD, LAYER

CPU = torch.device("cpu")
TINY = {
    **SHAPES["smollm2-135m"],
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def _a_tiny_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "SHAPES", {**SHAPES, "tiny": TINY})
    monkeypatch.setattr(bench_shapes, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9))


def arguments(*more: str) -> Any:
    sizes = ["--batch", "1", "2", "--prompt", "8", "--output", "4", "--prefill", "2", "16", "--mixed", "3", "8", "4"]
    return bench.parsed(["--shape", "tiny", "--random-weights", *sizes, *more])


def test_shapes_have_their_models_parameters() -> None:
    assert [round(_parameters(name) / 1e9, 2) for name in SHAPES] == [8.03, 70.55, 0.13]


def _parameters(name: str) -> int:
    return sum(torch.Size(shape).numel() for shape in expected_tensors(shape_config(name)).values())


def test_the_same_seed_draws_the_same_weights_in_any_order() -> None:
    one, other = (RandomCheckpoint(shape_config("tiny"), CPU, torch.float32, quant="int4") for _ in range(2))
    name = "model.layers.1.mlp.down_proj"
    other.tensor("model.embed_tokens.weight")
    first, second = one.matrix(name), other.matrix(name)
    assert isinstance(first, QuantizedWeight)
    assert isinstance(second, QuantizedWeight)
    assert torch.equal(first.dequantise(), second.dequantise())
    assert not torch.equal(one.tensor(f"{name}.weight"), one.tensor("model.layers.0.mlp.down_proj.weight"))


@pytest.mark.parametrize("quant", [None, "int4", "int8"])
def test_drawn_weights_have_the_usual_spread(quant: str | None) -> None:
    drawn = RandomCheckpoint(shape_config("tiny"), CPU, torch.float32, quant=quant).matrix(
        "model.layers.0.mlp.gate_proj"
    )
    numbers = drawn.dequantise() if isinstance(drawn, QuantizedWeight) else drawn
    assert numbers.std().item() == pytest.approx(0.02, rel=0.15)
    assert abs(numbers.mean().item()) < 0.002


def test_a_byte_is_a_token() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("é!")
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == "é!".encode()
    assert tokenizer.token_bytes(9999) == b""


def test_quantised_weights_and_caches_are_counted_as_they_are_held() -> None:
    cost = decode_step(CONFIG, [10, 3], 4, Held(weight_bytes=1000, kv_bytes=7))
    assert cost.bytes == 1000 + 2 * 13 * 7  # two layers
    assert cost.flops == decode_step(CONFIG, [10, 3], 4).flops
    assert decode_step(CONFIG, [10, 3], 4, Held(4 * (2 * LAYER + HEAD), 2 * 4 * 4)) == decode_step(CONFIG, [10, 3], 4)


def test_what_an_engine_holds() -> None:
    plain = bench.held_by(build_engine(arguments()).loaded)
    config = shape_config("tiny")
    assert plain.weight_bytes == 4 * config.matmul_parameters
    assert plain.kv_bytes == 2 * config.kv_size * 4
    int8 = bench.held_by(build_engine(arguments("--quant", "int8", "--kv-cache-dtype", "int8")).loaded)
    assert int8.weight_bytes < plain.weight_bytes / 1.5
    assert int8.kv_bytes == 2 * (config.kv_size + 4 * config.num_kv_heads)
    by_head = bench.held_by(build_engine(arguments("--kv-cache-dtype", "fp8_e4m3_head")).loaded)
    assert by_head.kv_bytes == 2 * config.kv_size


def test_decode_shares_are_arithmetic() -> None:
    figures = decode_figures(2, 20, 4.0, Cost(bytes=1200, flops=800), Ceilings(bytes_per_s=600.0, flops_per_s=1000.0))
    assert (figures["tokens_per_s"], figures["bytes_share"], figures["flops_share"]) == (5.0, 0.5, 0.2)


def test_idle_is_what_no_kernel_covers() -> None:
    assert idle_of([(0.0, 2.0), (1.0, 3.0), (4.0, 5.0), (4.5, 4.75)]) == pytest.approx(0.2)
    assert idle_of([(1.0, 2.0)]) == 0
    assert idle_of([]) is None


def test_the_command_reports_every_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    args = arguments("--json", str(file), "--repeat", "2")
    assert bench_shapes.main(args) == 0
    report = json.loads(file.read_text())
    assert [figures["batch"] for figures in report["sweep"]] == [1, 2]
    assert all(figures["tokens_per_s"] > 0 for figures in report["sweep"])
    assert report["prefill"]["tokens_per_s"] > 0
    assert report["mixed"]["requests"] == 3
    assert report["idle_share"] is None
    assert "attention " in capsys.readouterr().out

    def broken(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(bench_shapes, "prefill", broken)
    assert bench_shapes.main(args) == 1
    report = json.loads(file.read_text())
    assert report["prefill"] == {"error": "RuntimeError: no such luck"}
    assert report["mixed"]["tokens_per_s"] > 0, "one part's failure ended the others"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--shape", "tiny"], "say --random-weights"),
        (["--model", "x", "--random-weights"], "go with --shape"),
        (["--model", "x", "--shape", "tiny"], "not allowed with"),
        (["--shape", "tiny", "--random-weights", "--peer", "vllm"], "invalid choice"),
    ],
)
def test_contradictions_are_refused(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parsed(given)
    assert said in capsys.readouterr().err


def test_unknown_shapes_and_quantisations_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--shape", "llama-9", "--random-weights"])
    assert bench.main() == 1
    assert "'llama-9' is unknown; use llama-3-8b" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="quant 'int3' is not supported; use int4, int8"):
        build_engine(arguments("--quant", "int3"))
