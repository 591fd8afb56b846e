"""Products with weights of 2, 4 or 8 bits. `replicas.engine.triton.quant` packs them and chooses among the kernels.

Codes lie in the order in which a tensor core takes the left operand of a product, so that a thread's load is its
operand and nothing has to move between threads on the way (as Marlin does it: Frantar et al. 2024, arXiv:2408.11743).
Products are therefore turned: [outputs, inputs] x [inputs, rows].

A *unit* is 64 outputs x UNIT inputs (UNIT = 256 / BITS), 2 KiB in one piece: 16 bytes for each of 128 threads, that is
4 words of two halves of 16 bits. Places in a half, from its low bits up, are p = 0, 1, … 16 / BITS - 1:

    thread = warp * 32 + g * 4 + t      output = warp * 16 + (p % 2) * 8 + g
    word w of 0..3, half h of 0..1      input  = (w * (8 / BITS) + p // 2) * 8 + t * 2 + h

Units of the same outputs follow each other. scales and origins are [groups, N]. ORIGIN 0: a code stands for
scale * (code - 2^(BITS - 1)). 1, zero points: scale * (code - zero). 2, minima: min + scale * code.
"""

import triton
import triton.language as tl

from replicas.engine.triton.kernels.early import fetch, wait_for_others


@triton.constexpr_function
def _places_as_floats(bits, place):
    """PTX: from two halves in a register, 2^23 + code of each, as the bits of float32."""
    if bits == 8:
        return f"prmt.b32 $0, $2, 0x4B000000, 0x754{place}; prmt.b32 $1, $2, 0x4B000000, 0x754{place + 2};"
    mask, shift = (1 << bits) - 1, bits * place
    return (
        "{ .reg .b32 low, high; "
        f"shr.b32 low, $2, {shift}; lop3.b32 $0, low, {mask}, 0x4B000000, 0xEA; "
        f"shr.b32 high, $2, {shift + 16}; lop3.b32 $1, high, {mask}, 0x4B000000, 0xEA; }}"
    )


@triton.constexpr_function
def _places_as_halves(bits, place, one):
    """PTX: the same in 16 bits: `one` are those of the number to which a code is added."""
    mask = ((1 << bits) - 1) * 0x10001
    return f"{{ .reg .b32 at; shr.b32 at, $1, {bits * place}; lop3.b32 $0, at, {mask}, {one * 0x10001}, 0xEA; }}"


