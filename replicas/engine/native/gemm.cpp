// y[M, N] = x[M, K] * weight[N, K]^T + bias, for any M, from one packed copy of the weight.
//
//   weight [N, K]  ->  ceil(N / PANEL) panels, each [K][PANEL], columns past N zero
//
// A panel is read front to back exactly once per block of rows, so one row streams at memory speed, and a register tile
// of MAX_ROWS x PANEL (Goto & van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008; BLIS) reaches the
// multiply-add ceiling with many. Every output element is one chain over k = 0..K-1, so a row's result does not depend
// on the other rows.
//
// A quantised weight (codes.h) becomes numbers in registers where one block of rows uses them, else slice by slice in the
// caches for the same tiles.

#include "codes.h"
#include "gemm.h"
#include "kernels.h"
#include "team.h"

#include <algorithm>

namespace sb {

namespace {

constexpr int64_t DEPTH = 640;      // rows of a panel that stay close (L1, L2) while row blocks pass over them
constexpr int64_t ROW_CHUNK = 168;  // rows of x whose DEPTH slice stays in L2 (a multiple of 6, 12 and 14)
constexpr int64_t OWN_ROWS = 56;    // fewer pay too much for reading every weight themselves
constexpr int64_t CODES_DEPTH = 128;  // rows of a dequantised slice, all panels together: it stays in L1

struct Call {
    const Linear& w;
    const float* a;  // packed row blocks: block at row r starts at a + r * K
    float* y;
    int64_t y_ld;
    const RowBlocks& blocks;
};

// `panels` panels [kc][PANEL] one after the other.
const float* dequantised(const Linear& w, int64_t panel, int panels, int64_t k0, int64_t kc) {
    static thread_local Scratch scratch;
    float* out = scratch.floats(panels * kc * PANEL);
    for (int j = 0; j < panels; j++) dequantise(w, panel + j, k0, kc, out + j * kc * PANEL);
    return out;
}

// Rows k0 .. k0 + kc of some panels, at b, with every row block; b null: codes, with the only row block.
void pass(const Call& call, int64_t panel, int panels, int64_t k0, int64_t kc, const float* b, int64_t b_panel,
          int64_t block0, int64_t block1) {
    const Linear& w = call.w;
    const int64_t column = panel * PANEL;
    const bool partial = column + panels * PANEL > w.n;
    const int64_t bytes = kc * PANEL * 4, spread = std::max<int64_t>(1, block1 - block0);
    for (int64_t i = block0; i < block1; i++) {
        const int rows = call.blocks.height(i);
        const int64_t row = call.blocks.start(i);
        float* c = call.y + row * call.y_ld + column;
        Tile t{};
        float edge[MAX_ROWS * PANEL * 4];
        t.c = partial ? edge : c;
        t.c_ld = partial ? panels * PANEL : call.y_ld;
        if (k0 > 0) {
            if (partial)
                for (int r = 0; r < rows; r++)
                    std::memcpy(edge + r * t.c_ld, c + r * call.y_ld, (w.n - column) * 4);
            t.init = t.c;
            t.init_ld = t.c_ld;
        } else if (w.bias) {
            t.init = w.bias + column;
        }
        t.kc = kc;
        t.a = call.a + row * w.k + k0 * rows;
        t.b = b;
        t.b_panel = b_panel;
        if (!b) {
            codes_kernel_for(*w.codes, rows, panels)(t, w, panel, k0);
        } else {
            // While row blocks pass over this slice, the next panel's slice comes in, an equal share with each block.
            t.prefetch = reinterpret_cast<const char*>(b + panels * w.k * PANEL) + (i - block0) * bytes / spread;
            t.prefetch_step = std::max<int64_t>(1, PANEL * 4 / spread);
            (w.codes ? tile_for<0, Nothing>(rows, panels)
             : spread == 1 ? tile_for<0, Stream>(rows, panels)
                           : tile_for<0, Spread>(rows, panels))(t);
        }
        if (partial)
            for (int r = 0; r < rows; r++)
                std::memcpy(c + r * call.y_ld, edge + r * t.c_ld, (w.n - column) * 4);
    }
}

// Whether codes become weights in the registers of the only block of rows that uses them.
bool in_registers(const Call& call, int64_t block0, int64_t block1) {
    return call.w.codes && block1 - block0 == 1 && call.blocks.height(block0) <= CODES_ROWS;
}

void panel_slice(const Call& call, int64_t panel, int panels, int64_t k0, int64_t kc, int64_t block0, int64_t block1) {
    const Linear& w = call.w;
    if (!w.codes) return pass(call, panel, panels, k0, kc, w.packed + (panel * w.k + k0) * PANEL, w.k * PANEL, block0, block1);
    if (in_registers(call, block0, block1)) return pass(call, panel, panels, k0, kc, nullptr, 0, block0, block1);
    const int64_t depth = CODES_DEPTH / panels;
    for (int64_t k = k0; k < k0 + kc; k += depth) {
        const int64_t count = std::min(depth, k0 + kc - k);
        pass(call, panel, panels, k, count, dequantised(w, panel, panels, k, count), count * PANEL, block0, block1);
    }
}

void panels_range(const Call& call, int64_t p0, int64_t p1, int64_t block0, int64_t block1) {
    const int64_t k = call.w.k;
    const bool single = block1 - block0 == 1;
    const int64_t align = call.w.codes ? CODE_ALIGN : 1;
    const int64_t slices = single ? 1 : (k + DEPTH - 1) / DEPTH;
    for (int64_t s = 0; s < slices; s++) {
        const int64_t k0 = k * s / slices / align * align;
        const int64_t kc = (s + 1 < slices ? k * (s + 1) / slices / align * align : k) - k0;
        for (int64_t p = p0; p < p1;) {
            const int height = call.blocks.height(block0);
            const int panels = !single ? 1 : in_registers(call, block0, block1) ? codes_panels(height, p1 - p) : panels_at_once(height, p1 - p);
            panel_slice(call, p, panels, k0, kc, block0, block1);
            p += panels;
        }
    }
}

void unpack_codes(const Linear& w, const int64_t* rows, int64_t count, float* out) {
    for (int64_t r = 0; r < count; r++) {
        const float* column = dequantised(w, rows[r] / PANEL, 1, 0, w.k) + rows[r] % PANEL;
        for (int64_t i = 0; i < w.k; i++) out[r * w.k + (w.codes->order ? w.codes->order[i] : i)] = column[i * PANEL];
    }
}

// Columns of x in the order of a weight's rows: [rows, k], in this thread's scratch.
const float* gathered(const float* x, int64_t x_ld, int64_t rows, int64_t k, const int64_t* order) {
    static thread_local Scratch scratch;
    float* out = scratch.floats(rows * k);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < k; i++) out[r * k + i] = x[r * x_ld + order[i]];
    return out;
}

// Rows are cut into chunks that stay in L2. If every member can have enough rows to itself, the number of chunks is a
// multiple of theirs: rows then seldom move from one core's cache to another's.
int64_t chunks_of(int64_t rows, int64_t members) {
    const int64_t chunks = (rows + ROW_CHUNK - 1) / ROW_CHUNK;
    return rows < members * OWN_ROWS ? chunks : (chunks + members - 1) / members * members;
}

}  // namespace

}  // namespace sb

