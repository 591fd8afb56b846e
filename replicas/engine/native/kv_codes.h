// Keys and values in 8 bits: kv_format.py's arithmetic, to the bit. A vector is head_dim codes and one float32 scale.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace sb {

enum Format : int { PLAIN = 0, INT8 = 1, FP8_E4M3 = 2 };

typedef int8_t codes __attribute__((vector_size(LANES)));

constexpr float SMALLEST_SCALE = 0x1p-120f;

// The numbers that e4m3 codes stand for. Exponent 0 is for multiples of 2^-9, up to seven of them.
SB_INLINE vec from_e4m3(veci code) {
    const veci magnitude = code & 0x7f;
    const vec normal = (vec)((magnitude << 20) + (120 << 23));
    const vec small = __builtin_convertvector(magnitude, vec) * 0x1p-9f;
    const vec value = select(magnitude < 8, small, normal);
    return (vec)((veci)value | ((code & 0x80) << 24));
}

// To the nearest e4m3 number, ties to even; |x| <= 448 but for rounding.
SB_INLINE veci to_e4m3(vec x) {
    const veci bits = (veci)x, sign = bits < 0, magnitude = bits & 0x7fffffff;
    const veci normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    const veci small = (veci)((vec)magnitude * 512.0f + magic) & 0xf;
    return select_int(magnitude < (121 << 23), small, normal) | (sign & 0x80);
}

template <Format FORMAT>
void decode(const int8_t* from, float scale, int64_t dim, float* to) {
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
        const veci code = widen(from + d);
        store(to + d, (FORMAT == INT8 ? __builtin_convertvector(code, vec) : from_e4m3(code)) * scale);
    }
    for (; d < dim; d++) {
        const veci code = veci{} + static_cast<int32_t>(from[d]);
        to[d] = (FORMAT == INT8 ? __builtin_convertvector(code, vec) : from_e4m3(code))[0] * scale;
    }
}

// Returns the scale.
inline float encode(Format format, const float* from, int64_t dim, int8_t* to) {
    float highest = 0.0f;
    for (int64_t d = 0; d < dim; d++) highest = std::max(highest, std::fabs(from[d]));
    const float part = highest / (format == INT8 ? 127.0f : 448.0f);
    const float scale = part == 0.0f ? 1.0f : std::max(part, SMALLEST_SCALE);
    for (int64_t d = 0; d < dim; d += LANES) {
        const int64_t count = std::min<int64_t>(LANES, dim - d);
        vec x{};
        std::memcpy(&x, from + d, count * 4);
        x /= splat(scale);
        const vec magic = splat(12582912.0f);
        const codes code = __builtin_convertvector(
            format == INT8 ? __builtin_convertvector((x + magic) - magic, veci) : to_e4m3(x), codes);
        std::memcpy(to + d, &code, count);
    }
    return scale;
}

}  // namespace sb
