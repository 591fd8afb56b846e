"""Single rows times weights as they are, against float64, and whose product is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.ops import choose_ops
from replicas.engine.triton.crossover import BUCKETS, Crossover
from replicas.engine.triton.linear import MOST_ROWS, VARIANTS, TritonLinear

CPU = torch.device("cpu")
# Of the sum of magnitudes: a sum in float32, and the rounding of results to the type.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.sampled_from(list(VARIANTS)),
    rows=st.integers(1, 4),
    n=st.integers(1, 40),
    k=st.one_of(st.integers(1, 600), st.sampled_from([2048, 4096])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    seed=st.integers(0, 9),
)
def test_single_rows_are_multiplied_as_they_are(
    kernel: str, rows: int, n: int, k: int, dtype: torch.dtype, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    x = torch.randn(rows, 2 * k, generator=generator).to(dtype)[:, k:]  # rows lie apart
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    out = TritonLinear(weight, offset).run(kernel, x)
    exact, magnitude = x.double() @ weight.double().T, x.abs().double() @ weight.abs().double().T
    if offset is not None:
        exact, magnitude = exact + offset.double(), magnitude + offset.abs().double()
    assert out.dtype is dtype
    assert ((out.double() - exact).abs() <= TOLERANCE[dtype] * magnitude + 1e-6).all()


def test_few_rows_go_where_they_were_measured_to_be_fastest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crossover, asked = Crossover(tmp_path / "crossover.json", lambda call: 1.0), []
    times = {1: "single 8x512w4", 2: "cublas", 4: "single 4x1024w4"}

    def choose(key: str, candidates: object, run: object) -> dict[int, str]:
        return {rows: times.get(rows, "cublas") for rows in BUCKETS}

    monkeypatch.setattr(crossover, "choose", choose)
    linear = TritonLinear(torch.randn(8, 16), None, crossover)
    monkeypatch.setattr(linear, "run", lambda kernel, x: asked.append(kernel))
    for rows in (0, 1, 2, 3, 4, 5, 600):
        linear(torch.randn(rows, 16))
    assert asked == ["cublas", times[1], times[2], times[4], times[4], "cublas", "cublas"]


def test_only_a_few_rows_are_measured(tmp_path: Path) -> None:
    measured: list[int] = []

    def measure(call: object) -> float:
        measured.append(1)
        return float(len(measured))

    TritonLinear(torch.randn(8, 16), None, Crossover(tmp_path / "crossover.json", measure))
    few = sum(rows <= MOST_ROWS for rows in BUCKETS)
    assert len(measured) == few * (len(VARIANTS) + 1), "sizes that only cublas takes were timed too"


def test_without_a_measurement_everything_is_cublas() -> None:
    linear = choose_ops(CPU, torch.float32, "triton").linear(torch.randn(8, 16), None)
    assert isinstance(linear, TritonLinear)
    x = torch.randn(2, 16)
    assert torch.equal(linear(x), torch.nn.functional.linear(x, linear.weight))
    assert torch.equal(linear.rows(torch.tensor([3, 1])), linear.weight[[3, 1]])
