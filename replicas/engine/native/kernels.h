// What the kernels' sources offer to Python and to one another. Every function brings its own team of threads.
#pragma once

#include "simd.h"

namespace sb {

enum Kind { KIND_F32, KIND_F16, KIND_BF16, KIND_U8, KIND_U16 };

// A quantised weight; layout and arithmetic in codes.h.
struct Codes {
    const uint32_t* words;
    const void* scales;
    const void* origins;   // zeros (KIND_U8, KIND_U16) or mins (the scales' kind); null: zeros of 2^(bits-1)
    const int64_t* order;  // [k]: the column of x that each row of a panel is for; null: in order
    int64_t group;         // rows that share a scale, a multiple of 32 / bits
    int32_t bits, scale_kind, origin_kind;
};

struct Linear {
    const float* packed;  // see gemm.cpp; null where there are codes
    const float* bias;    // padded to whole panels, or null
    int64_t n, k;
    const Codes* codes;  // or null
};

// A step's sequences laid end to end: StepBatch in batch.py.
struct Batch {
    const int64_t* slot_mapping;
    const int32_t* query_start;
    const int32_t* context_lens;
    const int32_t* block_tables;
    int64_t block_table_ld, sequences, tokens;
};

// Strides from one block to the next in numbers of what is stored: of keys and values, and of their scales.
struct Shape {
    int64_t block_size, block_stride, scale_stride, q_heads, kv_heads, head_dim;
    int64_t window;  // 0: none
    float scale;
    int threads, format;  // format: of keys and values, see kv_codes.h
};

// One layer's keys and values: float32, or 8-bit codes with the scales (else null) of each token's heads.
struct Cache {
    void *keys, *values;
    float *key_scales, *value_scales;
};

struct Layer {
    const float *input_norm, *q_norm, *k_norm, *post_norm;  // q_norm and k_norm: both null, or weights [head_dim]
    const Linear *qkv, *o, *gate_up, *down;
    Cache cache;
    int64_t window;        // 0: none
};

struct Stack {
    const Layer* layers;
    const float* final_norm;
    const float* cos_sin;
    int64_t num_layers, hidden, inner;
    float eps;
};

}  // namespace sb

SB_EXPORT void sb_linear(const sb::Linear* w, const float* x, int64_t x_ld, float* y, int64_t m, int threads);

SB_EXPORT void sb_attention(const sb::Batch* batch, const sb::Shape* shape, const float* q, int64_t q_row, int64_t q_head,
                            const float* k, int64_t k_row, int64_t k_head, const float* v, int64_t v_row, int64_t v_head,
                            const sb::Cache* cache, float* out);

// `add` (may be null) is updated to x + add first. `out` may be x.
SB_EXPORT void sb_rms_norm(const float* x, float* add, const float* weight, float eps, int64_t rows, int64_t width,
                           float* out, int threads);

// The heads of one projection, each normalised in place; rows of a token's heads are `row` floats apart.
SB_EXPORT void sb_norm_heads(float* x, int64_t tokens, int64_t row, int64_t heads, int64_t head_dim, const float* weight,
                             float eps, int threads);

SB_EXPORT void sb_rope(float* q, int64_t q_row, int64_t q_head, int64_t q_heads, float* k, int64_t k_row,
                       int64_t k_head, int64_t k_heads, const float* cos_sin, const int64_t* positions, int64_t tokens,
                       int64_t head_dim, int threads);

SB_EXPORT void sb_silu_mul(const float* gate_up, int64_t rows, int64_t width, float* out, int threads);

// residual [tokens, hidden]: the embeddings; overwritten. out [wanted, hidden]: the final norm of `rows` (ascending).
SB_EXPORT void sb_stack(const sb::Stack* stack, const sb::Batch* batch, const sb::Shape* shape, const int64_t* positions,
                        float* residual, const int64_t* rows, int64_t wanted, float* out);

SB_EXPORT void sb_unpack_rows(const sb::Linear* w, const int64_t* rows, int64_t count, float* out);
