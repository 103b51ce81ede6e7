// How many prompt tokens may ride along with sequences that generate.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace llama_crab {

// Learns what a batch costs and keeps the time between two tokens of a running answer near a target.
// The cost of prompts is learned by size (32, 64, ... tokens), because it does not grow in proportion:
// a large matrix product uses what a small one leaves idle.
class StepBudget {
public:
    int64_t target_us = 0;  // 0: no bound

    void observe(int32_t n_decoding, int32_t n_prompt, int64_t us) {
        if (n_prompt == 0) {
            blend(decode_us_, (double) us);
        } else if (n_prompt >= smallest) {
            const size_t k    = size_class(n_prompt);
            const double rest = (double) us - (n_decoding > 0 ? decode_us_ : 0.0);
            blend(cost_us_[k], std::max(rest, 1.0) * size_of(k) / n_prompt);
        }
    }

    int32_t prompt_tokens(int32_t limit) const {
        if (target_us == 0) {
            return limit;
        }
        const auto known = std::find_if(cost_us_.begin(), cost_us_.end(),
                                        [](double us) { return us > 0.0; });
        if (known == cost_us_.end()) {
            return std::min(limit, 2 * smallest);
        }
        const double left = (double) target_us - decode_us_;
        // Sizes that were not seen yet cost in proportion to the next smaller one, which is too much
        // rather than too little; the first ones in proportion to the first that was seen.
        double cost = *known / (double) (1 << (known - cost_us_.begin())) / 2.0;
        double fits = smallest;  // below it a batch costs the same and the prompts would starve
        for (size_t k = 0; k < cost_us_.size(); ++k) {
            cost = cost_us_[k] > 0.0 ? cost_us_[k] : 2.0 * cost;
            if (cost > left) {
                break;
            }
            fits = std::min(size_of(k) * left / cost, 2.0 * size_of(k));
        }
        return std::min(limit, std::max(smallest, (int32_t) fits));
    }

    // Of one token in the largest batch of prompts that was seen; 0 when there was none.
    double prompt_us() const {
        for (size_t k = cost_us_.size(); k-- > 0;) {
            if (cost_us_[k] > 0.0) {
                return cost_us_[k] / size_of(k);
            }
        }
        return 0.0;
    }

private:
    static constexpr int32_t smallest = 32;

    static double size_of(size_t k) { return (double) (smallest << k); }

    size_t size_class(int32_t n) const {
        size_t k = 0;
        while (k + 1 < cost_us_.size() && n >= (smallest << (k + 1))) {
            ++k;
        }
        return k;
    }

    static void blend(double & value, double seen) {
        value = value == 0.0 ? seen : 0.8 * value + 0.2 * seen;
    }

    double                decode_us_ = 0.0;  // a batch without prompts
    std::array<double, 8> cost_us_{};        // 32 << k prompt tokens beside it
};

}  // namespace llama_crab
