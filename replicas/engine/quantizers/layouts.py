"""Codes as checkpoints hold them: AutoAWQ's "gemm", AutoGPTQ's v1 and compressed-tensors' pack-quantized layouts.

    awq                  qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales float16 [K/g, N]; nibble i of word c is
                         column 8c + (0 2 4 6 1 3 5 7)[i]
    gptq                 qweight int32 [K·b/32, N] packed along K, qzeros [K/g, N·b/32] along N holding zero - 1,
                         scales float16 [K/g, N], g_idx int32 [K]
    compressed-tensors   weight_packed int32 [N, K·b/32], weight_scale float16 [N, K/g], weight_shape int64 [2],
                         weight_zero_point [N·b/32, K/g] packed along N where the grid is asymmetric

All pack the lowest bits first. What a layout cannot say is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from replicas.engine.quantizers.grid import WHOLE_ROW, Codes, Grid
from replicas.protocol import ConfigError

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass(frozen=True, slots=True)
class Layout:
    """bits: that it can hold. tensors(codes, grid): by suffix. config(grid, order): quantization_config."""

    bits: tuple[int, ...]
    tensors: Callable[[Codes, Grid], dict[str, Tensor]]
    config: Callable[[Grid, str], dict[str, Any]]
    whole_rows: bool
    orders: tuple[str, ...]
    symmetric: tuple[bool, ...] = (True, False)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] -> int32 [R, C * bits / 32], the first value in the lowest bits."""
    rows, count = values.shape
    per_word = 32 // bits
    assert count % per_word == 0, f"{count} values of {bits} bits do not fill whole words"
    shifts = torch.arange(0, 32, bits)
    words = (values.view(rows, -1, per_word).long() << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _awq(codes: Codes, grid: Grid) -> dict[str, Tensor]:
    def columns(values: Tensor) -> Tensor:
        return pack_words(values.reshape(len(values), -1, 8)[:, :, _AWQ_ORDER].flatten(1), 4)

    return {
        "qweight": columns(codes.codes.T.contiguous()),
        "qzeros": columns(codes.zeros.T.contiguous()),
        "scales": codes.scales.T.half().contiguous(),
    }


def _gptq(codes: Codes, grid: Grid) -> dict[str, Tensor]:
    return {
        "qweight": pack_words(codes.codes, grid.bits).T.contiguous(),
        "qzeros": pack_words((codes.zeros - 1).T.contiguous(), grid.bits),
        "scales": codes.scales.T.half().contiguous(),
        "g_idx": codes.group_of.int(),
    }


def _compressed_tensors(codes: Codes, grid: Grid) -> dict[str, Tensor]:
    tensors = {
        "weight_packed": pack_words(codes.codes, grid.bits),
        "weight_scale": codes.scales.half(),
        "weight_shape": torch.tensor(codes.codes.shape),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = pack_words(codes.zeros.T.contiguous(), grid.bits).T.contiguous()
    return tensors


def _awq_config(grid: Grid, order: str) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "zero_point": True,
        "modules_to_not_convert": None,
    }


def _gptq_config(grid: Grid, order: str) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "desc_act": order == "desc",
        "static_groups": order == "static",
        "sym": grid.symmetric,
        "true_sequential": True,
        "lm_head": False,
    }


def _compressed_tensors_config(grid: Grid, order: str) -> dict[str, Any]:
    whole = grid.group_size == WHOLE_ROW
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else grid.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
        "observer_kwargs": {},
        "block_structure": None,
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


LAYOUTS: Mapping[str, Layout] = {
    "awq": Layout((4,), _awq, _awq_config, False, ("none", "static"), (False,)),
    "gptq": Layout((2, 4, 8), _gptq, _gptq_config, True, ("none", "static", "desc")),
    "compressed-tensors": Layout((4, 8), _compressed_tensors, _compressed_tensors_config, True, ("none", "static")),
}


def usual_layout(method: str, bits: int) -> str:
    """The layout that other engines expect of a method, and one that holds the bits."""
    return {"awq": "awq", "gptq": "gptq"}.get(method, "gptq" if bits == 2 else "compressed-tensors")


def check_layout(name: str, grid: Grid, order: str) -> None:
    """ConfigError naming what this layout cannot hold."""
    layout = LAYOUTS.get(name)
    if layout is None:
        raise ConfigError(f"layout {name!r} is not known; use {', '.join(LAYOUTS)}", param="layout")
    if grid.bits not in layout.bits:
        held = ", ".join(map(str, layout.bits))
        raise ConfigError(f"layout {name!r} does not hold {grid.bits} bits here; it holds {held}", param="bits")
    if grid.symmetric not in layout.symmetric:
        raise ConfigError(f"layout {name!r} is for asymmetric grids (with zeros)", param="symmetric")
    if grid.group_size == WHOLE_ROW and not layout.whole_rows:
        raise ConfigError(f"layout {name!r} wants a group size of its own, not {WHOLE_ROW}", param="group_size")
    if order not in layout.orders:
        raise ConfigError(f"layout {name!r} cannot hold groups in the order {order!r}", param="act_order")


def check_shape(name: str, shape: tuple[int, ...], grid: Grid) -> None:
    """ConfigError naming the tensor if its rows or columns do not fill whole 32-bit words or groups."""
    grid.check(name, shape)
    per_word = 32 // grid.bits
    for axis, size in (("outputs", shape[0]), ("inputs", shape[1])):
        if size % per_word:
            raise ConfigError(f"tensor {name!r} has {size} {axis}, not a multiple of the {per_word} codes of a word")
