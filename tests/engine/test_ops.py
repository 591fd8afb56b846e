"""Every native operation against torch in float64, and the promise that a row does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.native.linear import NativeLinear
from replicas.engine.native.ops import NativeOps
from replicas.engine.ops import TorchOps, choose_ops
from replicas.protocol import ConfigError
from tests.engine.native_builds import MARCHES, kernels, needs_compiler

pytestmark = needs_compiler
# Float32 sums in another order: relative to the sum of magnitudes, so cancellation does not count as error.
RELATIVE = 2e-6


@pytest.fixture(autouse=True, params=[1, 2], ids=lambda n: f"{n}thread")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=MARCHES)
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(kernels(request.param))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_product(actual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    exact = x.double() @ weight.double().T
    magnitude = x.abs().double() @ weight.abs().double().T
    if bias is not None:
        exact, magnitude = exact + bias, magnitude + bias.abs()
    assert actual.shape == exact.shape
    assert ((actual - exact).abs() <= RELATIVE * magnitude + 1e-30).all()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 70), n=st.integers(1, 150), k=st.integers(1, 400), bias=st.booleans(), seed=st.integers(0, 9)
)
@pytest.mark.parametrize("march", MARCHES)
def test_linear_matches_float64(march: str, rows: int, n: int, k: int, bias: bool, seed: int) -> None:
    x, weight = random(rows, k, seed=seed), random(n, k, seed=seed + 10)
    offset = random(n, seed=seed + 20) if bias else None
    assert_product(NativeOps(kernels(march)).linear(weight, offset)(x), x, weight, offset)


@pytest.mark.parametrize("rows", [1, 13, 170, 600])  # one register tile, several, several chunks of rows
def test_linear_spans_all_blocking_levels(ops: NativeOps, rows: int) -> None:
    x, weight, bias = random(rows, 700), random(333, 700, seed=1), random(333, seed=2)
    assert_product(ops.linear(weight, bias)(x), x, weight, bias)


def test_linear_takes_rows_of_a_wider_matrix(ops: NativeOps) -> None:
    wide, weight = random(9, 300), random(40, 100, seed=1)
    part = wide[:, 50:150]
    assert_product(ops.linear(weight, None)(part), part, weight, None)
    assert_product(ops.linear(weight, None)(wide[:, ::3]), wide[:, ::3], weight, None)


def test_a_row_is_the_same_bits_in_any_batch_and_on_any_number_of_threads(ops: NativeOps) -> None:
    x, linear = random(300, 577), ops.linear(random(200, 577, seed=1), random(200, seed=2))
    torch.set_num_threads(1)
    whole = linear(x)
    for threads in (2, 3, 5):  # even and uneven shares, rows of one's own or not, more threads than panels at the end
        torch.set_num_threads(threads)
        for rows in (*range(1, 33), 57, 112, 168, 169, 300) if threads == 2 else (1, 15, 57, 168, 300):
            assert torch.equal(linear(x[:rows]), whole[:rows])
            assert torch.equal(linear(x[-rows:]), whole[-rows:])


def test_rows_gives_back_the_weight(ops: NativeOps) -> None:
    weight = random(77, 45)
    linear = ops.linear(weight.clone(), None)
    ids = torch.tensor([0, 76, 5, 5, 31, 32])
    assert torch.equal(linear.rows(ids), weight[ids])
    assert torch.equal(linear.rows(ids), TorchOps().linear(weight, None).rows(ids))
    assert linear.rows(ids[:0]).shape == (0, 45)
    with pytest.raises(AssertionError, match="77"):
        linear.rows(torch.tensor([77]))


def test_linear_refuses_what_it_cannot_compute(ops: NativeOps) -> None:
    with pytest.raises(AssertionError, match="float32"):
        ops.linear(torch.zeros(4, 4, dtype=torch.bfloat16), None)
    with pytest.raises(AssertionError, match="columns"):
        ops.linear(torch.zeros(4, 4), None)(torch.zeros(1, 5))


def test_linear_holds_no_reference_to_the_weight_it_was_given(ops: NativeOps) -> None:
    weight = random(20, 30)
    linear, copy = ops.linear(weight, None), weight.clone()
    weight.zero_()
    assert isinstance(linear, NativeLinear)
    assert_product(linear(random(3, 30)), random(3, 30), copy, None)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 90), width=st.integers(1, 700), seed=st.integers(0, 99))
@pytest.mark.parametrize("march", MARCHES)
def test_norms_match_the_reference(march: str, rows: int, width: int, seed: int) -> None:
    native, reference = NativeOps(kernels(march)), TorchOps()
    x, residual, weight = (
        random(rows, width, seed=seed),
        random(rows, width, seed=seed + 1),
        random(width, seed=seed + 2),
    )
    torch.testing.assert_close(
        native.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), rtol=5e-6, atol=1e-6
    )
    expected = reference.add_rms_norm(x, residual, weight, 1e-5)
    actual = native.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
    torch.testing.assert_close(actual, expected, rtol=5e-6, atol=1e-6)
    assert torch.equal(actual[1], expected[1])


def test_norm_keeps_the_shape_of_heads(ops: NativeOps) -> None:
    q, weight = random(5, 3, 64), random(64, seed=1)
    torch.testing.assert_close(ops.rms_norm(q, weight, 1e-6), TorchOps().rms_norm(q, weight, 1e-6))


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 70),
    heads=st.tuples(st.integers(1, 9), st.integers(1, 4)),
    half=st.integers(1, 70),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("march", MARCHES)
def test_rope_rotates_views_into_a_fused_projection(
    march: str, tokens: int, heads: tuple[int, int], half: int, seed: int
) -> None:
    dim = 2 * half
    fused = random(tokens, (heads[0] + 2 * heads[1]) * dim, seed=seed)
    cos_sin = random(200, dim, seed=seed + 1)
    positions = torch.randint(0, 200, (tokens,), generator=torch.Generator().manual_seed(seed))

    def views(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = x.split([heads[0] * dim, heads[1] * dim, heads[1] * dim], dim=1)
        return q.unflatten(1, (heads[0], dim)), k.unflatten(1, (heads[1], dim)), v

    q, k, v = views(fused.clone())
    expected = TorchOps().rope(*views(fused)[:2], cos_sin, positions)
    torch.testing.assert_close(NativeOps(kernels(march)).rope(q, k, cos_sin, positions), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(v, views(fused)[2])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 60), width=st.integers(1, 900), scale=st.sampled_from([1.0, 30.0]), seed=st.integers(0, 99))
@pytest.mark.parametrize("march", MARCHES)
def test_silu_mul_matches_the_reference(march: str, rows: int, width: int, scale: float, seed: int) -> None:
    x = random(rows, 2 * width, seed=seed) * scale
    torch.testing.assert_close(NativeOps(kernels(march)).silu_mul(x), TorchOps().silu_mul(x), rtol=3e-6, atol=1e-6)


def test_silu_mul_at_the_ends_of_float32(ops: NativeOps) -> None:
    gates = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]])
    x = torch.cat((gates, torch.ones_like(gates)), dim=1)
    torch.testing.assert_close(ops.silu_mul(x), TorchOps().silu_mul(x), rtol=3e-6, atol=1e-30)


def test_auto_takes_native_in_float32_and_torch_otherwise() -> None:
    cpu = torch.device("cpu")
    assert choose_ops(cpu, torch.float32).name == "native"
    assert choose_ops(cpu, torch.bfloat16).name == "torch"
    assert choose_ops(cpu, torch.float32, "torch").name == "torch"


def test_a_forced_choice_that_cannot_be_had_says_why_and_what_can() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"ops 'native' .* float32, not in bfloat16; usable: auto, torch(, triton)?$"):
        choose_ops(cpu, torch.bfloat16, "native")
    with pytest.raises(ConfigError, match=r"ops 'nativ' .* unknown name; usable: auto, native, torch(, triton)?$"):
        choose_ops(cpu, torch.float32, "nativ")


def test_torch_takes_over_when_native_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNALBOX_NATIVE", "0")
    assert choose_ops(torch.device("cpu"), torch.float32).name == "torch"
    with pytest.raises(ConfigError, match="SIGNALBOX_NATIVE=0"):
        choose_ops(torch.device("cpu"), torch.float32, "native")
