"""Products of single rows with weights as they are. Such a product is nothing but reading the weight once."""

import triton
import triton.language as tl

from replicas.engine.triton.kernels.early import fetch, wait_for_others


@triton.jit
def single_rows(
    x,
    weight,
    bias,
    out,
    x_stride,
    N,
    K,
    BIASED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (ceil(N / BLOCK_N), rows): x [rows, K], weight [N, K] contiguous -> out [rows, N], summed in float32.

    Every thread adds up its own products and they meet once, at the end. WHOLE: BLOCK_N divides N and BLOCK_K K.
    """
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    # Lines of 64 numbers of 16 bits, or half as many of 32: the first block's, none behind the weight's last.
    line = tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + tl.minimum(tl.arange(0, BLOCK_K // 64) * 64, K - 1)[None, :]
    fetch(weight + line, EARLY)
    wait_for_others(EARLY)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        at = weight + n.to(tl.int64)[:, None] * K + k[None, :]
        if WHOLE:
            # Read once and never again: it need not push anything else out of the caches.
            weights = tl.load(at, eviction_policy="evict_first")
            xs = tl.load(x + row * x_stride + k)
        else:
            weights = tl.load(at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
            xs = tl.load(x + row * x_stride + k, mask=k < K, other=0.0)
        acc += weights.to(tl.float32) * xs.to(tl.float32)[None, :]
    total = tl.sum(acc, axis=1)
    if BIASED:
        total += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + row * N + n, total.to(out.dtype.element_ty), mask=n < N)