@triton.jit
def _place(halves, PLACE: tl.constexpr, BITS: tl.constexpr, NUMBER: tl.constexpr, ASM: tl.constexpr):
    """One place of all halves: code + `_above(NUMBER)`, exactly, without a conversion of integers.

    Two halves of a register are taken apart at once (ASM); the interpreter computes the same one by one.
    """
    MASK: tl.constexpr = (1 << BITS) - 1
    if NUMBER == tl.float32:
        if ASM:
            bits = tl.inline_asm_elementwise(
                _places_as_floats(BITS, PLACE), "=&r,=&r,r", [halves], dtype=tl.int32, is_pure=True, pack=2
            )
        else:
            bits = ((halves.to(tl.int32) >> (BITS * PLACE)) & MASK) | 0x4B000000
        return bits.to(tl.float32, bitcast=True)
    else:
        ONE: tl.constexpr = 0x4300 if NUMBER == tl.bfloat16 else 0x6400
        if ASM:
            bits = tl.inline_asm_elementwise(
                _places_as_halves(BITS, PLACE, ONE), "=r,r", [halves], dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            bits = (((halves >> (BITS * PLACE)) & MASK) | ONE).to(tl.int16)
        return bits.to(NUMBER, bitcast=True)


@triton.constexpr_function
def _above(number):
    """What `_place` adds to a code: the least power of two whose numbers are a step of 1 or finer apart."""
    return {"bf16": 128.0, "fp16": 1024.0, "fp32": 8388608.0}[str(number)]


@triton.jit
def _codes(halves, BITS: tl.constexpr, NUMBER: tl.constexpr, ASM: tl.constexpr):
    """halves int16 [TILES, UNITS, 1024] -> [64 TILES, UNITS * UNIT] of NUMBER: codes + `_above(NUMBER)`."""
    TILES: tl.constexpr = halves.shape[0]
    UNITS: tl.constexpr = halves.shape[1]
    KEPT: tl.constexpr = UNITS * 256 // BITS
    h = tl.reshape(halves, (TILES, UNITS, 4, 8, 4, 4, 2))
    two = tl.join(_place(h, 0, BITS, NUMBER, ASM), _place(h, 1, BITS, NUMBER, ASM))
    if BITS == 8:
        ordered = tl.permute(two, (0, 2, 7, 3, 1, 5, 4, 6))
    else:
        four = tl.join(two, tl.join(_place(h, 2, BITS, NUMBER, ASM), _place(h, 3, BITS, NUMBER, ASM)))
        if BITS == 4:
            ordered = tl.permute(four, (0, 2, 7, 3, 1, 5, 8, 4, 6))
        else:
            last = tl.join(
                tl.join(_place(h, 4, BITS, NUMBER, ASM), _place(h, 5, BITS, NUMBER, ASM)),
                tl.join(_place(h, 6, BITS, NUMBER, ASM), _place(h, 7, BITS, NUMBER, ASM)),
            )
            ordered = tl.permute(tl.join(four, last), (0, 2, 7, 3, 1, 5, 9, 8, 4, 6))
    return tl.reshape(ordered, (64 * TILES, KEPT))


@triton.jit
def _load(codes, first_tile, first_unit, units, UNITS: tl.constexpr, TILES: tl.constexpr):
    """int16 [TILES, UNITS, 1024] from unit `first_unit` of each tile, of which each has `units`."""
    tile = (first_tile + tl.arange(0, TILES)).to(tl.int64)[:, None, None]
    unit = (first_unit + tl.arange(0, UNITS))[None, :, None]
    return tl.load(codes + (tile * units + unit) * 1024 + tl.arange(0, 1024)[None, None, :])


@triton.jit
def _fetch_first(codes, first_tile, first_unit, units, UNITS: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr):
    """Have the first four steps' codes on their way before anything else can be done."""
    tile = (first_tile + tl.arange(0, TILES)).to(tl.int64)[:, None]
    # Lines of 64 halves, none behind the tile's last.
    line = tl.minimum(first_unit * 1024 + tl.arange(0, 64 * UNITS)[None, :] * 64, units * 1024 - 64)
    fetch(codes + tile * units * 1024 + line, EARLY)


@triton.jit
def _weights(
    halves,
    scales,
    origins,
    n,
    first,
    N,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGIN: tl.constexpr,
    SCALED: tl.constexpr,
    KEPT: tl.constexpr,
    NUMBER: tl.constexpr,
    ASM: tl.constexpr,
):
    """What the codes of inputs first..first + KEPT - 1 and outputs n stand for, [len(n), KEPT]; not yet multiplied by
    their scale unless SCALED, for which all of them must be of one group. GROUP 0: there is one group in all."""
    OUTPUTS: tl.constexpr = n.shape[0]
    EACH: tl.constexpr = KEPT if GROUP == 0 or GROUP > KEPT else GROUP
    MANY: tl.constexpr = KEPT // EACH
    # One number for all of a group's inputs; numbers of 16 bits differ from codes by less than they can tell apart.
    code = tl.reshape(_codes(halves, BITS, NUMBER, ASM), (OUTPUTS, MANY, EACH))
    group = tl.arange(0, MANY)
    if GROUP != 0:
        group = tl.minimum(first // GROUP + group, groups - 1)
    at = group[None, :] * N + n[:, None]
    there = n[:, None] < N
    above = tl.full([1, 1], _above(NUMBER), tl.float32)
    if ORIGIN == 0:
        above += 1 << (BITS - 1)
    elif ORIGIN == 1:
        above += tl.load(origins + at, mask=there, other=0).to(tl.float32)
    weights = code - above.to(NUMBER)[:, :, None]
    if SCALED:
        scale = tl.load(scales + at, mask=there, other=0).to(tl.float32)
        weights = weights.to(tl.float32) * scale[:, :, None]
        if ORIGIN == 2:
            weights += tl.load(origins + at, mask=there, other=0).to(tl.float32)[:, :, None]
    return tl.reshape(weights, (OUTPUTS, KEPT))


@triton.jit
def _inputs(x, m, first, x_stride, rows, K, COUNT: tl.constexpr, WHOLE: tl.constexpr, DOT: tl.constexpr):
    """[COUNT, len(m)] from input `first` on."""
    k = first + tl.arange(0, COUNT)
    there = (m < rows)[None, :]
    if not WHOLE:
        there = there & (k < K)[:, None]
    return tl.load(x + m.to(tl.int64)[None, :] * x_stride + k[:, None], mask=there, other=0.0).to(DOT)


@triton.jit
def _scale(scales, n, first, N, groups, GROUP: tl.constexpr):
    """float32 [len(n)] of the group that input `first` is in."""
    group = 0
    if GROUP != 0:
        group = tl.minimum(first // GROUP, groups - 1)
    return tl.load(scales + group * N + n, mask=n < N, other=0).to(tl.float32)


@triton.jit
def _finish(acc, bias, parts, counters, out, n, m, rows, N, BIASED: tl.constexpr, SPLITS: tl.constexpr):
    """Write acc [outputs n, rows m]. With SPLITS every program leaves its part, and the last one to come adds all up,
    always in the same order, and sets the counter back."""
    # Parts that are read at once, in as many registers as there are.
    TOGETHER: tl.constexpr = max(1, min(SPLITS, 8192 // (n.shape[0] * m.shape[0])))
    inside = (n < N)[:, None] & (m < rows)[None, :]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    last = True
    if SPLITS > 1:
        each = tl.cast(rows, tl.int64) * N
        counter = counters + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(parts + tl.program_id(2) * each + at, acc, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        if last:
            acc = tl.zeros_like(acc)
            for first in range(0, SPLITS, TOGETHER):
                for more in tl.static_range(TOGETHER):
                    # Not from the multiprocessor's own cache: others wrote this.
                    part = parts + (first + more) * each + at
                    acc += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if last:
        if BIASED:
            acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def some_rows(
    x,
    codes,
    scales,
    origins,
    bias,
    parts,
    counters,
    out,
    x_stride,
    rows,
    N,
    K,
    units,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGIN: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    UNITS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DOT: tl.constexpr,
    NUMBER: tl.constexpr,
    PRECISION: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (rows / BLOCK_M, N / (64 TILES), SPLITS): x [rows, K] -> out [rows, N], on tensor cores. Programs that read
    the same weights are neighbours.

    UNITS units are taken at once. SCALED: weights are multiplied by their scales, in float32; else each group's sums
    are, of which there may be two at once. WHOLE: K is what the units hold.
    """
    KEPT: tl.constexpr = UNITS * 256 // BITS
    first_tile = tl.program_id(1) * TILES
    n = first_tile * 64 + tl.arange(0, 64 * TILES)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros([64 * TILES, BLOCK_M], dtype=tl.float32)
    steps = units // UNITS
    share = tl.cdiv(steps, SPLITS)
    first_step = tl.program_id(2) * share
    _fetch_first(codes, first_tile, first_step * UNITS, units, UNITS, TILES, EARLY)
    wait_for_others(EARLY)
    for step in range(first_step, tl.minimum(first_step + share, steps)):
        halves = _load(codes, first_tile, step * UNITS, units, UNITS, TILES)
        first = step * KEPT
        weights = _weights(
            halves, scales, origins, n, first, N, groups, BITS, GROUP, ORIGIN, SCALED, KEPT, NUMBER, ASM
        ).to(DOT)
        if SCALED:
            xs = _inputs(x, m, first, x_stride, rows, K, KEPT, WHOLE, DOT)
            acc = tl.dot(weights, xs, acc, input_precision=PRECISION)
        elif GROUP == 0 or GROUP >= KEPT:
            xs = _inputs(x, m, first, x_stride, rows, K, KEPT, WHOLE, DOT)
            sums = tl.dot(weights, xs, input_precision=PRECISION)
            acc += sums * _scale(scales, n, first, N, groups, GROUP)[:, None]
        else:  # two groups
            halved = tl.permute(tl.reshape(weights, (64 * TILES, 2, GROUP)), (0, 2, 1))
            low, high = tl.split(halved)
            xs = _inputs(x, m, first, x_stride, rows, K, GROUP, WHOLE, DOT)
            sums = tl.dot(low, xs, input_precision=PRECISION)
            acc += sums * _scale(scales, n, first, N, groups, GROUP)[:, None]
            xs = _inputs(x, m, first + GROUP, x_stride, rows, K, GROUP, WHOLE, DOT)
            sums = tl.dot(high, xs, input_precision=PRECISION)
            acc += sums * _scale(scales, n, first + GROUP, N, groups, GROUP)[:, None]
    _finish(acc, bias, parts, counters, out, n, m, rows, N, BIASED, SPLITS)


@triton.jit(do_not_specialize=["rows"])
def few_rows(
    x,
    codes,
    scales,
    origins,
    bias,
    parts,
    counters,
    out,
    x_stride,
    rows,
    N,
    K,
    units,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGIN: tl.constexpr,
    WHOLE: tl.constexpr,
    BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    UNITS: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid (rows, N / 64, SPLITS): as `some_rows`, in float32 and without tensor cores, a row in each program.

    Every thread adds up its own products and they meet once, at the end.
    """
    KEPT: tl.constexpr = UNITS * 256 // BITS
    row = tl.program_id(0)
    tile = tl.program_id(1)
    n = tile * 64 + tl.arange(0, 64)
    acc = tl.zeros([64, KEPT], dtype=tl.float32)
    steps = units // UNITS
    share = tl.cdiv(steps, SPLITS)
    first_step = tl.program_id(2) * share
    _fetch_first(codes, tile, first_step * UNITS, units, UNITS, 1, EARLY)
    wait_for_others(EARLY)
    for step in range(first_step, tl.minimum(first_step + share, steps)):
        halves = _load(codes, tile, step * UNITS, units, UNITS, 1)
        k = step * KEPT + tl.arange(0, KEPT)
        if WHOLE:
            xs = tl.load(x + row.to(tl.int64) * x_stride + k).to(tl.float32)
        else:
            xs = tl.load(x + row.to(tl.int64) * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        weights = _weights(
            halves, scales, origins, n, step * KEPT, N, groups, BITS, GROUP, ORIGIN, True, KEPT, tl.float32, ASM
        )
        acc += weights * xs[None, :]
    m = row + tl.arange(0, 1)
    _finish(tl.sum(acc, axis=1)[:, None], bias, parts, counters, out, n, m, rows, N, BIASED, SPLITS)


@triton.jit
def dequantise(
    codes,
    scales,
    origins,
    out,
    N,
    K,
    units,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ORIGIN: tl.constexpr,
    UNITS: tl.constexpr,
    ASM: tl.constexpr,
):
    """Grid (N / 64, units / UNITS): the weight [N, K] in out's type."""
    KEPT: tl.constexpr = UNITS * 256 // BITS
    tile = tl.program_id(0)
    first = tl.program_id(1) * KEPT
    n = tile * 64 + tl.arange(0, 64)
    k = first + tl.arange(0, KEPT)
    halves = _load(codes, tile, tl.program_id(1) * UNITS, units, UNITS, 1)
    weights = _weights(halves, scales, origins, n, first, N, groups, BITS, GROUP, ORIGIN, True, KEPT, tl.float32, ASM)
    at = out + n.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(at, weights.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
