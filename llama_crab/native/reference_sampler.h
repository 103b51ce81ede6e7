// The reference executor: llama.cpp's own sampler chain over a candidate array.
#pragma once

#include <string>
#include <vector>

#include "row_sampler.h"

namespace llama_crab {

class ReferenceSampler : public RowSampler {
public:
    llama_token sample(LogitsRow & row, Status & status) noexcept override;
    llama_token forced(Status & status) noexcept override;
    void accept(llama_token token, Status & status) noexcept override;
    void accept_prompt(const llama_token * tokens, size_t n, Status & status) noexcept override;
    void reset(Status & status) noexcept override;
    void explain(LogitsRow & row, Candidates & candidates, Status & status) noexcept override;

    llama_sampler * chain = nullptr;  // borrowed; a single sampler will do too

private:
    void apply(const LogitsRow & row, llama_token_data_array & array);

    std::vector<llama_token_data> candidates_;  // reused: 12 bytes a token of the vocabulary
};

llama_sampler * new_grammar(const llama_vocab * vocab, const std::string & grammar,
                            const std::string & root, bool lazy,
                            const std::vector<std::string> & trigger_patterns,
                            const std::vector<llama_token> & trigger_tokens,
                            Status & status) noexcept;

}  // namespace llama_crab
