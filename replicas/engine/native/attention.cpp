// Paged causal attention over a mixed batch: decode rows and prefill chunks in one call, keys and values written first.
//
// Work is cut into tiles: (sequence, KV head, up to TILE_ROWS query rows); a row is one (token, query head of the
// group), so grouped queries share every key they read. Keys are taken in aligned chunks of CHUNK positions; within a
// chunk an online softmax (Milakov & Gimelshein, 2018; FlashAttention, Dao et al., 2022) runs over blocks of KEYS keys:
//
//     S[rows, KEYS] = Q K^T     register-tile product, K transposed into panels
//     P = exp2(S - max)         in place
//     O[rows, D] = O * r + P V  register-tile product, V read where it lies
//
// and chunks merge in ascending order. A chunk may be its own task (a split over the context: FlashDecoding, 2023) or run
// after its predecessor in the same thread: the arithmetic is the same, chunk borders are fixed, and so a row's result
// depends neither on batch, nor on prompt chunking, nor on the number of threads.

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "key_block.h"
#include "kv_codes.h"
#include "team.h"

namespace sb {

namespace {

constexpr int64_t CHUNK = 256;
constexpr int64_t TILE_ROWS = 96;

// Rows of a projection: token t, head h starts at data + t * row + h * head.
struct Rows {
    const float* data;
    int64_t row, head;
    const float* at(int64_t t, int64_t h) const { return data + t * row + h * head; }
};

struct Call {
    const Batch& batch;
    const Shape& shape;
    Rows q;
    const Cache& cache;
    float* out;
    int64_t group() const { return shape.q_heads / shape.kv_heads; }
    int64_t width() const { return (shape.head_dim + PANEL - 1) / PANEL * PANEL; }  // of an O row
};

struct TileTask {
    int64_t sequence, kv_head;
    int64_t token, tokens;    // rows of q: [token, token + tokens)
    int64_t position;         // of the first token
    int64_t low, high;        // keys that any row sees: [low, high)
    int64_t partial;          // floats into the buffer of partial results, or -1: not split
    int64_t chunks() const { return (high - 1) / CHUNK - low / CHUNK + 1; }
};

void merge(Accumulator& into, const Accumulator& part, int64_t rows, int64_t width) {
    for (int64_t r = 0; r < rows; r++) {
        if (part.maximum[r] == NOTHING) continue;
        const float maximum = std::max(into.maximum[r], part.maximum[r]);
        const float a = scalar_exp2(into.maximum[r] - maximum), b = scalar_exp2(part.maximum[r] - maximum);
        into.maximum[r] = maximum;
        store(into.sums + r * LANES, load(into.sums + r * LANES) * a + load(part.sums + r * LANES) * b);
        for (int64_t d = 0; d < width; d += LANES)
            store(into.o + r * width + d, load(into.o + r * width + d) * a + load(part.o + r * width + d) * b);
    }
}

void write_out(const Call& call, const TileTask& tile, const Accumulator& done) {
    const int64_t group = call.group(), dim = call.shape.head_dim, width = call.width();
    for (int64_t r = 0; r < tile.tokens * group; r++) {
        float* out = call.out + (tile.token + r / group) * call.shape.q_heads * dim + (tile.kv_head * group + r % group) * dim;
        const float inverse = 1.0f / sum(load(done.sums + r * LANES));
        for (int64_t d = 0; d < dim; d++) out[d] = done.o[r * width + d] * inverse;
    }
}

// One thread's memory for one tile.
struct Workspace {
    float *q, *scores, *keys, *values, *decoded, *chunk, *whole;
    Found found[2];  // this block of keys and the next one, which is being prefetched
    static int64_t floats(int64_t rows, int64_t dim, int64_t width) {
        return rows * (dim + KEYS) + KEYS * (3 * dim + width) + 2 * Accumulator::floats(rows, width) + 7 * 16;
    }
    Workspace(float* memory, int64_t rows, int64_t dim, int64_t width) {
        auto take = [&memory](int64_t count) {
            float* start = memory;
            memory += (count + 15) / 16 * 16;
            return start;
        };
        q = take(rows * dim);
        scores = take(rows * KEYS);
        keys = take(KEYS * dim);
        values = take(KEYS * width);
        decoded = take(2 * KEYS * dim);
        chunk = take(Accumulator::floats(rows, width));
        whole = take(Accumulator::floats(rows, width));
    }
};

void pack_queries(const Call& call, const TileTask& tile, float* out) {
    const int64_t group = call.group(), dim = call.shape.head_dim, rows = tile.tokens * group;
    const RowBlocks blocks(rows);
    const vec scale = splat(call.shape.scale * LOG2E);
    auto row = [&](int64_t r) { return call.q.at(tile.token + r / group, tile.kv_head * group + r % group); };
    for (int64_t b = 0; b < blocks.count; b++) {
        const int height = blocks.height(b);
        const int64_t first = blocks.start(b);
        int i = 0;
        for (; i + 4 <= height; i += 4) {
            const float *q0 = row(first + i), *q1 = row(first + i + 1), *q2 = row(first + i + 2), *q3 = row(first + i + 3);
            float* to = out + first * dim + i;
            int64_t d = 0;
            for (; d + 4 <= dim; d += 4) transpose4(q0 + d, q1 + d, q2 + d, q3 + d, to + d * height, height);
            for (; d < dim; d++) {
                to[d * height] = q0[d], to[d * height + 1] = q1[d];
                to[d * height + 2] = q2[d], to[d * height + 3] = q3[d];
            }
        }
        for (; i < height; i++) {
            const float* q = row(first + i);
            for (int64_t d = 0; d < dim; d++) out[first * dim + d * height + i] = q[d];
        }
    }
    for (int64_t i = 0; i < rows * dim; i += LANES) store(out + i, load(out + i) * scale);  // the buffer is rounded up
}

// Addresses of keys first..first+KEYS-1. Those outside the tile's [low, high) read zeros, so that memory which was never
// written (or was given back behind a window) cannot bring a NaN.
void find_rows(const Call& call, const TileTask& tile, int64_t first, const float* zeros, Found& found) {
    const Shape& shape = call.shape;
    const int32_t* table = call.batch.block_tables + tile.sequence * call.batch.block_table_ld;
    const int64_t dim = shape.head_dim, row = shape.kv_heads * dim, block_size = shape.block_size;
    const float *keys = static_cast<float*>(call.cache.keys), *values = static_cast<float*>(call.cache.values);
    const int begin = static_cast<int>(std::clamp<int64_t>(tile.low - first, 0, KEYS));
    const int end = static_cast<int>(std::clamp<int64_t>(tile.high - first, begin, KEYS));
    std::fill(found.keys, found.keys + begin, zeros);
    std::fill(found.values, found.values + begin, zeros);
    int64_t block = (first + begin) / block_size, within = (first + begin) % block_size;
    for (int i = begin; i < end; block++, within = 0) {
        const int64_t start = table[block] * shape.block_stride + tile.kv_head * dim;
        for (; within < block_size && i < end; within++, i++) {
            found.keys[i] = keys + start + within * row;
            found.values[i] = values + start + within * row;
        }
    }
    std::fill(found.keys + end, found.keys + KEYS, zeros);
    std::fill(found.values + end, found.values + KEYS, zeros);
}

// Where the vectors of one KV head lie in an 8-bit cache, position by position.
class CodeRows {
  public:
    CodeRows(const Call& call, const TileTask& tile, int64_t position)
        : shape_(call.shape),
          table_(call.batch.block_tables + tile.sequence * call.batch.block_table_ld + position / shape_.block_size),
          row_(position % shape_.block_size), head_(tile.kv_head) {}
    int64_t codes() const { return *table_ * shape_.block_stride + (row_ * shape_.kv_heads + head_) * shape_.head_dim; }
    int64_t scale() const { return *table_ * shape_.scale_stride + row_ * shape_.kv_heads + head_; }
    void next() {
        if (++row_ == shape_.block_size) row_ = 0, table_++;
    }

