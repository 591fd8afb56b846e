"""Products with weights of 2, 4 and 8 bits against float64 products with the numbers that they stand for."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.engine.ops import choose_ops
from replicas.engine.quantized.torch_linear import TorchQuantizedLinear
from replicas.engine.quantized.weight import QuantizedWeight
from replicas.engine.triton.crossover import BUCKETS, Crossover, bucket_of
from replicas.engine.triton.kernels.quant import _places_as_floats, _places_as_halves
from replicas.engine.triton.quant import TritonQuantizedLinear, _number_type, obstacle, pack, unpack_rows
from tests.engine.triton.ptx import run_ptx

CPU = torch.device("cpu")
# Relative to the sum of magnitudes: a sum in float32, and the rounding of results to the type.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def weight(
    rows: int, columns: int, bits: int = 4, group: int = 32, origin: str = "zeros", *, sort: bool = False, seed: int = 0
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // group)
    scales = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(
        bits,
        group,
        torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        scales,
        zeros if origin == "zeros" else None,
        torch.randn(rows, groups, generator=generator).half() if origin == "mins" else None,
        torch.randperm(columns, generator=generator) if sort else None,
    )


def assert_product(
    actual: torch.Tensor, x: torch.Tensor, quantized: QuantizedWeight, bias: torch.Tensor | None
) -> None:
    exact_weight = quantized.dequantise().double()
    exact, magnitude = x.double() @ exact_weight.T, x.abs().double() @ exact_weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.abs().double()
    assert actual.dtype is x.dtype
    assert actual.shape == exact.shape
    assert ((actual.double() - exact).abs() <= TOLERANCE[x.dtype] * magnitude + 1e-6).all()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 3, 4, 5, 17, 65, 140]),
    n=st.integers(1, 150),
    k=st.sampled_from([32, 64, 96, 130, 256, 300]),
    bits=st.sampled_from([2, 4, 4, 8]),
    group=st.sampled_from([16, 32, 64, 128, 256, 1000]),
    origin=st.sampled_from(["none", "zeros", "mins"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    bias=st.booleans(),
    sort=st.booleans(),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_every_kernel_multiplies_with_what_the_codes_stand_for(
    rows: int, n: int, k: int, bits: int, group: int, origin: str, dtype: torch.dtype, bias: bool, sort: bool,
    seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    quantized = weight(n, k, bits, group, origin, sort=sort, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    offset = torch.randn(n, generator=generator).to(dtype) if bias else None
    linear = TritonQuantizedLinear(quantized, offset, CPU, dtype)
    assert_product(linear(x), x, quantized, offset)
    if rows:
        other = data.draw(st.sampled_from(linear.variants(rows)))
        ordered = x if quantized.order is None else x[:, quantized.order]
        assert_product(linear.run(other, ordered), x, quantized, offset)
    assert not linear._counters.any(), "a counter of parts was not set back"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", ["few", "some 16x64w4s4"])
def test_parts_of_the_inputs_are_added_up_by_whoever_comes_last(variant: str, dtype: torch.dtype) -> None:
    quantized = weight(70, 4096, 4, 128)
    linear = TritonQuantizedLinear(quantized, torch.ones(70, dtype=dtype), CPU, dtype)
    assert linear._splits(2) > 1, "nothing is split: the test shows nothing"
    x = torch.randn(3, 4096).to(dtype)
    for _ in range(2):  # counters are as they were before
        assert_product(linear.run(variant, x), x, quantized, torch.ones(70, dtype=dtype))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    bits=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_codes_come_back_as_they_were_packed(n: int, k: int, bits: int, seed: int, data: st.DataObject) -> None:
    quantized = weight(n, k, bits, 1000, seed=seed)
    ids = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    assert torch.equal(unpack_rows(pack(quantized, CPU), ids), quantized.codes[ids])


# ---------------------------------------------------------------- what the interpreter does not run


@settings(max_examples=60, deadline=None)
@given(word=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 4, 8]), data=st.data())
def test_the_instructions_take_out_the_codes_that_the_layout_puts_there(
    word: int, bits: int, data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, 16 // bits - 1))
    wanted = [word >> 16 * half + bits * place & (2**bits - 1) for half in range(2)]
    floats = run_ptx(_places_as_floats(bits, place), word)
    assert [struct.unpack("f", struct.pack("I", found))[0] - 2**23 for found in floats] == wanted
    for one, above, dtype in ((0x4300, 128, torch.bfloat16), (0x6400, 1024, torch.float16)):
        if bits == 8 and dtype is torch.bfloat16:
            continue  # it does not tell 8 bits apart, and is not asked to
        [pair] = run_ptx(_places_as_halves(bits, place, one), word)
        halves = torch.tensor([pair & 0xFFFF, pair >> 16], dtype=torch.int32).to(torch.int16).view(dtype)
        assert (halves - above).tolist() == wanted


def test_numbers_are_told_from_codes_without_rounding() -> None:
    """Code and zero point are both added to the same number, and their difference is exact in each type."""
    assert _number_type(8, torch.bfloat16) == tl.float32
    for bits, dtype, above in ((4, torch.bfloat16, 128), (8, torch.float16, 1024), (8, torch.float32, 2**23)):
        codes = torch.arange(2**bits)
        taken = (codes + above).to(dtype)[:, None] - (codes + above).to(dtype)[None, :]
        assert torch.equal(taken.long(), codes[:, None] - codes[None, :])


@pytest.mark.parametrize(("bits", "origin"), [(4, "zeros"), (8, "none"), (2, "mins")])
def test_rows_are_the_numbers_themselves(bits: int, origin: str) -> None:
    quantized = weight(40, 96, bits, 32, origin, sort=True)
    linear = TritonQuantizedLinear(quantized, None, CPU, torch.float32)
    ids = torch.tensor([3, 39, 0, 3])
    torch.testing.assert_close(linear.rows(ids), quantized.dequantise()[ids])


def test_four_bits_take_half_a_byte_each() -> None:
    packed = pack(weight(64, 256, 4, 128), CPU)
    assert packed.codes.nbytes == 64 * 256 // 2
    assert packed.nbytes == packed.codes.nbytes + 64 * 2 * (2 + 1)


def test_groups_that_do_not_fit_are_left_to_torch() -> None:
    odd = weight(8, 48, group=24)
    assert "groups of 24" in obstacle(odd)
    assert "groups of 8" in obstacle(weight(8, 48, group=8))
    assert not obstacle(weight(8, 48, group=48)), "one group in all is no obstacle"
    ops = choose_ops(CPU, torch.float32, "triton")
    assert isinstance(ops.quantized_linear(odd, None), TorchQuantizedLinear)
    assert isinstance(ops.quantized_linear(weight(8, 64), None), TritonQuantizedLinear)


# ---------------------------------------------------------------- which kernel


def times(table: dict[str, Callable[[int], float]], asked: list[tuple[str, int]]) -> Callable[..., Callable[[], float]]:
    def run(kernel: str, rows: int) -> Callable[[], float]:
        asked.append((kernel, rows))
        return lambda: table[kernel](rows)

    return run


def test_the_fastest_kernel_of_each_size_is_measured_once_and_kept(tmp_path: Path) -> None:
    table = {"few": lambda rows: rows * 3.0, "some": lambda rows: 5.0 + rows / 4, "whole": lambda rows: 20.0}
    most = {"few": 4, "some": 64, "whole": 512}

    def fitting(rows: int) -> list[str]:
        return [name for name, limit in most.items() if rows <= limit]

    asked: list[tuple[str, int]] = []
    file = tmp_path / "deep" / "crossover.json"
    chosen = Crossover(file, lambda call: call()).choose("a shape", fitting, times(table, asked))
    assert chosen == {rows: "few" if rows < 2 else "some" if rows < 60 else "whole" for rows in BUCKETS}
    assert ("few", 8) not in asked, "a kernel was timed on more rows than it takes"
    asked.clear()
    again = Crossover(file, lambda call: call())
    assert again.choose("a shape", fitting, times(table, asked)) == chosen
    assert not asked, "what was measured is measured again"
    again.choose("another shape", fitting, times(table, asked))
    assert len(asked) > len(BUCKETS)
    assert set(json.loads(file.read_text())) == {"a shape", "another shape"}


def test_kernels_that_a_device_refuses_are_left_out(tmp_path: Path) -> None:
    def refuse(rows: int) -> float:
        raise RuntimeError("out of resource: shared memory")

    def choose(**table: Callable[[int], float]) -> dict[int, str]:
        crossover = Crossover(tmp_path / "crossover.json", lambda call: call())
        return crossover.choose(str(list(table)), lambda rows: list(table), times(table, []))

    assert set(choose(large=refuse, small=float).values()) == {"small"}
    with pytest.raises(RuntimeError, match="shared memory"):
        choose(large=refuse, larger=refuse)


@pytest.mark.parametrize("content", ["no json", "[]", '{"a shape": {"1": "gone"}}', '{"a shape": 3}'])
def test_a_file_that_is_of_no_use_is_measured_anew(tmp_path: Path, content: str) -> None:
    file = tmp_path / "crossover.json"
    file.write_text(content)
    chosen = Crossover(file, lambda call: call()).choose("a shape", lambda rows: ["only"], times({"only": float}, []))
    assert set(chosen.values()) == {"only"}
    assert json.loads(file.read_text())["a shape"]["1"] == "only"


def test_rows_fall_into_buckets() -> None:
    assert [bucket_of(rows) for rows in (1, 2, 3, 64, 65, 256, 5000)] == [1, 2, 4, 64, 96, 256, 512]


def test_a_measured_choice_is_followed(tmp_path: Path) -> None:
    quantized, x = weight(20, 64), torch.randn(2, 64)
    for kernel in ("few", "some 16x64w4s4", "dequantise"):
        crossover = Crossover(tmp_path / f"{kernel}.json", lambda call: call())
        crossover.choose = lambda *_, kernel=kernel: dict.fromkeys(BUCKETS, kernel)  # type: ignore[method-assign]
        assert_product(TritonQuantizedLinear(quantized, None, CPU, torch.float32, crossover)(x), x, quantized, None)
