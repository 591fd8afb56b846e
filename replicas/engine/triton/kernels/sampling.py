"""One token a row by Gumbel's trick: the greatest of logit / temperature + noise is a draw from their softmax.

Gumbel 1954; Maddison et al. 2014 (arXiv:1411.0030). Noise is a function of (row's key, token id) alone: token t takes
word t % 4 of the Philox 4x32-10 block (Salmon et al. 2011) whose key is the row's and whose counter is t // 4.
`replicas/engine/triton/noise.py` is the same in numpy.
"""

import triton
import triton.language as tl


@triton.jit
def gumbel(word):
    """uint32 -> float32 noise of the standard Gumbel distribution, -log(e) with e exponential.

    With x = (word + 1/2) / 2^32, e = -log(1 - x). Tokens win where e is nearly 0, so x must not be lost in 1 - x there:
    below 1/16 the series of log1p; its next term is 2^-24 / 7 of e. The upper half counts its distance from 1, which
    float32 could not tell from 1.
    """
    upper = word >= 0x80000000
    x = (tl.where(upper, word ^ 0xFFFFFFFF, word).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    series = x * (1 + x * (1 / 2 + x * (1 / 3 + x * (1 / 4 + x * (1 / 5 + x * (1 / 6))))))
    exponential = tl.where(upper | (x >= 1 / 16), -tl.log(tl.where(upper, x, 1 - x)), series)
    return -tl.log(exponential)


@triton.jit
def words_of_block(key, block):
    """int32 [N] -> uint32 [N, 4]: of 4 N tokens that lie side by side, in their order."""
    first, second, third, fourth = tl.randint4x(key, block)
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(pairs, [block.shape[0], 4])


@triton.jit
def word_of_token(key, token):
    first, second, third, fourth = tl.randint4x(key, token >> 2)
    at = token & 3
    return tl.where(at < 2, tl.where(at == 0, first, second), tl.where(at == 2, third, fourth))


_SCALARS = ["places", "keys", "sharpness", "floors"]  # read one at a time: where they begin is no reason to recompile


@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=_SCALARS)
def best_of_part(
    logits,
    ids,
    places,
    keys,
    sharpness,
    floors,
    best,
    found,
    width,
    stride,
    tiles,
    LISTED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid (N, parts): program (i, j) looks at `tiles` tiles of row i from the (j * tiles)th on.

    best float32, found int32 [N, parts]: the greatest sum and the first column that has it. Row i of the N is row
    places[i] of the logits; sharpness[i] is 1 / temperature, or 0: no noise; what is below floors[i] cannot be drawn.
    LISTED: column c of row i is token ids[i, c] with its log probability, at whatever temperature.
    """
    row = tl.program_id(0).to(tl.int64)
    at = row * tl.num_programs(1) + tl.program_id(1)
    start = tl.program_id(1) * tiles * TILE
    key = tl.load(keys + row)
    if LISTED:
        sharp, floor, line = 1.0, float("-inf"), logits + row * stride
    else:
        sharp, floor = tl.load(sharpness + row), tl.load(floors + row)
        line = logits + tl.load(places + row) * stride
    blocks = tl.arange(0, TILE // 4)
    cols = blocks[:, None] * 4 + tl.arange(0, 4)[None, :]
    top = tl.full([TILE // 4, 4], float("-inf"), tl.float32)
    where = start + cols
    for tile in range(tiles):
        first = start + tile * TILE
        mask = first + cols < width
        value = tl.load(line + first + cols, mask=mask, other=float("-inf")).to(tl.float32)
        if sharp > 0:
            if LISTED:
                word = word_of_token(key, tl.load(ids + row * width + first + cols, mask=mask, other=0).to(tl.int32))
            else:
                word = words_of_block(key, first // 4 + blocks)
            value = tl.where(value < floor, float("-inf"), value * sharp + gumbel(word))
        better = value > top  # a later equal does not replace: the first is taken
        top = tl.where(better, value, top)
        where = tl.where(better, first + cols, where)
    greatest = tl.max(tl.max(top, axis=1), axis=0)
    firsts = tl.where(top == greatest, where, 0x7FFFFFFF)
    tl.store(best + at, greatest)
    tl.store(found + at, tl.min(tl.min(firsts, axis=1), axis=0))


@triton.jit(do_not_specialize=["parts", "width"], do_not_specialize_on_alignment=["places"])
def best_of_row(ids, places, best, found, out, parts, width, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (N,): the first of the greatest of a row's parts, to out[places[i]]; LISTED: its token id, to out[i]."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, parts, BLOCK):
        mask = start + lanes < parts
        value = tl.load(best + row * parts + start + lanes, mask=mask, other=float("-inf"))
        column = tl.load(found + row * parts + start + lanes, mask=mask, other=0x7FFFFFFF)
        better = (value > top) | ((value == top) & (column < where))
        top = tl.where(better, value, top)
        where = tl.where(better, column, where)
    greatest = tl.max(top, axis=0)
    column = tl.min(tl.where(top == greatest, where, 0x7FFFFFFF), axis=0)
    if LISTED:
        tl.store(out + row, tl.load(ids + row * width + column))
    else:
        tl.store(out + tl.load(places + row), column.to(tl.int64))


@triton.jit
def _ordered(value):
    """float32 -> uint32 in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)