  private:
    const Shape& shape_;
    const int32_t* table_;
    int64_t row_, head_;
};

// As find_rows, of an 8-bit cache: what the codes stand for, in `copies` [2][KEYS][dim]. Block by block, so that it never
// leaves the core's own cache. Meanwhile the codes of the next block of keys come in: their lines are too far apart for the
// hardware to guess.
template <Format FORMAT>
void decode_rows(const Call& call, const TileTask& tile, int64_t first, const float* zeros, float* copies, Found& found) {
    const int8_t *keys = static_cast<int8_t*>(call.cache.keys), *values = static_cast<int8_t*>(call.cache.values);
    const float *key_scales = call.cache.key_scales, *value_scales = call.cache.value_scales;
    const int64_t dim = call.shape.head_dim;
    const int64_t begin = std::max(tile.low, first), end = std::min(tile.high, first + KEYS);
    std::fill(found.keys, found.keys + KEYS, zeros);
    std::fill(found.values, found.values + KEYS, zeros);
    if (begin >= end) return;
    const int64_t ahead = std::min(begin + KEYS, tile.high - 1);
    CodeRows now(call, tile, begin), later(call, tile, ahead);
    for (int64_t position = begin; position < end; position++, now.next(), copies += 2 * dim) {
        if (position + KEYS < tile.high) {
            for (int64_t line = 0; line < dim; line += 64) {
                __builtin_prefetch(keys + later.codes() + line, 0, 2);
                __builtin_prefetch(values + later.codes() + line, 0, 2);
            }
            __builtin_prefetch(key_scales + later.scale(), 0, 2);
            __builtin_prefetch(value_scales + later.scale(), 0, 2);
            later.next();
        }
        decode<FORMAT>(keys + now.codes(), key_scales[now.scale()], dim, copies);
        decode<FORMAT>(values + now.codes(), value_scales[now.scale()], dim, copies + dim);
        found.keys[position - first] = copies;
        found.values[position - first] = copies + dim;
    }
}

// The register tiles of one product of all rows: `set_b` points a tile at panel p, the product starts from zero or from C.
template <int LD, bool SCATTERED, class SetB>
void multiply(const RowBlocks& blocks, int64_t a_ld, const float* a, int64_t panels, int64_t kc, SetB set_b, float* c,
              int64_t c_ld, bool accumulate) {
    for (int64_t p = 0; p < panels;) {
        int step = 1;
        for (int64_t i = 0; i < blocks.count; i++) {
            const int rows = blocks.height(i);
            step = panels_at_once(blocks.count == 1 ? rows : MAX_ROWS, panels - p);
            Tile t{};
            t.kc = kc;
            t.a = a + blocks.start(i) * a_ld;
            set_b(t, p);
            t.c = c + blocks.start(i) * c_ld + p * PANEL;
            t.c_ld = c_ld;
            t.init = accumulate ? t.c : nullptr;
            t.init_ld = c_ld;
            tile_for<LD, Nothing, SCATTERED>(rows, step)(t);
        }
        p += step;
    }
}

// The keys of a chunk that a tile reads, from a border of KEYS on.
struct Span {
    int64_t begin, end;
    Span(const TileTask& tile, int64_t chunk)
        : begin(std::max(chunk * CHUNK, tile.low / KEYS * KEYS)), end(std::min((chunk + 1) * CHUNK, tile.high)) {}
};

// `find_next` fills in the rows that will be wanted after this chunk.
template <class FindNext>
void run_chunk(const Call& call, const TileTask& tile, int64_t chunk, const float* zeros, Workspace& work,
               Accumulator& into, FindNext find_next) {
    const int64_t group = call.group(), dim = call.shape.head_dim, width = call.width(), window = call.shape.window;
    const int64_t rows = tile.tokens * group;
    const RowBlocks blocks(rows);
    into.clear(rows, width);
    const Span span(tile, chunk);
    const bool plain = call.shape.format == PLAIN;
    if (plain) find_rows(call, tile, span.begin, zeros, work.found[0]);
    for (int64_t first = span.begin, current = 0; first < span.end; first += KEYS, current ^= 1) {
        const int used = static_cast<int>(std::min<int64_t>(KEYS, span.end - first));
        const int64_t panels = (used + PANEL - 1) / PANEL;
        Found& found = work.found[current];
        Found& next = work.found[plain ? current ^ 1 : current];
        if (!plain)
            (call.shape.format == INT8 ? decode_rows<INT8> : decode_rows<FP8_E4M3>)(call, tile, first, zeros, work.decoded, found);
        else if (first + KEYS < span.end)
            find_rows(call, tile, first + KEYS, zeros, next);
        else
            find_next(next);
        pack_keys(found, next, dim, static_cast<int>(panels * PANEL), work.keys);
        auto keys = [&](Tile& t, int64_t p) { t.b = work.keys + p * dim * PANEL, t.b_panel = dim * PANEL; };
        multiply<0, false>(blocks, dim, work.q, panels, dim, keys, work.scores, KEYS, false);
        for (int64_t r = 0; r < rows; r++) {
            const int64_t position = tile.position + r / group - first;  // relative to this block of keys
            const int64_t from = window ? std::max<int64_t>(0, position - window + 1) : 0;
            softmax_row(work.scores + r * KEYS, static_cast<int>(std::min<int64_t>(from, KEYS)),
                        static_cast<int>(std::clamp<int64_t>(position + 1, 0, KEYS)), into.maximum[r],
                        into.sums + r * LANES, into.o + r * width, width);
        }
        widen_values(found, dim, width, work.values);
        auto values = [&](Tile& t, int64_t p) { t.b_rows = found.values, t.b_column = p * PANEL; };
        multiply<KEYS, true>(blocks, KEYS, work.scores, width / PANEL, used, values, into.o, width, true);
    }
}

int64_t tile_tokens(const Call& call) { return std::max<int64_t>(1, TILE_ROWS / call.group()); }

// Longest tiles first within a sequence, so that the last task to finish is a small one.
void cut_tiles(const Call& call, std::vector<TileTask>& tiles) {
    const Batch& batch = call.batch;
    const int64_t step = tile_tokens(call);
    tiles.clear();
    for (int64_t s = 0; s < batch.sequences; s++) {
        const int64_t start = batch.query_start[s], count = batch.query_start[s + 1] - start;
        const int64_t first_position = batch.context_lens[s] - count;
        for (int64_t t = (count - 1) / step * step; t >= 0 && count > 0; t -= step)
            for (int64_t head = 0; head < call.shape.kv_heads; head++) {
                TileTask tile{};
                tile.sequence = s;
                tile.kv_head = head;
                tile.token = start + t;
                tile.tokens = std::min(step, count - t);
                tile.position = first_position + t;
                tile.high = tile.position + tile.tokens;
                tile.low = call.shape.window ? std::max<int64_t>(0, tile.position - call.shape.window + 1) : 0;
                tile.partial = -1;
                tiles.push_back(tile);
            }
    }
}

struct ChunkTask {
    int64_t tile, chunk;  // chunk -1: all chunks of the tile, one after the other
    int64_t first_chunk(const TileTask& of) const { return chunk >= 0 ? chunk : of.low / CHUNK; }
};

// Splitting costs a pass over partial results: nothing beside a few rows' keys, but only worth it for a wide tile when
// there are too few tiles to go round. Returns floats of partial results.
int64_t cut_chunks(const Call& call, std::vector<TileTask>& tiles, std::vector<ChunkTask>& tasks) {
    int64_t floats = 0;
    tasks.clear();
    for (size_t i = 0; i < tiles.size(); i++) {
        TileTask& tile = tiles[i];
        const int64_t rows = tile.tokens * call.group();
        const bool narrow = rows <= 16 || static_cast<int64_t>(tiles.size()) < 4 * call.shape.threads;
        if (tile.chunks() == 1 || !narrow) {
            tasks.push_back({static_cast<int64_t>(i), -1});
            continue;
        }
        tile.partial = floats;
        floats += tile.chunks() * Accumulator::floats(rows, call.width());
        for (int64_t c = 0; c < tile.chunks(); c++) tasks.push_back({static_cast<int64_t>(i), tile.low / CHUNK + c});
    }
    return floats;
}

// `after`: what this thread will probably be given next, or null.
void run_task(const Call& call, const std::vector<TileTask>& tiles, ChunkTask task, const ChunkTask* after,
              float* partials, const float* zeros) {
    static thread_local Scratch scratch;
    const TileTask& tile = tiles[task.tile];
    const int64_t width = call.width(), rows = tile.tokens * call.group(), dim = call.shape.head_dim;
    Workspace work(scratch.floats(Workspace::floats(rows, dim, width)), rows, dim, width);
    pack_queries(call, tile, work.q);
    auto find_after = [&](Found& next) {
        if (!after) return find_rows(call, tile, tile.high, zeros, next);
        const TileTask& other = tiles[after->tile];
        find_rows(call, other, Span(other, after->first_chunk(other)).begin, zeros, next);
    };
    if (task.chunk >= 0) {
        const int64_t index = task.chunk - tile.low / CHUNK;
        Accumulator part(partials + tile.partial + index * Accumulator::floats(rows, width), rows, width);
        return run_chunk(call, tile, task.chunk, zeros, work, part, find_after);
    }
    Accumulator whole(work.whole, rows, width), part(work.chunk, rows, width);
    const int64_t first = task.first_chunk(tile), end = first + tile.chunks();
    for (int64_t c = first; c < end; c++) {
        auto find_next = [&](Found& next) {
            c + 1 < end ? find_rows(call, tile, Span(tile, c + 1).begin, zeros, next) : find_after(next);
        };
        // Merging the first into nothing would give the same bits.
        run_chunk(call, tile, c, zeros, work, c == first ? whole : part, find_next);
        if (c > first) merge(whole, part, rows, width);
    }
    write_out(call, tile, whole);
}

void merge_split(const Call& call, const TileTask& tile, float* partials) {
    static thread_local Scratch scratch;
    const int64_t width = call.width(), rows = tile.tokens * call.group(), size = Accumulator::floats(rows, width);
    Accumulator whole(scratch.floats(size), rows, width);
    whole.clear(rows, width);
    for (int64_t c = 0; c < tile.chunks(); c++) {
        Accumulator part(partials + tile.partial + c * size, rows, width);
        merge(whole, part, rows, width);
    }
    write_out(call, tile, whole);
}

void write_rows(const Shape& shape, int64_t slot, const Rows& from, int64_t token, void* cache, float* scales) {
    const int64_t block = slot / shape.block_size, row = slot % shape.block_size * shape.kv_heads, dim = shape.head_dim;
    const int64_t at = block * shape.block_stride + row * dim;
    for (int64_t h = 0; h < shape.kv_heads; h++) {
        if (shape.format == PLAIN)
            std::memcpy(static_cast<float*>(cache) + at + h * dim, from.at(token, h), dim * 4);
        else
            scales[block * shape.scale_stride + row + h] = encode(static_cast<Format>(shape.format), from.at(token, h), dim,
                                                                  static_cast<int8_t*>(cache) + at + h * dim);
    }
}

}  // namespace

}  // namespace sb

