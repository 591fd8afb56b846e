"""The C interface of the kernels as ctypes sees it: one declaration per function, checked at load."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

# `Kind` in kernels.h.
NUMBER_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int16)


def pointer(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Where a contiguous tensor of `dtype` lies; AssertionError naming it if it is not one."""
    assert tensor.dtype is dtype, f"{name} must be {dtype}, got {tensor.dtype}"
    assert tensor.is_contiguous(), f"{name} must be contiguous"
    return tensor.data_ptr()


class LinearWeights(ctypes.Structure):
    """`Linear` in kernels.h. packed: ceil(n / panel) panels of [k][panel], or None where codes is the address of a
    WeightCodes; bias: padded to whole panels, or None."""

    _fields_ = (("packed", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64), ("codes", c_void_p))


class WeightCodes(ctypes.Structure):
    """`Codes` in kernels.h; kinds are indices into NUMBER_KINDS."""

    _fields_ = (
        *((name, c_void_p) for name in ("words", "scales", "origins", "order")),
        ("group", c_int64),
        *((name, c_int32) for name in ("bits", "scale_kind", "origin_kind")),
    )


class AttentionBatch(ctypes.Structure):
    """`Batch` in kernels.h: pointers into a StepBatch."""

    _fields_ = (
        ("slot_mapping", c_void_p),
        ("query_start", c_void_p),
        ("context_lens", c_void_p),
        ("block_tables", c_void_p),
        ("block_table_ld", c_int64),
        ("sequences", c_int64),
        ("tokens", c_int64),
    )


class AttentionShape(ctypes.Structure):
    """`Shape` in kernels.h; window 0 means none, strides are in numbers of what is stored."""

    _fields_ = (
        ("block_size", c_int64),
        ("block_stride", c_int64),
        ("scale_stride", c_int64),
        ("q_heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("threads", c_int),
        ("format", c_int),
    )


class CachePointers(ctypes.Structure):
    """`Cache` in kernels.h; scales are None where keys and values are float32."""

    _fields_ = tuple((name, c_void_p) for name in ("keys", "values", "key_scales", "value_scales"))


class StackLayer(ctypes.Structure):
    """`Layer` in kernels.h; q_norm and k_norm may be None, window 0 means none."""

    _fields_ = (
        *((name, c_void_p) for name in ("input_norm", "q_norm", "k_norm", "post_norm")),
        *((name, c_void_p) for name in ("qkv", "o", "gate_up", "down")),
        *(("cache", CachePointers), ("window", c_int64)),
    )


class StackWeights(ctypes.Structure):
    """`Stack` in kernels.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("layers", "final_norm", "cos_sin")),
        *((name, c_int64) for name in ("num_layers", "hidden", "inner")),
        ("eps", c_float),
    )


class ChainParts(ctypes.Structure):
    """`Chain` in chain.cpp; one of embedding and table is None."""

    _fields_ = tuple((name, c_void_p) for name in ("stack", "fuse", "head", "embedding", "table", "targets"))


class Library:
    """Typed entry points of one built library.

    Long kernels are called without the interpreter lock. Those that take microseconds keep it: giving it up could cost
    a whole switch interval (5 ms) whenever another thread is computing in Python.
    """

    def __init__(self, path: Path) -> None:
        long, short = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        short.sb_keep_freed_memory()
        self.path = path
        self.panel: int = short.sb_panel()  # columns of one packed panel
        self.pack = long.sb_pack
        self.pack.argtypes = (c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int)
        self.linear = long.sb_linear
        self.linear.argtypes = (POINTER(LinearWeights), c_void_p, c_int64, c_void_p, c_int64, c_int)
        self.unpack_rows = short.sb_unpack_rows
        self.unpack_rows.argtypes = (POINTER(LinearWeights), c_void_p, c_int64, c_void_p)
        self.attention = long.sb_attention
        self.attention.argtypes = (
            *(POINTER(AttentionBatch), POINTER(AttentionShape)),
            *(c_void_p, c_int64, c_int64) * 3,
            *(POINTER(CachePointers), c_void_p),
        )
        self.stack = long.sb_stack
        self.stack.argtypes = (
            *(POINTER(StackWeights), POINTER(AttentionBatch), POINTER(AttentionShape)),
            *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p),
        )
        self.chain = long.sb_chain
        self.chain.argtypes = (
            *(POINTER(ChainParts), POINTER(AttentionBatch), POINTER(AttentionShape)),
            *(c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
        )
        self.rms_norm = short.sb_rms_norm
        self.rms_norm.argtypes = (c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int64, c_void_p, c_int)
        self.rope = short.sb_rope
        self.rope.argtypes = (*(c_void_p, c_int64, c_int64, c_int64) * 2, c_void_p, c_void_p, c_int64, c_int64, c_int)
        self.silu_mul = short.sb_silu_mul
        self.silu_mul.argtypes = (c_void_p, c_int64, c_int64, c_void_p, c_int)
        for function in (
            self.pack,
            self.linear,
            self.unpack_rows,
            self.attention,
            self.stack,
            self.chain,
            self.rms_norm,
            self.rope,
            self.silu_mul,
        ):
            function.restype = None
