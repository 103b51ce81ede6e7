// How many prompt tokens may ride along with sequences that generate.
#pragma once

#include <algorithm>
#include <cstdint>

namespace llama_crab {

// Learns what a batch costs and keeps the time between two tokens of a running answer near a target.
class StepBudget {
public:
    int64_t target_us = 0;  // 0: no bound

    void observe(int32_t n_decoding, int32_t n_prompt, int64_t us) {
        if (n_prompt == 0) {
            blend(decode_us_, (double) us);
        } else if (n_prompt >= smallest / 2) {
            const double rest = (double) us - (n_decoding > 0 ? decode_us_ : 0.0);
            blend(prompt_us_, std::max(rest, 1.0) / n_prompt);
        }
    }

    int32_t prompt_tokens(int32_t limit) const {
        if (target_us == 0) {
            return limit;
        }
        if (prompt_us_ == 0.0) {
            return std::min(limit, 2 * smallest);
        }
        const double fits = ((double) target_us - decode_us_) / prompt_us_;
        // Below this a batch costs the same and the prompts would starve.
        return std::min(limit, (int32_t) std::clamp(fits, (double) smallest, 1e9));
    }

    double prompt_us() const { return prompt_us_; }

private:
    static constexpr int32_t smallest = 32;

    static void blend(double & value, double seen) {
        value = value == 0.0 ? seen : 0.8 * value + 0.2 * seen;
    }

    double decode_us_ = 0.0;  // a batch without prompts
    double prompt_us_ = 0.0;  // one prompt token
};

}  // namespace llama_crab
