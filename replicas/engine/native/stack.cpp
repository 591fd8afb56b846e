// All layers of a decoder in one call. At one sequence a layer's kernels take 600 microseconds and the interpreter between
// them took 130; the arithmetic is that of the same kernels called one by one, bit for bit.

#include <algorithm>

#include "gemm.h"
#include "kernels.h"

namespace sb {

namespace {

void keep_rows(float* data, int64_t width, const int64_t* rows, int64_t count) {
    for (int64_t r = 0; r < count; r++) std::memmove(data + r * width, data + rows[r] * width, width * 4);
}

}  // namespace

}  // namespace sb

using namespace sb;

SB_EXPORT void sb_stack(const Stack* stack, const Batch* batch, const Shape* step_shape, const int64_t* positions,
                        float* residual, const int64_t* rows, int64_t wanted, float* out) {
    static thread_local Scratch x_scratch, fused_scratch, wide_scratch;
    Shape shape = *step_shape;
    const int threads = shape.threads;
    const float eps = stack->eps;
    const int64_t hidden = stack->hidden, inner = stack->inner, dim = shape.head_dim;
    const int64_t q_size = shape.q_heads * dim, kv_size = shape.kv_heads * dim, fused = q_size + 2 * kv_size;
    int64_t tokens = batch->tokens;
    float* x = x_scratch.floats(tokens * std::max(hidden, q_size));
    float* qkv = fused_scratch.floats(tokens * std::max(fused, inner));  // and silu(gate) * up
    float* gate_up = wide_scratch.floats(tokens * std::max(hidden, 2 * inner));
    float *q = qkv, *k = qkv + q_size, *v = qkv + q_size + kv_size;
    sb_rms_norm(residual, nullptr, stack->layers[0].input_norm, eps, tokens, hidden, x, threads);
    for (int64_t i = 0; i < stack->num_layers; i++) {
        const Layer& layer = stack->layers[i];
        if (i > 0) sb_rms_norm(x, residual, layer.input_norm, eps, tokens, hidden, x, threads);
        sb_linear(layer.qkv, x, hidden, qkv, tokens, threads);
        if (layer.q_norm) {
            sb_norm_heads(q, tokens, fused, shape.q_heads, dim, layer.q_norm, eps, threads);
            sb_norm_heads(k, tokens, fused, shape.kv_heads, dim, layer.k_norm, eps, threads);
        }
        sb_rope(q, fused, dim, shape.q_heads, k, fused, dim, shape.kv_heads, stack->cos_sin, positions, tokens, dim, threads);
        shape.window = layer.window;
        sb_attention(batch, &shape, q, fused, dim, k, fused, dim, v, fused, dim, &layer.cache, x);
        if (i == stack->num_layers - 1) {
            // All keys and values are written: only rows that are wanted go on.
            keep_rows(x, q_size, rows, wanted);
            keep_rows(residual, hidden, rows, wanted);
            tokens = wanted;
        }
        // gate_up's memory is free until the MLP: o needs an output that is not its input.
        sb_linear(layer.o, x, q_size, gate_up, tokens, threads);
        sb_rms_norm(gate_up, residual, layer.post_norm, eps, tokens, hidden, x, threads);
        sb_linear(layer.gate_up, x, hidden, gate_up, tokens, threads);
        sb_silu_mul(gate_up, tokens, inner, qkv, threads);
        sb_linear(layer.down, qkv, inner, x, tokens, threads);
    }
    sb_rms_norm(x, residual, stack->final_norm, eps, tokens, hidden, out, threads);
}
