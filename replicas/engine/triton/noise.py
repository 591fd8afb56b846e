"""The sampler's noise in plain numpy and float64: what `kernels/sampling.py` is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 10
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

    counter [4, ...], key [2, ...]: 32-bit words in uint64, to be broadcast together. Returns as many words as `counter`
    has.
    """
    shape = np.broadcast_shapes(counter.shape[1:], key.shape[1:])
    a, b, c, d = (np.broadcast_to(word, shape) for word in counter)
    low, high = key
    for _ in range(_ROUNDS):
        first, third = a * np.uint64(_FACTORS[0]), c * np.uint64(_FACTORS[1])
        a, b, c, d = third >> np.uint64(32) ^ b ^ low, third & _LOW, first >> np.uint64(32) ^ d ^ high, first & _LOW
        low, high = low + np.uint64(_WEYL[0]) & _LOW, high + np.uint64(_WEYL[1]) & _LOW
    return np.stack([a, b, c, d])


def gumbel(keys: NDArray[Any], token_ids: NDArray[Any]) -> NDArray[np.float64]:
    """Noise of tokens of rows. keys: 64-bit [R], of any signedness; token_ids: [R, N] or [N]. Returns [R, N]."""
    key, ids = keys.astype(np.uint64)[:, None], np.broadcast_to(token_ids, (len(keys), token_ids.shape[-1]))
    block = (ids // 4).astype(np.uint64)
    zero = np.zeros_like(block)
    words = philox(np.stack([block, zero, zero, zero]), np.stack([key & _LOW, key >> np.uint64(32)]))
    word = np.take_along_axis(words, (ids % 4)[None], axis=0)[0].astype(np.float64)
    noise: NDArray[np.float64] = -np.log(-np.log1p(-(word + 0.5) / 2.0**32))
    return noise