using namespace sb;

SB_EXPORT int64_t sb_panel() { return PANEL; }

SB_EXPORT void sb_pack(const float* weight, int64_t ld, int64_t n, int64_t k, float* packed, int threads) {
    const int64_t panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < panels; p++) {
        float* out = packed + p * k * PANEL;
        const int64_t columns = std::min<int64_t>(PANEL, n - p * PANEL);
        if (columns < PANEL) std::memset(out, 0, k * PANEL * 4);
        for (int64_t c = 0; c < columns; c++)
            for (int64_t i = 0; i < k; i++) out[i * PANEL + c] = weight[(p * PANEL + c) * ld + i];
    }
}

SB_EXPORT void sb_unpack_rows(const Linear* w, const int64_t* rows, int64_t count, float* out) {
    if (w->codes) return unpack_codes(*w, rows, count, out);
    for (int64_t r = 0; r < count; r++) {
        const float* column = w->packed + rows[r] / PANEL * w->k * PANEL + rows[r] % PANEL;
        for (int64_t i = 0; i < w->k; i++) out[r * w->k + i] = column[i * PANEL];
    }
}

SB_EXPORT void sb_linear(const Linear* w, const float* x, int64_t x_ld, float* y, int64_t m, int threads) {
    if (m <= 0) return;
    const RowBlocks blocks(m);
    const int64_t panels = (w->n + PANEL - 1) / PANEL;
    Team team(threads);
    const int64_t row_chunks = chunks_of(m, team.size());
    static thread_local Scratch scratch;
    const int64_t* order = w->codes ? w->codes->order : nullptr;
    const bool as_it_is = m == 1 && !order;
    float* packed_x = as_it_is ? const_cast<float*>(x) : scratch.floats(m * w->k);
    const Call call{*w, packed_x, y, w->n, blocks};
    Shares shares(row_chunks * panels, team.size());
#pragma omp parallel num_threads(team.size())
    {
        if (!as_it_is) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < blocks.count; i++) {
                const int64_t start = blocks.start(i), rows = blocks.height(i);
                const float* from = x + start * x_ld;
                if (order) from = gathered(from, x_ld, rows, w->k, order);
                pack_rows(from, order ? w->k : x_ld, rows, w->k, packed_x + start * w->k);
            }
            team.wait();
        }
        for (int64_t item, end; shares.claim(omp_get_thread_num(), item, end);)
            while (item < end) {  // panels of one chunk of rows, perhaps the first ones of the next
                const int64_t chunk = item / panels, p0 = item % panels, p1 = std::min(panels, p0 + end - item);
                panels_range(call, p0, p1, blocks.count * chunk / row_chunks, blocks.count * (chunk + 1) / row_chunks);
                item += p1 - p0;
            }
        team.wait();
    }
}
