// Picks a token from one row of logits with llama.cpp's sampler chain, or by argmax.
#pragma once

#include <vector>

#include "guard.h"
#include "llama.h"

namespace llama_crab {

class RowSampler {
public:
    // Applies `chain` (null: greedy) to the row and accepts the token, as llama_sampler_sample
    // does; where that asserts, `status` is set and LLAMA_TOKEN_NULL returned.
    llama_token sample(llama_sampler * chain, const float * row, int32_t n_vocab, Status & status);

private:
    std::vector<llama_token_data> candidates_;  // reused: 12 bytes a token of the vocabulary
};

// Feeds a prompt to the stages that look back (penalties, dry); the others, a grammar above all,
// must not see it.
void accept_prompt(llama_sampler * chain, const llama_token * tokens, size_t n, Status & status);

void accept_token(llama_sampler * sampler, llama_token token, Status & status) noexcept;
void apply_sampler(llama_sampler * sampler, llama_token_data_array & candidates,
                   Status & status) noexcept;

llama_sampler * new_grammar(const llama_vocab * vocab, const std::string & grammar,
                            const std::string & root, bool lazy,
                            const std::vector<std::string> & trigger_patterns,
                            const std::vector<llama_token> & trigger_tokens,
                            Status & status) noexcept;

}  // namespace llama_crab
