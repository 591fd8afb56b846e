// One block of KEYS keys in the attention of some rows: its keys packed, and the online softmax over it.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace sb {

constexpr int KEYS = 64;
constexpr float NOTHING = -INFINITY;

// Of some rows: running maximum, sums [LANES] that together are the denominator, unnormalised output [width].
struct Accumulator {
    float *maximum, *sums, *o;
    static int64_t floats(int64_t rows, int64_t width) { return rows * (width + LANES + 1); }
    Accumulator(float* memory, int64_t rows, int64_t width)
        : maximum(memory + rows * (width + LANES)), sums(memory + rows * width), o(memory) {}
    void clear(int64_t rows, int64_t width) {
        std::fill(maximum, maximum + rows, NOTHING);
        std::memset(o, 0, rows * (width + LANES) * 4);
    }
};

SB_INLINE float scalar_exp2(float x) { return exp2(splat(x))[0]; }

// Where the rows of a block of keys lie: in the cache, or for values of odd width in a copy.
struct Found {
    const float* keys[KEYS];
    const float* values[KEYS];
};

SB_INLINE void prefetch(const float* line) { __builtin_prefetch(line, 0, 2); }

// `count` key rows -> panels of K^T, each [dim][PANEL]. Meanwhile this block's values and the next block's keys come in,
// line by line: all at once they would stop the core until memory has answered.
inline void pack_keys(const Found& found, const Found& next, int64_t dim, int count, float* out) {
    for (int key = 0; key < count; key += LANES) {
        float* column = out + key / PANEL * dim * PANEL + key % PANEL;
        int64_t d = 0;
        for (; d + LANES <= dim; d += LANES) {
            vec block[LANES];
            for (int i = 0; i < LANES; i++) {
                block[i] = load(found.keys[key + i] + d);
                prefetch(found.values[key + i] + d);
                prefetch(next.keys[key + i] + d);
            }
            transpose(block);
            for (int i = 0; i < LANES; i++) store(column + (d + i) * PANEL, block[i]);
        }
        for (; d < dim; d++)
            for (int i = 0; i < LANES; i++) column[d * PANEL + i] = found.keys[key + i][d];
    }
}

// Panels read whole vectors: value rows whose width is no multiple of PANEL are copied into rows that have room for it.
inline void widen_values(Found& found, int64_t dim, int64_t width, float* copies) {
    if (dim == width) return;
    for (int key = 0; key < KEYS; key++, copies += width) {
        std::memcpy(copies, found.values[key], dim * 4);
        found.values[key] = copies;
    }
}

// Masks one row of scores to keys [begin, end), turns it into probabilities, rescales the row's accumulator.
inline void softmax_row(float* scores, int begin, int end, float& maximum, float* sums, float* o, int64_t width) {
    if (begin >= end) {
        std::memset(scores, 0, KEYS * 4);
        return;
    }
    vec s[KEYS / LANES];
    for (int i = 0; i < KEYS / LANES; i++) s[i] = load(scores + i * LANES);
    if (begin > 0 || end < KEYS) {
        for (int i = 0; i < KEYS / LANES; i++) {
            const veci key = lane_numbers() + i * LANES;
            s[i] = select((key >= begin) & (key < end), s[i], splat(NOTHING));
        }
    }
    vec peak = s[0];
    for (int i = 1; i < KEYS / LANES; i++) peak = max(peak, s[i]);
    const float highest = std::max(maximum, max_of(peak));
    vec total = load(sums);
    if (maximum != highest) {
        const float rescale = scalar_exp2(maximum - highest);
        maximum = highest;
        total *= rescale;
        for (int64_t d = 0; d < width; d += LANES) store(o + d, load(o + d) * rescale);
    }
    const vec shift = splat(highest);
    for (int i = 0; i < KEYS / LANES; i++) {
        const vec p = exp2(s[i] - shift);
        total += p;
        store(scores + i * LANES, p);
    }
    store(sums, total);
}

}  // namespace sb
