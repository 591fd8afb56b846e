"""Linear layers on the C++ kernels: CPU, float32 activations, weights in float32 or as codes of 2, 4 or 8 bits.

Both kinds lie in panels that serve one row at memory speed and many at GEMM speed (gemm.cpp, codes.h). A row's result
has the same bits whatever other rows are in the call, and a quantised weight's those of its dequantised matrix.
"""

from __future__ import annotations

import ctypes
import logging

import torch
from torch import Tensor

from replicas.engine.host_memory import Arena
from replicas.engine.native.library import NUMBER_KINDS, Library, LinearWeights, WeightCodes
from replicas.engine.quantized.packing import pack_bytes
from replicas.engine.quantized.weight import QuantizedWeight

logger = logging.getLogger(__name__)


class NativeLinear:
    """weights: what the kernels are told, pointing into `held`. nbytes: of the weight, without what fills up panels."""

    def __init__(self, library: Library, weights: LinearWeights, held: tuple[object, ...], nbytes: int) -> None:
        self.out_features, self.in_features, self.nbytes = weights.n, weights.k, nbytes
        self._library, self._linear = library, library.linear
        self._weights, self._held = weights, held
        self._pointer = ctypes.pointer(weights)
        self.address = ctypes.addressof(weights)  # of the kernels' `Linear`, valid while this object lives

    def __call__(self, x: Tensor) -> Tensor:
        rows, width = x.shape
        assert width == self.in_features, f"input has {width} columns, the weight takes {self.in_features}"
        assert x.dtype is torch.float32, f"native kernels compute in float32, got {x.dtype}"
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty((rows, self.out_features))
        self._linear(self._pointer, x.data_ptr(), x.stride(0), y.data_ptr(), rows, torch.get_num_threads())
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the weight, ids int64 [T] -> [T, K]: the embedding that a tied head shares, without a second copy."""
        ids = ids.contiguous()
        assert ids.dtype is torch.int64, f"row ids are int64, got {ids.dtype}"
        out = torch.empty((ids.numel(), self.in_features))
        if ids.numel():
            low, high = ids.aminmax()
            assert 0 <= int(low) <= int(high) < self.out_features, f"row ids reach {int(low)}..{int(high)}"
            self._library.unpack_rows(self._pointer, ids.data_ptr(), ids.numel(), out.data_ptr())
        return out


def dense_linear(library: Library, arena: Arena, weight: Tensor, bias: Tensor | None) -> NativeLinear:
    """weight float32 [N, K]; only the packed copy is kept."""
    weight = weight.detach().contiguous()
    assert weight.dtype is torch.float32, f"native kernels compute in float32, got {weight.dtype}"
    rows, columns = weight.shape
    packed = arena.floats(_padded(rows, library) * columns)
    library.pack(weight.data_ptr(), columns, rows, columns, packed.data_ptr(), torch.get_num_threads())
    padded_bias = _bias(bias, rows, library)
    weights = LinearWeights(packed.data_ptr(), _address(padded_bias), rows, columns, None)
    return NativeLinear(library, weights, (packed, padded_bias), weight.nbytes)


def quantized_linear(library: Library, arena: Arena, weight: QuantizedWeight, bias: Tensor | None) -> NativeLinear:
    """The weight as codes; in float32 where its groups do not divide into whole words."""
    rows, columns = weight.shape
    group = min(weight.group_size, columns)
    bits = next((bits for bits in (weight.bits, 8) if columns % (32 // bits) == group % (32 // bits) == 0), None)
    if bits is None:
        logger.warning("a weight of %d inputs in groups of %d is held in float32", columns, group)
        return dense_linear(library, arena, weight.dequantise(), bias)
    panel, padded = library.panel, _padded(rows, library)

    def lay(numbers: Tensor) -> Tensor:
        """[N, C] -> [panels][C][panel] in the arena."""
        full = torch.nn.functional.pad(numbers, (0, 0, 0, padded - rows))
        held = arena.floats(-(-full.nbytes // 4)).view(numbers.dtype)[: full.numel()]
        held.view(padded // panel, -1, panel).copy_(full.view(padded // panel, panel, -1).transpose(1, 2))
        return held

    words, scales = lay(pack_bytes(weight.codes, bits).view(torch.int32)), lay(weight.scales)
    if weight.mins is not None:
        assert weight.mins.dtype is not torch.float32, "mins of 32 bits are not rounded as dequantise() does"
    given = weight.zeros if weight.zeros is not None else weight.mins
    if given is None and bits != weight.bits:  # the middle is that of the narrower codes
        given = torch.full_like(weight.scales, 2 ** (weight.bits - 1), dtype=torch.uint8)
    origins = None if given is None else lay(given)
    order = None if weight.order is None else weight.order.clone()
    codes = WeightCodes(
        *(_address(tensor) for tensor in (words, scales, origins, order)),
        *(group, bits, NUMBER_KINDS.index(scales.dtype), 0 if origins is None else NUMBER_KINDS.index(origins.dtype)),
    )
    padded_bias = _bias(bias, rows, library)
    weights = LinearWeights(None, _address(padded_bias), rows, columns, ctypes.addressof(codes))
    nbytes = sum(tensor.nbytes for tensor in (words, scales, origins, order) if tensor is not None)
    return NativeLinear(library, weights, (words, scales, origins, order, codes, padded_bias), nbytes)


def _padded(rows: int, library: Library) -> int:
    return -(-rows // library.panel) * library.panel


def _bias(bias: Tensor | None, rows: int, library: Library) -> Tensor | None:
    if bias is None:
        return None
    padded = torch.zeros(_padded(rows, library))
    padded[:rows] = bias.detach()
    return padded


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
