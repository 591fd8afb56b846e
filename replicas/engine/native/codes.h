// The panels of a quantised weight as float32: in the registers that multiply with them, or a slice at a time for the
// register tiles of gemm.h.
//
//   words    [panels][k / per][PANEL], per = 32 / bits codes of one column in a word, lowest bits first
//   scales   [panels][groups][PANEL]
//   origins  the same: zeros, from which codes are counted, or mins, which are added
//
// A weight is (code - zero) * scale, or code * scale + min. With scales of 16 bits code * scale and zero * scale are exact
// in float32, so that one fused multiply-add of code, scale and -zero * scale rounds once, to the same number. Scales
// of 32 bits take the difference first. A slice is the same numbers whoever asks for it, so a row's product has the same
// bits with many rows as alone, and the same as with the dequantised matrix.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "kernels.h"
#include "simd.h"

namespace sb {

constexpr int64_t CODE_ALIGN = 16;  // most codes in a word: slices begin at multiples of it
constexpr int64_t AHEAD = 4096;     // bytes: hardware prefetchers stop at each page

typedef int32_t words_unaligned __attribute__((vector_size(SB_VECTOR_BYTES), aligned(4), may_alias));

SB_INLINE vec bits_as_float(veci v) { return reinterpret_cast<vec>(v); }
SB_INLINE veci load_words(const uint32_t* p) { return *reinterpret_cast<const words_unaligned*>(p); }

// LANES numbers of `kind` from index i on, exactly.
SB_INLINE vec load_as(const void* data, int kind, int64_t i) {
    if (kind == KIND_F32) return load(static_cast<const float*>(data) + i);
    if (kind == KIND_U8) return __builtin_convertvector(widen(static_cast<const uint8_t*>(data) + i), vec);
    const veci wide = widen(static_cast<const uint16_t*>(data) + i);
    if (kind == KIND_U16) return __builtin_convertvector(wide, vec);
    if (kind == KIND_BF16) return bits_as_float(wide << 16);
    // float16: its exponent is 112 less; the product also makes subnormal numbers right.
    const vec magnitude = bits_as_float((wide & 0x7fff) << 13) * splat(0x1p112f);
    return bits_as_float(reinterpret_cast<veci>(magnitude) | (wide & 0x8000) << 16);
}

// What turns the codes of one group of LANES columns into weights.
struct GroupGrid {
    vec scale, zero, offset;

    static inline bool has_mins(const Codes& w) { return w.origins && w.origin_kind == w.scale_kind; }
    // Whether weights are (code - zero) * scale, else code * scale + offset.
    static inline bool difference(const Codes& w) { return w.scale_kind == KIND_F32 && !has_mins(w); }

