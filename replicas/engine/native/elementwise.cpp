// The memory-bound operations between the matrix products, each one pass over its rows. Rows are independent.

#include <algorithm>
#include <cmath>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "kernels.h"
#include "team.h"

namespace sb {

namespace {

constexpr int64_t PARALLEL_FLOATS = 1 << 15;  // below this a second thread costs more than it brings

SB_INLINE vec load_some(const float* p, int64_t count) {
    if (count >= LANES) return load(p);
    float lanes[LANES] = {};
    std::memcpy(lanes, p, count * 4);
    return load(lanes);
}

SB_INLINE void store_some(float* p, vec v, int64_t count) {
    if (count >= LANES) return store(p, v);
    float lanes[LANES];
    store(lanes, v);
    std::memcpy(p, lanes, count * 4);
}

// Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019. `add` (may be null) is updated to x + add first.
void rms_norm_row(const float* x, float* add, const float* weight, float eps, int64_t width, float* out) {
    vec squares = {};
    const float* source = add ? add : x;
    for (int64_t i = 0; i < width; i += LANES) {
        vec v = load_some(x + i, width - i);
        if (add) {
            v += load_some(add + i, width - i);
            store_some(add + i, v, width - i);
        }
        squares += v * v;
    }
    const vec scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
    for (int64_t i = 0; i < width; i += LANES)
        store_some(out + i, load_some(weight + i, width - i) * (load_some(source + i, width - i) * scale), width - i);
}

// Su et al., "RoFormer", 2021, in the halves (GPT-NeoX, Hugging Face) convention.
void rotate(float* x, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; i += LANES) {
        const int64_t n = half - i;
        const vec first = load_some(x + i, n), second = load_some(x + half + i, n);
        const vec c = load_some(cosines + i, n), s = load_some(sines + i, n);
        store_some(x + i, first * c - second * s, n);
        store_some(x + half + i, second * c + first * s, n);
    }
}

}  // namespace

}  // namespace sb

using namespace sb;

// Outputs of a step are megabytes, freed and asked for again at once. By default glibc gives such memory back to the kernel
// each time and faults it in anew, page by page: a sixth of a prefill's time. Keep it instead, process-wide.
SB_EXPORT void sb_keep_freed_memory() {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 32 << 20);  // the most glibc accepts
    mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}

SB_EXPORT void sb_rms_norm(const float* x, float* add, const float* weight, float eps, int64_t rows, int64_t width,
                           float* out, int threads) {
#pragma omp parallel for num_threads(Team(threads).size()) if (rows * width > PARALLEL_FLOATS)
    for (int64_t r = 0; r < rows; r++)
        rms_norm_row(x + r * width, add ? add + r * width : nullptr, weight, eps, width, out + r * width);
}

SB_EXPORT void sb_norm_heads(float* x, int64_t tokens, int64_t row, int64_t heads, int64_t head_dim, const float* weight,
                             float eps, int threads) {
#pragma omp parallel for num_threads(Team(threads).size()) if (tokens * heads * head_dim > PARALLEL_FLOATS)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            float* head = x + t * row + h * head_dim;
            rms_norm_row(head, nullptr, weight, eps, head_dim, head);
        }
}

SB_EXPORT void sb_rope(float* q, int64_t q_row, int64_t q_head, int64_t q_heads, float* k, int64_t k_row,
                       int64_t k_head, int64_t k_heads, const float* cos_sin, const int64_t* positions, int64_t tokens,
                       int64_t head_dim, int threads) {
    const int64_t half = head_dim / 2;
#pragma omp parallel for num_threads(Team(threads).size()) if (tokens * (q_heads + k_heads) * head_dim > PARALLEL_FLOATS)
    for (int64_t t = 0; t < tokens; t++) {
        const float* cosines = cos_sin + positions[t] * head_dim;
        for (int64_t h = 0; h < q_heads; h++) rotate(q + t * q_row + h * q_head, cosines, cosines + half, half);
        for (int64_t h = 0; h < k_heads; h++) rotate(k + t * k_row + h * k_head, cosines, cosines + half, half);
    }
}

SB_EXPORT void sb_silu_mul(const float* gate_up, int64_t rows, int64_t width, float* out, int threads) {
#pragma omp parallel for num_threads(Team(threads).size()) if (rows * width > PARALLEL_FLOATS)
    for (int64_t r = 0; r < rows; r++) {
        const float* gate = gate_up + r * 2 * width;
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t n = width - i;
            const vec g = load_some(gate + i, n), up = load_some(gate + width + i, n);
            const vec power = g * -LOG2E;
            const vec e = select(power > 127.0f, splat(INFINITY), exp2(min(power, splat(127.0f))));
            store_some(out + r * width + i, g / (1.0f + e) * up, n);
        }
    }
}