@triton.jit
def _least(line, width, floor, peak, sharp, target, COUNTED: tl.constexpr, TILE: tl.constexpr):
    """The least uint32 v for which what lies above v, of logits from `floor` on in `_ordered`, is less than target.

    What lies there is counted, or its softmax mass added up, times that of the greatest, `peak`. Three bits of v are
    found in a walk over the row, so eleven walks find all.
    """
    base = tl.full([], 0, tl.int64)
    pivots = tl.arange(0, 8)
    for walk in range(11):
        step = tl.full([], 1, tl.int64) << (30 - 3 * walk)
        limits = tl.minimum(base + (pivots + 1) * step - 1, 0xFFFFFFFF).to(tl.uint32)
        above = tl.zeros([8, TILE], dtype=tl.float32)
        for first in range(0, width, TILE):
            cols = first + tl.arange(0, TILE)
            value = tl.load(line + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
            order = _ordered(value)
            weight = tl.where(order >= floor, 1.0 if COUNTED else tl.exp((value - peak) * sharp), 0.0)
            weight = tl.where(cols < width, weight, 0.0)
            above += tl.where(order[None, :] > limits[:, None], weight[None, :], 0.0)
        enough = (tl.sum(above, axis=1) >= target) & (pivots < 7)
        base += tl.sum(enough.to(tl.int64), axis=0) * step
    return tl.minimum(base, 0xFFFFFFFF).to(tl.uint32)


@triton.jit(do_not_specialize_on_alignment=["done", "keys", "limits"])
def draw_rest(logits, done, keys, limits, out, width, stride, rows, TILE: tl.constexpr):
    """Grid (N,): for rows that are not done, a token at their temperature, min_p, top_k and top_p, limits [4, N].

    What is drawn from is found by thresholds, in whatever order: tokens with fewer than top_k likelier ones, and of
    those such with less than top_p of the mass before them. Equals are in or out together.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(done + row) == 0:
        line = logits + row * stride
        sharp = 1.0 / tl.load(limits + row)
        min_p = tl.load(limits + rows + row)
        top_k = tl.load(limits + 2 * rows + row)
        top_p = tl.load(limits + 3 * rows + row)
        key = tl.load(keys + row)
        tops = tl.full([TILE], float("-inf"), tl.float32)
        for first in range(0, width, TILE):
            cols = first + tl.arange(0, TILE)
            tops = tl.maximum(tops, tl.load(line + cols, mask=cols < width, other=float("-inf")).to(tl.float32))
        peak = tl.max(tops, axis=0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)  # of nothing but that: inf - inf is no number
        floor = tl.full([], 0, tl.uint32)
        if min_p > 0:
            floor = _ordered(peak + tl.log(min_p) / sharp)
        if top_k < width:
            floor = tl.maximum(floor, _least(line, width, floor, peak, sharp, top_k, True, TILE))
        if top_p < 1:
            mass = tl.zeros([TILE], dtype=tl.float32)
            for first in range(0, width, TILE):
                cols = first + tl.arange(0, TILE)
                value = tl.load(line + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
                mass += tl.where(_ordered(value) >= floor, tl.exp((value - peak) * sharp), 0.0)
            target = top_p * tl.sum(mass, axis=0)
            floor = tl.maximum(floor, _least(line, width, floor, peak, sharp, target, False, TILE))
        floor = tl.minimum(floor, _ordered(tl.max(tops, axis=0)))  # the likeliest always stays
        best = tl.full([TILE], float("-inf"), tl.float32)
        where = tl.full([TILE], 0x7FFFFFFF, tl.int32)
        for first in range(0, width, TILE):
            cols = first + tl.arange(0, TILE)
            value = tl.load(line + cols, mask=cols < width, other=float("-inf")).to(tl.float32)
            noisy = value * sharp + gumbel(word_of_token(key, cols))
            better = (_ordered(value) >= floor) & (cols < width) & (noisy > best)
            best = tl.where(better, noisy, best)
            where = tl.where(better, cols, where)
        greatest = tl.max(best, axis=0)
        column = tl.min(tl.where(best == greatest, where, 0x7FFFFFFF), axis=0)
        tl.store(out + row, tl.minimum(column, width - 1).to(tl.int64))
