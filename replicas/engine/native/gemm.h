// The one register-tile kernel that linear layers and attention share.
#pragma once

#include <cstdlib>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace sb {

// One call computes C[MR, NP * PANEL] (+)= A[MR, kc] * B[kc, NP * PANEL].
struct Tile {
    int64_t kc;
    const float* a;  // [kc][MR] where LD is 0, else [MR][LD]
    const float* b;  // NP panels, each packed [kc][PANEL]
    int64_t b_panel; // floats from one panel to the next
    const float* const* b_rows;  // or, where SCATTERED: row k of all panels at b_rows[k] + b_column
    int64_t b_column;
    const float* init;  // where accumulators start: null for zero, a bias row (init_ld 0), or C itself
    int64_t init_ld;
    float* c;
    int64_t c_ld;
    const char* prefetch;  // for Spread
    int64_t prefetch_step;
};

// What a kernel fetches while it computes, into L2: L1 is full of what it works on. touch() is called once for each k.

// The panels it reads, some KiB ahead: for weights that pass by once. Hardware prefetchers stop at each 4 KiB page.
struct Stream {
    explicit Stream(const Tile& t) : panel(t.b_panel * 4) {}
    template <int NP>
    __attribute__((always_inline)) void touch(const float* b) {
        const char* ahead = reinterpret_cast<const char*>(b) + 8192;
        for (int j = 0; j < NP; j++)
            for (int line = 0; line < PANEL * 4; line += 64) __builtin_prefetch(ahead + j * panel + line, 0, 2);
    }
    int64_t panel;
};

// Other memory at its own pace: several row blocks pass over one slice of a panel and share the fetching of the next.
struct Spread {
    explicit Spread(const Tile& t) : next(t.prefetch), step(t.prefetch_step) {}
    template <int NP>
    __attribute__((always_inline)) void touch(const float*) {
        __builtin_prefetch(next, 0, 2);
        next += step;
    }
    const char* next;
    int64_t step;
};

struct Nothing {
    explicit Nothing(const Tile&) {}
    template <int NP>
    __attribute__((always_inline)) void touch(const float*) {}
};

template <int MR, int NP, int LD, class Prefetch, bool SCATTERED>
void tile_kernel(const Tile& t) {
    constexpr int NV = 2 * NP;
    vec acc[MR][NV];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) acc[i][j] = t.init ? load(t.init + i * t.init_ld + j * LANES) : vec{};
    const float* a = t.a;
    const float* b = t.b;
    const int64_t b_panel = SCATTERED ? PANEL : t.b_panel;
    Prefetch prefetch(t);
    for (int64_t k = 0; k < t.kc; k++) {
        vec w[NV];
        if (SCATTERED) b = t.b_rows[k] + t.b_column;
        for (int j = 0; j < NV; j++) w[j] = load(b + (j / 2) * b_panel + (j % 2) * LANES);
        prefetch.template touch<NP>(b);
        for (int i = 0; i < MR; i++) {
            vec x = splat(a[LD ? i * LD : i]);
            for (int j = 0; j < NV; j++) acc[i][j] += x * w[j];
        }
        a += LD ? 1 : MR;
        if (!SCATTERED) b += PANEL;
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NV; j++) store(t.c + i * t.c_ld + j * LANES, acc[i][j]);
}

typedef void (*TileKernel)(const Tile&);

constexpr bool fits(int rows, int panels) { return rows * panels <= MAX_ROWS; }

// With few rows one panel gives too few independent chains to hide the latency of a multiply-add: take up to 4.
constexpr int panels_at_once(int rows, int64_t available) {
    return available >= 4 && fits(rows, 4) ? 4 : available >= 2 && fits(rows, 2) ? 2 : 1;
}

template <int LD, class Prefetch, bool SCATTERED, int NP, int... R>
TileKernel pick_rows(int rows, std::integer_sequence<int, R...>) {
    static const TileKernel table[] = {tile_kernel<R + 1, fits(R + 1, NP) ? NP : 1, LD, Prefetch, SCATTERED>...};
    return table[rows - 1];
}

// The kernel for `rows` in 1..MAX_ROWS and `panels` as panels_at_once gave it.
template <int LD, class Prefetch, bool SCATTERED = false>
TileKernel tile_for(int rows, int panels) {
    constexpr auto all = std::make_integer_sequence<int, MAX_ROWS>{};
    return panels == 4   ? pick_rows<LD, Prefetch, SCATTERED, 4>(rows, all)
           : panels == 2 ? pick_rows<LD, Prefetch, SCATTERED, 2>(rows, all)
                         : pick_rows<LD, Prefetch, SCATTERED, 1>(rows, all);
}

// [rows, k] with row stride ld -> packed [k][rows].
SB_INLINE void pack_rows(const float* x, int64_t ld, int rows, int64_t k, float* out) {
    const int whole = rows / 4 * 4;
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) {
        for (int i = 0; i < whole; i += 4) {
            const float* row = x + i * ld + j;
            transpose4(row, row + ld, row + 2 * ld, row + 3 * ld, out + j * rows + i, rows);
        }
        for (int i = whole; i < rows; i++)
            for (int c = 0; c < 4; c++) out[(j + c) * rows + i] = x[i * ld + j + c];
    }
    for (; j < k; j++)
        for (int i = 0; i < rows; i++) out[j * rows + i] = x[i * ld + j];
}

// `rows` rows cut into `count` register blocks of nearly equal height, none above MAX_ROWS.
struct RowBlocks {
    int64_t rows, count;
    explicit RowBlocks(int64_t m) : rows(m), count((m + MAX_ROWS - 1) / MAX_ROWS) {}
    int64_t start(int64_t i) const { return rows * i / count; }
    int height(int64_t i) const { return static_cast<int>(start(i + 1) - start(i)); }
};

// Grows, never shrinks; each thread has its own: kernels need scratch on every call and malloc is not free.
class Scratch {
  public:
    ~Scratch() { std::free(data_); }
    float* floats(int64_t count) {
        if (size_ < count) {
            std::free(data_);
            size_ = count + count / 2;
            const int64_t page = size_ * 4 >= HUGE_PAGE ? HUGE_PAGE : 64, bytes = (size_ * 4 + page - 1) / page * page;
            data_ = static_cast<float*>(std::aligned_alloc(page, bytes));
            if (!data_) std::abort();
#if defined(MADV_HUGEPAGE)
            if (page == HUGE_PAGE) madvise(data_, bytes, MADV_HUGEPAGE);
#endif
        }
        return data_;
    }

  private:
    static constexpr int64_t HUGE_PAGE = 2 << 20;
    float* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace sb
