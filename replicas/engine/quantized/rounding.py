"""Round-to-nearest at load: a full-precision matrix in 8 bits, without calibration.

One scale per output row, symmetric: s = max|w| / 127, q = round(w / s).
"""

from __future__ import annotations

import torch
from torch import Tensor

from replicas.engine.quantized.weight import QuantizedWeight

_LEAST_HALF = 2.0**-14  # the least normal float16: below it scales would lose precision


def int8(weight: Tensor) -> QuantizedWeight:
    """weight [N, K], any float type."""
    wide = weight.float()
    scales = _storable(wide.abs().amax(dim=1, keepdim=True) / 127)
    codes = (wide / scales.float()).round().clamp(-127, 127) + 128
    return QuantizedWeight(8, wide.shape[1], codes.to(torch.uint8), scales)


def _storable(scales: Tensor) -> Tensor:
    """In 16 bits where all of them are normal there, 1 for all-zero weights; else in float32."""
    scales = torch.where(scales > 0, scales, torch.ones(()))
    fits = bool((scales >= _LEAST_HALF).all()) and bool((scales <= 65504).all())
    return scales.half() if fits else scales