    static inline GroupGrid at(const Codes& w, int64_t i) {
        const vec scale = load_as(w.scales, w.scale_kind, i);
        if (has_mins(w)) return {scale, vec{}, load_as(w.origins, w.origin_kind, i)};
        const vec zero = w.origins ? load_as(w.origins, w.origin_kind, i) : splat(static_cast<float>(1 << (w.bits - 1)));
        return {scale, zero, -zero * scale};
    }
};

template <int BITS, bool DIFFERENCE>
void dequantise_run(const uint32_t* words, int64_t count, const GroupGrid& first, const GroupGrid& second, float* out) {
    constexpr int PER = 32 / BITS, MASK = (1 << BITS) - 1;
    const vec scale[2] = {first.scale, second.scale}, zero[2] = {first.zero, second.zero};
    const vec offset[2] = {first.offset, second.offset};
    for (int64_t i = 0; i < count; i++, words += PANEL, out += PER * PANEL) {
        const veci packed[2] = {load_words(words), load_words(words + LANES)};
        for (int line = 0; line < PANEL * 4; line += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(words) + AHEAD + line, 0, 2);
#pragma GCC unroll 16
        for (int j = 0; j < PER; j++)
            for (int half = 0; half < 2; half++) {
                const vec code = __builtin_convertvector((packed[half] >> (BITS * j)) & MASK, vec);
                store(out + j * PANEL + half * LANES,
                      DIFFERENCE ? (code - zero[half]) * scale[half] : code * scale[half] + offset[half]);
            }
    }
}

// Weights of columns panel * PANEL.. and rows k0 .. k0 + kc: out [kc][PANEL]. k0 is a multiple of CODE_ALIGN.
template <int BITS>
void dequantise_slice(const Linear& w, int64_t panel, int64_t k0, int64_t kc, float* out) {
    constexpr int PER = 32 / BITS;
    const Codes& codes = *w.codes;
    const int64_t groups = (w.k + codes.group - 1) / codes.group;
    const uint32_t* words = codes.words + panel * (w.k / PER) * PANEL;
    for (int64_t k = k0; k < k0 + kc;) {
        const int64_t group = k / codes.group, end = std::min((group + 1) * codes.group, k0 + kc);
        const int64_t i = (panel * groups + group) * PANEL;
        const GroupGrid first = GroupGrid::at(codes, i), second = GroupGrid::at(codes, i + LANES);
        (GroupGrid::difference(codes) ? dequantise_run<BITS, true> : dequantise_run<BITS, false>)(
            words + k / PER * PANEL, (end - k) / PER, first, second, out + (k - k0) * PANEL);
        k = end;
    }
}

// As tile_kernel in gemm.h, of NP panels whose weights are made of codes in registers: for one block of rows, which is
// all that uses them. Weights and products are those of a slice that was dequantised before, bit for bit.
template <int MR, int NP, int BITS, bool DIFFERENCE>
void codes_kernel(const Tile& t, const Linear& w, int64_t panel, int64_t k0) {
    constexpr int NV = 2 * NP, PER = 32 / BITS, MASK = (1 << BITS) - 1;
    const Codes& codes = *w.codes;
    const int64_t groups = (w.k + codes.group - 1) / codes.group, step = w.k / PER * PANEL;
    vec acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = t.init ? load(t.init + i * t.init_ld + j * LANES) : vec{};
    const float* a = t.a;
    const uint32_t* words = codes.words + panel * step + k0 / PER * PANEL;
    for (int64_t k = k0; k < k0 + t.kc;) {
        const int64_t group = k / codes.group, end = std::min((group + 1) * codes.group, k0 + t.kc);
        vec scale[NV], shift[NV];  // shift: zeros or offsets
        for (int v = 0; v < NV; v++) {
            const GroupGrid grid = GroupGrid::at(codes, ((panel + v / 2) * groups + group) * PANEL + v % 2 * LANES);
            scale[v] = grid.scale;
            shift[v] = DIFFERENCE ? grid.zero : grid.offset;
        }
        for (; k < end; k += PER, words += PANEL) {
            veci packed[NV];
            for (int v = 0; v < NV; v++) packed[v] = load_words(words + v / 2 * step + v % 2 * LANES);
            for (int p = 0; p < NP; p++)
                for (int line = 0; line < PANEL * 4; line += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(words + p * step) + AHEAD + line, 0, 2);
#pragma GCC unroll 16
            for (int j = 0; j < PER; j++) {
                for (int v = 0; v < NV; v++) {
                    const vec code = __builtin_convertvector((packed[v] >> (BITS * j)) & MASK, vec);
                    const vec weight = DIFFERENCE ? (code - shift[v]) * scale[v] : code * scale[v] + shift[v];
                    for (int i = 0; i < MR; i++) acc[i][v] += splat(a[i]) * weight;
                }
                a += MR;
            }
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) store(t.c + i * t.c_ld + j * LANES, acc[i][j]);
}

typedef void (*CodesKernel)(const Tile&, const Linear&, int64_t panel, int64_t k0);

// Codes and grids take registers too. With more rows a slice in L1 costs less than what is spilled; two panels fit where
// there are 32 registers.
constexpr int CODES_ROWS = MAX_ROWS > 6 ? 8 : 4;
constexpr int codes_panels(int rows, int64_t available) { return MAX_ROWS > 6 && available >= 2 && rows <= 3 ? 2 : 1; }

template <int NP, int BITS, bool DIFFERENCE, int... R>
CodesKernel pick_codes_rows(int rows, std::integer_sequence<int, R...>) {
    static const CodesKernel table[] = {codes_kernel<R + 1, codes_panels(R + 1, NP), BITS, DIFFERENCE>...};
    return table[rows - 1];
}

template <int BITS, bool DIFFERENCE>
CodesKernel codes_kernel_of(int rows, int panels) {
    constexpr auto all = std::make_integer_sequence<int, CODES_ROWS>{};
    return panels == 2 ? pick_codes_rows<2, BITS, DIFFERENCE>(rows, all) : pick_codes_rows<1, BITS, DIFFERENCE>(rows, all);
}

// The kernel for `rows` in 1..CODES_ROWS and `panels` as codes_panels gave it.
SB_INLINE CodesKernel codes_kernel_for(const Codes& codes, int rows, int panels) {
    const bool difference = GroupGrid::difference(codes);
    if (codes.bits == 4) return difference ? codes_kernel_of<4, true>(rows, panels) : codes_kernel_of<4, false>(rows, panels);
    if (codes.bits == 8) return difference ? codes_kernel_of<8, true>(rows, panels) : codes_kernel_of<8, false>(rows, panels);
    return difference ? codes_kernel_of<2, true>(rows, panels) : codes_kernel_of<2, false>(rows, panels);
}

SB_INLINE void dequantise(const Linear& w, int64_t panel, int64_t k0, int64_t kc, float* out) {
    const int bits = w.codes->bits;
    (bits == 4 ? dequantise_slice<4> : bits == 8 ? dequantise_slice<8> : dequantise_slice<2>)(w, panel, k0, kc, out);
}

}  // namespace sb
