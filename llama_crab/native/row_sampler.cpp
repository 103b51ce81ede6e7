#include "row_sampler.h"

#include <algorithm>
#include <chrono>

namespace llama_crab {

std::vector<double> time_sampler(RowSampler & sampler, const std::vector<float> & rows,
                                 int32_t n_vocab, int32_t n_rounds, bool scan, Status & status) {
    using Clock = std::chrono::steady_clock;
    std::vector<double> times;
    std::vector<float>  copy((size_t) n_vocab);
    LogitsRow           row;
    const size_t        n_rows = rows.size() / (size_t) n_vocab;
    row.open(copy.data(), n_vocab);
    for (int32_t i = 0; i < n_rounds && status.kind == Status::ok; ++i) {
        const float * from = rows.data() + ((size_t) i % n_rows) * (size_t) n_vocab;
        std::copy(from, from + n_vocab, copy.begin());
        const Clock::time_point begin = Clock::now();
        if (scan) {
            row.open(copy.data(), n_vocab);
        }
        const llama_token token = sampler.sample(row, status);
        if (token != LLAMA_TOKEN_NULL) {
            sampler.accept(token, status);
        }
        row.undo();
        times.push_back(std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    }
    return times;
}

}  // namespace llama_crab
