// Vectors of the widest size the target has, through GCC/Clang vector extensions: one source for AVX-512, AVX2, SSE, NEON.
//
// Two rules that every kernel here keeps, because greedy output must not depend on what else is in a batch:
//   * one output element is one chain of fused multiply-adds in a fixed order, whatever the number of rows, threads or
//     tiles around it;
//   * reductions inside a vector always run over the same fixed tile width, padded with neutral elements.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SB_VECTOR_BYTES 64
#elif defined(__AVX__)
#define SB_VECTOR_BYTES 32
#else
#define SB_VECTOR_BYTES 16
#endif

#define SB_EXPORT extern "C" __attribute__((visibility("default")))
#define SB_INLINE static inline __attribute__((always_inline))

namespace sb {

typedef float vec __attribute__((vector_size(SB_VECTOR_BYTES)));
typedef int32_t veci __attribute__((vector_size(SB_VECTOR_BYTES)));
typedef float vec_unaligned __attribute__((vector_size(SB_VECTOR_BYTES), aligned(4), may_alias));

constexpr int LANES = SB_VECTOR_BYTES / 4;
constexpr int PANEL = 2 * LANES;  // columns of one packed panel: two vectors

// Rows of the largest register tile: MAX_ROWS * 2 accumulators + 2 of the panel + 1 broadcast fit the register file.
#if defined(__AVX512F__)
constexpr int MAX_ROWS = 14;
#elif defined(__aarch64__)
constexpr int MAX_ROWS = 12;
#else
constexpr int MAX_ROWS = 6;
#endif

SB_INLINE vec load(const float* p) { return *reinterpret_cast<const vec_unaligned*>(p); }
SB_INLINE void store(float* p, vec v) { *reinterpret_cast<vec_unaligned*>(p) = v; }
SB_INLINE vec splat(float x) { return x - vec{}; }
SB_INLINE vec select(veci mask, vec yes, vec no) { return mask ? yes : no; }
SB_INLINE veci select_int(veci mask, veci yes, veci no) { return mask ? yes : no; }
SB_INLINE vec max(vec a, vec b) { return a > b ? a : b; }
SB_INLINE vec min(vec a, vec b) { return a < b ? a : b; }

// LANES narrow integers as 32-bit ones. GCC 12 converts vectors of bytes element by element where it is not told the
// instruction; elsewhere it finds it if widths only double.
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t unsigned_bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef int16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef uint16_t unsigned_halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

#if defined(__AVX512F__)
SB_INLINE veci widen(const int8_t* p) { return (veci)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
SB_INLINE veci widen(const uint8_t* p) { return (veci)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
SB_INLINE veci widen(const uint16_t* p) { return (veci)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
SB_INLINE veci widen(const int8_t* p) { return (veci)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
SB_INLINE veci widen(const uint8_t* p) { return (veci)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
SB_INLINE veci widen(const uint16_t* p) { return (veci)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
#else
SB_INLINE veci widen(const int8_t* p) {
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const bytes*>(p), halves), veci);
}
SB_INLINE veci widen(const uint8_t* p) {
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const unsigned_bytes*>(p), unsigned_halves), veci);
}
SB_INLINE veci widen(const uint16_t* p) {
    return __builtin_convertvector(*reinterpret_cast<const unsigned_halves*>(p), veci);
}
#endif

template <int... LANE>
SB_INLINE veci numbers(std::integer_sequence<int, LANE...>) {
    return veci{LANE...};
}
SB_INLINE veci lane_numbers() { return numbers(std::make_integer_sequence<int, LANES>{}); }

template <int H, int... LANE>
SB_INLINE vec rotated(vec v, std::integer_sequence<int, LANE...>) {
    return __builtin_shuffle(v, veci{((LANE + H) % LANES)...});
}

// Reductions as a tree over halves; every lane ends with the result.
template <int H = LANES / 2>
SB_INLINE float sum(vec v) {
    v += rotated<H>(v, std::make_integer_sequence<int, LANES>{});
    if constexpr (H > 1) return sum<H / 2>(v);
    return v[0];
}

template <int H = LANES / 2>
SB_INLINE float max_of(vec v) {
    v = max(v, rotated<H>(v, std::make_integer_sequence<int, LANES>{}));
    if constexpr (H > 1) return max_of<H / 2>(v);
    return v[0];
}

// 2^x for x <= 127, about 1 ulp; x below -126 (and -inf) gives 0. Split into 2^round(x) by exponent bits and a degree-6
// polynomial (Taylor of 2^f in f * ln 2, |f| <= 0.5, truncation 1.2e-8 relative).
SB_INLINE vec exp2(vec x) {
    const vec low = splat(-126.0f);
    veci under = x < low;
    x = select(under, low, x);
    const vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    vec shifted = x + magic;
    vec whole = shifted - magic;
    vec f = x - whole;
    vec p = splat(1.5403530e-4f);
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    veci bits = (veci)shifted << 23;  // the integer sits in the low mantissa bits of `shifted`
    vec result = (vec)((veci)p + bits);
    return select(under, vec{}, result);
}

typedef float quad __attribute__((vector_size(16)));
typedef float quad_unaligned __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t quad_index __attribute__((vector_size(16)));

// out[i * ld + j] = row j [i], for i and j in 0..3.
SB_INLINE void transpose4(const float* row0, const float* row1, const float* row2, const float* row3, float* out,
                          int64_t ld) {
    const quad r0 = *reinterpret_cast<const quad_unaligned*>(row0);
    const quad r1 = *reinterpret_cast<const quad_unaligned*>(row1);
    const quad r2 = *reinterpret_cast<const quad_unaligned*>(row2);
    const quad r3 = *reinterpret_cast<const quad_unaligned*>(row3);
    const quad a = __builtin_shuffle(r0, r1, quad_index{0, 4, 1, 5});
    const quad b = __builtin_shuffle(r2, r3, quad_index{0, 4, 1, 5});
    const quad c = __builtin_shuffle(r0, r1, quad_index{2, 6, 3, 7});
    const quad d = __builtin_shuffle(r2, r3, quad_index{2, 6, 3, 7});
    *reinterpret_cast<quad_unaligned*>(out) = __builtin_shuffle(a, b, quad_index{0, 1, 4, 5});
    *reinterpret_cast<quad_unaligned*>(out + ld) = __builtin_shuffle(a, b, quad_index{2, 3, 6, 7});
    *reinterpret_cast<quad_unaligned*>(out + 2 * ld) = __builtin_shuffle(c, d, quad_index{0, 1, 4, 5});
    *reinterpret_cast<quad_unaligned*>(out + 3 * ld) = __builtin_shuffle(c, d, quad_index{2, 3, 6, 7});
}

template <int H, int... LANE>
SB_INLINE void exchange(vec& a, vec& b, std::integer_sequence<int, LANE...>) {
    const vec low = __builtin_shuffle(a, b, veci{((LANE & H) ? LANES + LANE - H : LANE)...});
    const vec high = __builtin_shuffle(a, b, veci{((LANE & H) ? LANES + LANE : LANE + H)...});
    a = low;
    b = high;
}

// rows[i] lane j <-> rows[j] lane i, by exchanging ever larger off-diagonal blocks (Eklundh, 1972).
template <int H = 1>
SB_INLINE void transpose(vec (&rows)[LANES]) {
    for (int i = 0; i < LANES; i++)
        if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_integer_sequence<int, LANES>{});
    if constexpr (2 * H < LANES) transpose<2 * H>(rows);
}

constexpr float LOG2E = 1.44269504088896340736f;

}  // namespace sb
