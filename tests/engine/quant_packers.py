"""Checkpoints in every layout, packed bit by bit from descriptions of the layouts and from none of the engine's code.

A `Grid` is what a packed matrix stands for: whole numbers q [N, K], zeros z [N, G], scales s [N, G], and the group of
each input. Loops over single elements on purpose: slow, and readable beside the description of a layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Grid:
    bits: int
    q: Ints
    z: Ints
    s: NDArray[np.float16]
    group_of: Ints

    def weight(self) -> Tensor:
        """float32 [N, K]: (q - z) * s, the difference exact."""
        difference = (self.q - self.z[:, self.group_of]).astype(np.float32)
        return torch.from_numpy(difference * self.s[:, self.group_of].astype(np.float32))


def random_grid(
    rng: np.random.Generator,
    shape: tuple[int, int],
    bits: int,
    group: int,
    *,
    zeros: bool = True,
    shuffled: bool = False,
) -> Grid:
    """Weights of about the size that a model's have; zeros of 1 and more, as v1 of GPTQ's layout wants them."""
    (rows, columns), top = shape, 2**bits
    count = -(-columns // group)
    group_of = np.arange(columns) // group
    middle = np.full((rows, count), top // 2)
    return Grid(
        bits,
        rng.integers(0, top, (rows, columns)),
        rng.integers(1, top, (rows, count)) if zeros else middle,
        ((rng.random((rows, count)) + 0.5) * 0.8 / top).astype(np.float16),
        rng.permutation(group_of) if shuffled else group_of,
    )


def _words(fields: Ints, bits: int) -> Ints:
    """Each row's numbers one after the other into 32-bit words, the first in the lowest bits."""
    per = 32 // bits
    words = np.zeros((len(fields), -(-fields.shape[1] // per)), dtype=np.uint32)
    for (row, i), field in np.ndenumerate(fields):
        words[row, i // per] |= np.uint32(int(field) << bits * (i % per))
    return words.view(np.int32)


def _torch(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def awq_gemm(grid: Grid) -> dict[str, Tensor]:
    def columns(fields: Ints) -> Tensor:
        words = np.zeros((len(fields), fields.shape[1] // 8), dtype=np.uint32)
        for row in range(len(fields)):
            for c in range(words.shape[1]):
                for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                    words[row, c] |= np.uint32(int(fields[row, 8 * c + column]) << 4 * i)
        return _torch(words.view(np.int32))

    return {"qweight": columns(grid.q.T), "qzeros": columns(grid.z.T), "scales": _torch(grid.s.T)}


def awq_gemv(grid: Grid) -> dict[str, Tensor]:
    rows, groups = grid.z.shape
    width = -(-groups // 8)
    size = len(grid.group_of) // groups
    step = {32: 4, 64: 2}.get(size, 1 if size >= 128 else 4)  # AutoAWQ fills up to what its kernel reads at once
    width = -(-width // step) * step
    zeros, scales = np.zeros((rows, 8 * width), dtype=np.int64), np.zeros((rows, 8 * width), dtype=np.float16)
    zeros[:, :groups], scales[:, :groups] = grid.z, grid.s
    return {"qweight": _torch(_words(grid.q, 4)), "qzeros": _torch(_words(zeros, 4)), "scales": _torch(scales)}


def gptq(grid: Grid, *, version: int, g_idx: bool = True) -> dict[str, Tensor]:
    stored = grid.z - 1 if version == 1 else grid.z
    tensors = {
        "qweight": _torch(_words(grid.q, grid.bits).T),
        "qzeros": _torch(_words(stored.T, grid.bits)),
        "scales": _torch(grid.s.T),
    }
    return tensors | ({"g_idx": _torch(grid.group_of.astype(np.int32))} if g_idx else {})


def pack_quantized(grid: Grid, *, symmetric: bool, g_idx: bool = False) -> dict[str, Tensor]:
    rows, columns = grid.q.shape
    tensors = {
        "weight_packed": _torch(_words(grid.q, grid.bits)),
        "weight_scale": _torch(grid.s),
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = _torch(_words(grid.z.T, grid.bits).T)
    return tensors | ({"weight_g_idx": _torch(grid.group_of.astype(np.int32))} if g_idx else {})


def int_quantized(grid: Grid) -> dict[str, Tensor]:
    return {"weight": _torch((grid.q - 128).astype(np.int8)), "weight_scale": _torch(grid.s)}


def compressed_config(bits: int, group: int | None, *, symmetric: bool, form: str, **weights: Any) -> dict[str, Any]:
    described = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "dynamic": False,
        **weights,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": described, "input_activations": None}},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Layout:
    """config: quantization_config. pack(grid): tensors by suffix. grid(rng, rows, columns): a matrix it can hold."""

    config: dict[str, Any]
    pack: Callable[[Grid], dict[str, Tensor]]
    bits: int = 4
    group: int = 16
    zeros: bool = True
    shuffled: bool = False

    def grid(self, rng: np.random.Generator, rows: int, columns: int) -> Grid:
        group = columns if self.group == -1 else self.group
        return random_grid(rng, (rows, columns), self.bits, group, zeros=self.zeros, shuffled=self.shuffled)


def _gptq_layout(bits: int, group: int, version: int, desc_act: bool) -> Layout:
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": desc_act,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    return Layout(config, lambda grid: gptq(grid, version=version), bits, group, shuffled=desc_act)


def auto_round_config(bits: int, form: str, *, symmetric: bool, **more: Any) -> dict[str, Any]:
    """The keys that its version 0.16.1 writes."""
    return {
        "autoround_version": "0.16.1",
        "bits": bits,
        "block_name_to_quantize": "model.layers",
        "data_type": "int",
        "enable_quanted_input": False,
        "group_size": 16,
        "packing_format": form,
        "quant_method": "auto-round",
        "sym": symmetric,
        **more,
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True}
LAYOUTS = {
    "awq gemm": Layout({**_AWQ, "version": "gemm"}, awq_gemm),
    "awq gemm, symmetric": Layout({**_AWQ, "version": "gemm", "zero_point": False}, awq_gemm, zeros=False),
    "awq gemv": Layout({**_AWQ, "version": "gemv"}, awq_gemv),
    "gptq v1": _gptq_layout(4, 16, 1, False),
    "gptq v2": _gptq_layout(4, 16, 2, False),
    "gptq v1 desc_act": _gptq_layout(4, 16, 1, True),
    "gptq v2 desc_act": _gptq_layout(4, 16, 2, True),
    "gptq whole rows": _gptq_layout(4, -1, 1, False),
    "gptq 8 bits": _gptq_layout(8, 16, 1, False),
    "gptq 2 bits": _gptq_layout(2, 16, 1, False),
    "auto-round as gptq": Layout(
        auto_round_config(4, "auto_round:auto_gptq", symmetric=True),
        lambda grid: gptq(grid, version=1, g_idx=False),
        zeros=False,
    ),
    "auto-round": Layout(
        auto_round_config(2, "auto_round", symmetric=False), lambda grid: gptq(grid, version=2, g_idx=False), bits=2
    ),
    "auto-round as awq": Layout(auto_round_config(4, "auto_round:auto_awq", symmetric=False), awq_gemm),
    "pack-quantized": Layout(
        compressed_config(4, 16, symmetric=True, form="pack-quantized"),
        lambda grid: pack_quantized(grid, symmetric=True),
        zeros=False,
    ),
    "pack-quantized with zeros": Layout(
        compressed_config(4, 16, symmetric=False, form="pack-quantized"),
        lambda grid: pack_quantized(grid, symmetric=False),
    ),
    "pack-quantized by activation order": Layout(
        compressed_config(4, 16, symmetric=True, form="pack-quantized", actorder="group"),
        lambda grid: pack_quantized(grid, symmetric=True, g_idx=True),
        zeros=False,
        shuffled=True,
    ),
    "INT8 per channel": Layout(
        compressed_config(8, None, symmetric=True, form="int-quantized"), int_quantized, 8, -1, zeros=False
    ),
    "INT8 per group": Layout(
        compressed_config(8, 16, symmetric=True, form="int-quantized"), int_quantized, 8, 16, zeros=False
    ),
}


def write_quantized(source: Path, out: Path, layout: Layout, seed: int = 0) -> dict[str, Tensor]:
    """`source`, a folder in full precision, with its projections replaced by random ones in `layout`; what they
    stand for, by tensor name."""
    rng = np.random.default_rng(seed)
    out.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": layout.config}))
    tensors, weights, orders = load_file(source / "model.safetensors"), {}, {}
    for name in [name for name in tensors if name.split(".")[-2] in PROJECTIONS]:
        rows, columns = tensors.pop(name).shape
        grid = layout.grid(rng, rows, columns)
        if layout.shuffled:  # layers that read one input share its order
            key = (name.split(".")[2], name.split(".")[3], columns)
            grid = Grid(grid.bits, grid.q, grid.z, grid.s, orders.setdefault(key, grid.group_of))
        weights[name] = grid.weight()
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in layout.pack(grid).items()}
    save_file(tensors, out / "model.safetensors")
    return weights