using namespace sb;

SB_EXPORT void sb_attention(const Batch* batch, const Shape* shape, const float* q, int64_t q_row, int64_t q_head,
                            const float* k, int64_t k_row, int64_t k_head, const float* v, int64_t v_row, int64_t v_head,
                            const Cache* cache, float* out) {
    static thread_local std::vector<TileTask> tiles;
    static thread_local std::vector<ChunkTask> tasks;
    static thread_local Scratch partial_scratch, zero_scratch;
    const Call call{*batch, *shape, {q, q_row, q_head}, *cache, out};
    const Rows k_rows{k, k_row, k_head}, v_rows{v, v_row, v_head};
    cut_tiles(call, tiles);
    float* partials = partial_scratch.floats(cut_chunks(call, tiles, tasks));
    float* zeros = zero_scratch.floats(shape->head_dim);
    std::memset(zeros, 0, shape->head_dim * 4);
    const std::vector<TileTask>& tile_list = tiles;  // this thread's, which the others may read
    const std::vector<ChunkTask>& task_list = tasks;
    const int64_t tile_count = static_cast<int64_t>(tiles.size()), task_count = static_cast<int64_t>(tasks.size());
    const bool any_split = task_count > tile_count;
    Team team(shape->threads);
#pragma omp parallel num_threads(team.size())
    {
#pragma omp for schedule(static) nowait
        for (int64_t t = 0; t < batch->tokens; t++) {
            write_rows(*shape, batch->slot_mapping[t], k_rows, t, cache->keys, cache->key_scales);
            write_rows(*shape, batch->slot_mapping[t], v_rows, t, cache->values, cache->value_scales);
        }
        team.wait();
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < task_count; i++) {
            const int64_t after = i + omp_get_num_threads();
            run_task(call, tile_list, task_list[i], after < task_count ? &task_list[after] : nullptr, partials, zeros);
        }
        team.wait();
        if (any_split) {
#pragma omp for schedule(static) nowait
            for (int64_t i = 0; i < tile_count; i++)
                if (tile_list[i].partial >= 0) merge_split(call, tile_list[i], partials);
            team.wait();
        }
    }
}
