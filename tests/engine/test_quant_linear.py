"""Linear layers on quantised weights: the bits of the dequantised matrix, whatever the shape and however many rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from replicas.engine.native.linear import NativeLinear
from replicas.engine.native.ops import NativeOps
from replicas.engine.ops import TorchOps
from replicas.engine.quantized.rounding import int8
from replicas.engine.quantized.weight import QuantizedWeight, concatenate
from tests.engine.native_builds import MARCHES, kernels, needs_compiler

# Outputs, inputs, group: whole panels and less, one group a row, a short last group, groups smaller than a word.
SHAPES = [(70, 64, 32), (33, 576, 576), (40, 96, 64), (5, 40, 8), (5, 44, 4), (64, 1344, 64)]
ROWS = (*range(1, 10), 13, 15, 29, 200)


def random_weight(
    shape: tuple[int, int, int], bits: int, origin: str, scale: torch.dtype, order: bool
) -> QuantizedWeight:
    rows, columns, group = shape
    generator = torch.Generator().manual_seed(bits)
    count = -(-columns // group)

    def uniform() -> Tensor:
        return torch.rand(rows, count, generator=generator)

    zeros = mins = None
    if origin == "zeros":
        zeros = (uniform() * 2**bits).to(torch.uint8)
    elif origin == "wide zeros":  # v1 of GPTQ's layout reaches 256
        zeros = (uniform() * 257).to(torch.int16)
    elif origin == "mins":
        mins = (uniform() - 0.5).to(scale)
    return QuantizedWeight(
        bits,
        group,
        torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        (uniform() * 0.02 + 1e-6).to(scale),
        zeros,
        mins,
        torch.randperm(columns, generator=generator) if order else None,
    )


@needs_compiler
@pytest.mark.parametrize("march", MARCHES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("origin", ["middle", "zeros", "wide zeros", "mins"])
def test_native_products_have_the_bits_of_the_dequantised_matrix(march: str, bits: int, origin: str) -> None:
    ops = NativeOps(kernels(march))
    for shape in SHAPES:
        for scale in (torch.float16, torch.bfloat16, *([] if origin == "mins" else [torch.float32])):
            for order in (False, True):
                weight = random_weight(shape, bits, origin, scale, order)
                wide, bias = weight.dequantise(), torch.arange(float(shape[0]))
                coded = ops.quantized_linear(weight, bias)
                assert torch.equal(coded.rows(torch.arange(shape[0])), wide)
                plain = ops.linear(wide if weight.order is None else wide[:, weight.order].contiguous(), bias)
                for rows in ROWS:
                    x = torch.randn(rows, shape[1])
                    expected = plain(x if weight.order is None else x[:, weight.order].contiguous())
                    assert torch.equal(coded(x), expected), (shape, scale, order, rows)


@needs_compiler
def test_a_row_has_the_same_bits_alone_and_among_others_and_on_any_number_of_threads() -> None:
    linear = NativeOps(kernels("native")).quantized_linear(
        random_weight((200, 640, 32), 4, "zeros", torch.float16, True), None
    )
    x = torch.randn(40, 640)
    together, threads = linear(x), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert all(torch.equal(linear(x[i : i + 1]), together[i : i + 1]) for i in range(0, 40, 7))
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_groups_that_fill_no_words_are_held_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    weight = random_weight((9, 37, 37), 4, "zeros", torch.float16, True)
    linear = NativeOps(kernels("native")).quantized_linear(weight, None)
    assert "37 inputs in groups of 37 is held in float32" in caplog.text
    x = torch.randn(3, 37)
    torch.testing.assert_close(linear(x), x @ weight.dequantise().T)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_torch_layer_multiplies_with_the_dequantised_matrix(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    settings: dict[str, Any] = {
        "bits": data.draw(st.sampled_from([2, 4, 8])),
        "origin": data.draw(st.sampled_from(["middle", "zeros", "mins"])),
        "scale": torch.float16,
        "order": data.draw(st.booleans()),
    }
    weight = random_weight(shape, **settings)
    linear, wide = TorchOps().quantized_linear(weight, None), weight.dequantise()
    ids = torch.tensor([0, shape[0] - 1])
    assert torch.equal(linear.rows(ids), wide[ids])
    x = torch.randn(3, shape[1])
    assert torch.equal(linear(x), torch.nn.functional.linear(x, wide))
    assert linear(x.bfloat16()).dtype is torch.bfloat16


@needs_compiler
@pytest.mark.parametrize(("bits", "least"), [(8, 1.9), (4, 3.3)])
@pytest.mark.parametrize("group", [32, 64])
def test_memory_is_that_of_the_codes_and_their_scales(bits: int, least: float, group: int) -> None:
    weight = random_weight((256, 576, group), bits, "zeros", torch.float16, False)
    for ops in (NativeOps(kernels("native")), TorchOps()):
        nbytes = ops.quantized_linear(weight, None).nbytes
        assert nbytes == 256 * 576 * bits // 8 + 256 * (576 // group) * 3  # a scale of 2 bytes and a zero of 1
        if (bits, group) != (8, 32):
            assert 256 * 576 * 2 / nbytes >= least


def test_rows_of_several_matrices_become_one_where_they_are_alike() -> None:
    one, other = (random_weight((8, 64, 32), 4, "zeros", torch.float16, False) for _ in range(2))
    both = concatenate([one, other])
    assert torch.equal(both.dequantise(), torch.cat([one.dequantise(), other.dequantise()]))
    assert not one.joins(random_weight((8, 64, 64), 4, "zeros", torch.float16, False))
    assert not one.joins(random_weight((8, 64, 32), 4, "middle", torch.float16, False))
    assert not one.joins(random_weight((8, 64, 32), 4, "zeros", torch.float16, True))


def test_rounding_to_8_bits_is_off_by_half_a_step_at_most() -> None:
    weight = torch.randn(16, 100) * torch.logspace(-30, 4, 16).unsqueeze(1)
    weight[3] = 0
    rounded = int8(weight).dequantise()
    step = weight.abs().amax(1, keepdim=True) / 127
    assert bool(((rounded - weight).abs() <= step * 0.51).all())
    assert bool((rounded[3] == 0).all())


@needs_compiler
def test_the_kind_of_a_native_layer_is_one() -> None:
    """A native stack takes both kinds of layer through the same structure."""
    ops = NativeOps(kernels("native"))
    weight = random_weight((40, 96, 32), 4, "zeros", torch.float16, False)
    assert isinstance(ops.quantized_linear(weight, None), NativeLinear)
    assert isinstance(ops.linear(weight.dequantise(), None), NativeLinear)
