// Passes over one row of logits: a few vectorised sweeps instead of a candidate array.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace llama_crab {

// A row without a finite maximum, or with a NaN in it, cannot be sampled.
struct RowMax {
    float   value;
    int32_t index;  // smallest index with that value; -1 when the row cannot be sampled
};

RowMax row_max(const float * row, int32_t n);

// log(sum(exp(row))) given the row's maximum.
float row_log_sum_exp(const float * row, int32_t n, float max);

// The k largest entries, descending, ties by smaller id: (id, logit) pairs.
void row_top_k(const float * row, int32_t n, int32_t k,
               std::vector<std::pair<int32_t, float>> & out);

}  // namespace llama_crab
