// What a stepper has done so far, and how long tokens were waited for.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>

namespace llama_crab {

// One thread adds, any thread reads: no lock, and no locked instruction either.
class Count {
public:
    void add(int64_t n) {
        value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed);
    }
    operator int64_t() const { return value_.load(std::memory_order_relaxed); }

private:
    std::atomic<int64_t> value_{0};
};

// Microseconds, counted in buckets whose width is at most 1/32 of their lower end: exact below 64,
// then 32 buckets for each power of two. The upper bound is 12 days.
class LatencyHistogram {
public:
    static constexpr int    n_linear  = 32;
    static constexpr size_t n_buckets = 36 * n_linear;

    void record(int64_t us) {
        us        = std::clamp<int64_t>(us, 0, (int64_t(1) << 40) - 1);
        int shift = 0;
        while ((us >> shift) >= 2 * n_linear) {
            ++shift;
        }
        counts_[(size_t) (shift * n_linear + (us >> shift))].add(1);
    }
    int64_t count(size_t bucket) const { return counts_[bucket]; }

private:
    std::array<Count, n_buckets> counts_;
};

// They outlive the stepper, so that they can be read at any time.
struct StepCounters {
    Count n_steps;      // batches
    Count n_decoded;    // tokens in them,
    Count n_prefilled;  // of these in prompts, or decoded once more after they were dropped
    Count n_generated;  // tokens that were sampled or forced, without those that end an answer
    Count decode_us;    // inside llama.cpp,
    Count prefill_us;   // of these for prompts: a batch of both kinds is shared out by its tokens
    Count sample_us;    // choosing tokens
    Count n_drafted;         // tokens decoded in the hope that they would be chosen,
    Count n_draft_accepted;  // and of these those that were
    Count drafting_us;       // finding them
    Count draft_saved_us;    // what plain batches would have taken beyond those with drafts; see DraftControl
    const std::shared_ptr<LatencyHistogram> first_token = std::make_shared<LatencyHistogram>();
    const std::shared_ptr<LatencyHistogram> inter_token = std::make_shared<LatencyHistogram>();
};

}  // namespace llama_crab
