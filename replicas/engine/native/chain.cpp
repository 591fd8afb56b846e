// Guesses of a draft that reads the target's states (spec/state_draft.py), all of a step's in one call: between the kernels
// of one guess, which take 300 microseconds, the interpreter took as long again.

#include <algorithm>
#include <cmath>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace sb {

struct Chain {
    const Stack* stack;
    const Linear *fuse, *head;  // [hidden, 2 hidden], [targets, hidden]
    const Linear* embedding;    // or null, and `table` [vocabulary, hidden]
    const float* table;
    const int64_t* targets;     // the token of each row of `head`
};

namespace {

void embed(const Chain& chain, int64_t token, float* out) {
    const int64_t hidden = chain.stack->hidden;
    if (chain.table) std::memcpy(out, chain.table + token * hidden, hidden * 4);
    else sb_unpack_rows(chain.embedding, &token, 1, out);
}

// The first of the greatest logits and its probability.
int64_t best(const float* logits, int64_t count, float* probability) {
    const int64_t at = std::max_element(logits, logits + count) - logits;
    const vec greatest = splat(logits[at]);
    vec total = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) total += exp2((load(logits + i) - greatest) * LOG2E);
    float rest = 0;
    for (; i < count; i++) rest += std::exp(logits[i] - logits[at]);
    *probability = 1.0f / (sum(total) + rest);
    return at;
}

}  // namespace

}  // namespace sb

using namespace sb;

// batch: every sequence's newest places, with blocks for `depth` - 1 more behind them. tokens [batch tokens], and states
// [batch tokens, hidden]: those of the target before each. guesses, sure [depth, sequences]: tokens and probabilities.
SB_EXPORT void sb_chain(const Chain* chain, const Batch* batch, const Shape* shape, const int64_t* positions,
                        const int64_t* tokens, const float* states, int64_t depth, int64_t* guesses, float* sure) {
    static thread_local Scratch input_scratch, residual_scratch, hidden_scratch, logit_scratch;
    const int64_t sequences = batch->sequences, hidden = chain->stack->hidden, width = chain->head->n;
    float* inputs = input_scratch.floats(batch->tokens * 2 * hidden);
    float* residual = residual_scratch.floats(batch->tokens * hidden);
    float* own = hidden_scratch.floats(sequences * hidden);
    float* logits = logit_scratch.floats(sequences * width);
    std::vector<int64_t> rows(sequences), places(sequences), slots(sequences);
    std::vector<int32_t> starts(sequences + 1), lengths(batch->context_lens, batch->context_lens + sequences);
    for (int64_t s = 0; s < sequences; s++) rows[s] = batch->query_start[s + 1] - 1;
    Batch step = *batch;
    for (int64_t ahead = 0; ahead < depth; ahead++) {
        for (int64_t t = 0; t < step.tokens; t++) {
            embed(*chain, tokens[t], inputs + t * 2 * hidden);
            std::memcpy(inputs + t * 2 * hidden + hidden, states + t * hidden, hidden * 4);
        }
        sb_linear(chain->fuse, inputs, 2 * hidden, residual, step.tokens, shape->threads);
        sb_stack(chain->stack, &step, shape, positions, residual, rows.data(), sequences, own);
        sb_linear(chain->head, own, hidden, logits, sequences, shape->threads);
        int64_t* guessed = guesses + ahead * sequences;
        for (int64_t s = 0; s < sequences; s++) {
            guessed[s] = chain->targets[best(logits + s * width, width, sure + ahead * sequences + s)];
            const int64_t place = lengths[s]++;
            const int32_t* blocks = batch->block_tables + s * batch->block_table_ld;
            if (ahead + 1 < depth) slots[s] = blocks[place / shape->block_size] * shape->block_size + place % shape->block_size;
            rows[s] = starts[s] = static_cast<int32_t>(s);
            places[s] = place;
        }
        starts[sequences] = static_cast<int32_t>(sequences);
        tokens = guessed, states = own, positions = places.data();
        step.tokens = sequences;
        step.query_start = starts.data(), step.context_lens = lengths.data(), step.slot_mapping = slots.data();
    }
}
