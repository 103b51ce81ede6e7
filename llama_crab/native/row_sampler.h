// Picks the tokens of one sequence from rows of logits.
#pragma once

#include <memory>
#include <vector>

#include "guard.h"
#include "llama.h"
#include "logits_row.h"

namespace llama_crab {

// What a sampler drew from: the tokens in its order, with their probabilities.
struct Candidates {
    std::vector<llama_token> ids;
    std::vector<float>       logits, p;
    llama_token              selected = LLAMA_TOKEN_NULL;
};

class RowSampler {
public:
    virtual ~RowSampler() = default;

    // Chooses a token. The row may come back edited; its owner undoes that. Sets `status` and
    // returns LLAMA_TOKEN_NULL when nothing can be chosen.
    virtual llama_token sample(LogitsRow & row, Status & status) noexcept = 0;
    // The token that alone can follow, chosen without a row; LLAMA_TOKEN_NULL when there are more.
    virtual llama_token forced(Status & status) noexcept = 0;
    // Tells what was chosen, by `sample` or by others.
    virtual void accept(llama_token token, Status & status) noexcept = 0;
    // Feeds a prompt to the stages that look back (penalties, dry); a grammar must not see it.
    virtual void accept_prompt(const llama_token * tokens, size_t n, Status & status) noexcept = 0;
    // Forgets history and starts the random streams again.
    virtual void reset(Status & status) noexcept = 0;
    // As `sample`, and tells what it drew from; advances the random streams as well.
    virtual void explain(LogitsRow & row, Candidates & candidates, Status & status) noexcept = 0;
};

// Microseconds of each of `n_rounds` samplings (the row's scan, the choice, its acceptance), taking
// turns over rows of `n_vocab` logits; for benchmarks. Without `scan` the sampler must not need it.
std::vector<double> time_sampler(RowSampler & sampler, const std::vector<float> & rows,
                                 int32_t n_vocab, int32_t n_rounds, bool scan, Status & status);

constexpr const char * no_candidate_left =
    "no candidate is left: the sampler's stages, the grammar or the banned tokens exclude every one";
constexpr const char * bad_row = "the logits hold NaN or no finite value";

}  // namespace llama_crab
