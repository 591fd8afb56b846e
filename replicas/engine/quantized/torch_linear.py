"""The linear layer on a quantised weight with torch: the reference, and what runs where no kernel does.

Codes are held packed; each call dequantises the matrix to the type of x. That is slow, but memory stays small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.quantized.packing import pack_bytes, unpack_bytes
from replicas.engine.quantized.weight import QuantizedWeight


class TorchQuantizedLinear:
    """y = x @ weight.T (+ bias); tensors lie on the device that computes. See `replicas.engine.ops.Linear`."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        self._bits, self._group_size, self._columns = weight.bits, weight.group_size, weight.shape[1]
        self._packed = pack_bytes(weight.codes, weight.bits)
        self._scales, self._zeros, self._mins, self._order = weight.scales, weight.zeros, weight.mins, weight.order
        self._bias = bias
        held = (self._packed, self._scales, self._zeros, self._mins, self._order)
        self.nbytes = sum(tensor.nbytes for tensor in held if tensor is not None)

    def __call__(self, x: Tensor) -> Tensor:
        weight = self._weight(self._packed, self._scales, self._zeros, self._mins).dequantise()
        return torch.nn.functional.linear(x, weight.to(x.dtype), self._bias)

    def rows(self, ids: Tensor) -> Tensor:
        zeros = None if self._zeros is None else self._zeros[ids]
        mins = None if self._mins is None else self._mins[ids]
        return self._weight(self._packed[ids], self._scales[ids], zeros, mins).dequantise()

    def _weight(self, packed: Tensor, scales: Tensor, zeros: Tensor | None, mins: Tensor | None) -> QuantizedWeight:
        codes = unpack_bytes(packed, self._bits, self._columns)
        return QuantizedWeight(self._bits, self._group_size, codes, scales, zeros, mins, self._order)
