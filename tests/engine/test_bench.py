"""The benchmark counts what it says it counts."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replicas.engine import bench, bench_sampling
from replicas.engine.bench import Ceilings, Timeline, run_batch, summarise, table
from replicas.engine.bench_cost import Cost, decode_step, prompt
from replicas.engine.model_config import ModelConfig
from replicas.protocol import ConfigError, EngineFault
from tests.engine.conftest import MakeEngine

# 2 layers, 2 query heads on 1 KV head of 4: q 8, kv 4 wide. Per layer: qkv 8*16, o 8*8, gate/up/down 3*8*12.
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    windows=(None, None),
    eos_token_ids=(),
    bos_token_id=None,
)
LAYER, HEAD = 8 * 16 + 8 * 8 + 3 * 8 * 12, 100 * 8


def test_decode_reads_weights_once_and_each_sequence_its_own_keys() -> None:
    cost = decode_step(CONFIG, [10, 3], element_size=4)
    assert cost.bytes == 4 * (2 * LAYER + HEAD) + 4 * 2 * (10 + 3) * 2 * 4  # 2 layers * (keys and values of 4)
    assert cost.flops == 2 * 2 * (2 * LAYER + HEAD) + 2 * (10 + 3) * 2 * 8 * 2  # Q K and P V, 8 wide, multiply + add


def test_decode_agrees_with_the_model_configs_own_count() -> None:
    assert decode_step(CONFIG, [17], 2).flops == CONFIG.flops_per_token(17)


def test_a_prompt_needs_head_and_end_of_last_layer_for_its_last_token_only() -> None:
    last_kv = 8 * 2 * 4
    products = 5 * LAYER + 5 * last_kv + (LAYER - last_kv) + HEAD
    attended = (1 + 2 + 3 + 4 + 5) + 5
    assert prompt(CONFIG, 5, 4).flops == 2 * products + 4 * 8 * attended


def test_a_window_bounds_what_is_read() -> None:
    windowed = replace(CONFIG, windows=(4, None))
    assert decode_step(windowed, [10], 4).bytes == decode_step(CONFIG, [10], 4).bytes - 6 * 2 * 4 * 4
    assert prompt(CONFIG, 6, 4).flops - prompt(windowed, 6, 4).flops == 4 * 8 * (21 - (1 + 2 + 3 + 4 + 4 + 4))


def test_summary_is_arithmetic_on_the_timeline() -> None:
    full = Timeline(
        total_s=4.0,
        first={"a": 0.5, "b": 1.5},
        last={"a": 3.5, "b": 4.0},
        tokens={"a": 7, "b": 6},
        decode_s=2.0,
        decode_tokens=8,
        decode_cost=Cost(bytes=600, flops=1000),
    )
    figures = summarise(CONFIG, 4, 5, full, Timeline(total_s=0.25), Ceilings(bytes_per_s=600.0, flops_per_s=5000.0))
    assert figures["output_tokens_per_s"] == 13 / 4
    assert figures["decode_tokens_per_s"] == 4
    assert figures["prefill_tokens_per_s"] == 2 * 5 / 0.25
    assert figures["prefill_flops_per_s"] == 2 * prompt(CONFIG, 5, 4).flops / 0.25
    assert (figures["ttft_s"], figures["ttft_max_s"], figures["tpot_s"]) == (1.0, 1.5, 0.5)
    assert (figures["decode_bytes_share"], figures["decode_flops_share"]) == (0.5, 0.1)


def test_a_run_gives_every_request_its_tokens(make_engine: MakeEngine) -> None:
    line = run_batch(make_engine(max_num_batched_tokens=16), 3, 10, 6, random.Random(1))
    assert set(line.tokens.values()) == {6}
    assert line.first.keys() == line.last.keys() == line.tokens.keys()
    assert 0 < max(line.first.values()) < max(line.last.values()) <= line.total_s
    assert 0 < line.decode_s < line.total_s
    assert 3 <= line.decode_tokens < 3 * 6
    assert line.decode_tokens % 3 == 0


def test_a_single_output_token_has_no_decode_figures(make_engine: MakeEngine) -> None:
    engine = make_engine()
    line = run_batch(engine, 2, 5, 1, random.Random(1))
    figures = summarise(engine.loaded.decoder.config, 4, 5, line, line, Ceilings(1.0, 1.0))
    assert "decode_tokens_per_s" not in figures
    assert " - " in table([figures])


def test_the_command_prints_a_table_and_writes_json(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9))
    file = tmp_path / "out.json"
    command = ["bench", "--model", str(tiny_model), "--prompt", "8", "--output", "4", "--batch", "1", "3"]
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(file), "--repeat", "2"])
    assert bench.main() == 0
    report = json.loads(file.read_text())
    assert [figures["batch"] for figures in report["results"]] == [1, 3]
    assert all(figures["decode_tokens_per_s"] > 0 for figures in report["results"])
    assert report["first_token_s"] > 0
    printed = capsys.readouterr().out
    assert "decode tok/s" in printed
    assert "ceilings: 1.0 GB/s" in printed


def test_lines_answer_each_batch_size(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "replicas.engine.bench", "--lines", "--model", str(tiny_model)]
    command += ["--prompt", "8", "--output", "4", "--batch", "2"]
    done = subprocess.run(command, input="1\n2\n", capture_output=True, text=True, check=True)
    ready, *answers = [json.loads(line[3:]) for line in done.stdout.splitlines() if line.startswith("@@ ")]
    assert ready["first_token_s"] > 0
    assert [answer["batch"] for answer in answers] == [1, 2]
    assert all(answer["prefill_s"] > 0 and answer["total_s"] > 0 for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "x", "--batch", "0"], "must be at least 1, got 0"),
        (["--batch", "1"], "--model"),
        (["--model", "x", "--json", "/no/such/folder/x.json"], "no such folder"),
    ],
)
def test_bad_arguments_are_refused_by_name(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--model", "/no/such/model"])
    assert bench.main() == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_more_output_than_the_model_can_hold_is_refused(make_engine: MakeEngine, tiny_model: Path) -> None:
    args = bench.parsed(["--model", str(tiny_model), "--prompt", "300"])
    with pytest.raises(ConfigError, match="256"):
        bench.build_engine(args)


def test_a_batch_that_fails_leaves_nothing_for_the_next(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_seqs=2)
    sample, calls = engine._sampler.draw, []

    def fail_once(*of: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a kernel failed")
        return sample(*of)

    monkeypatch.setattr(engine._sampler, "draw", fail_once)
    with pytest.raises(EngineFault):
        run_batch(engine, 5, 4, 6, random.Random(1))
    assert not engine.has_work()
    assert sum(run_batch(engine, 5, 4, 6, random.Random(1)).tokens.values()) == 30


def test_drawing_is_timed_for_every_kind_of_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["bench_sampling", "--rows", "1", "3", "--vocab", "100", "--tries", "1", "--device", "cpu"]
    )
    assert bench_sampling.main() == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [(int(line.split()[0]), line[6:18].strip()) for line in lines] == [
        (rows, kind) for rows in (1, 3) for kind in bench_sampling.KINDS
    ]
    assert all(float(figure) > 0 for line in lines for figure in line.split()[-3:-1])
