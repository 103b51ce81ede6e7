#pragma once

// Where the tokens of a speculative step come from, as the stepper sees it.

#include "llama.h"

#include "guard.h"

#include <cstdint>
#include <vector>

namespace llama_crab {

// Guesses the tokens that follow a sequence. A guess that is wrong costs time, never the right answer: the target decodes the
// draft and takes what it would have said anyway.
class DraftSource {
public:
    struct Want { int32_t seq; const std::vector<llama_token> * tokens; int32_t n_max; std::vector<llama_token> * draft; };
    virtual ~DraftSource() = default;
    // The target has decoded this batch: its seq ids, positions and tokens; rejected drafts of a sequence are taken back by `rewind`.
    virtual void decoded(const llama_batch & batch, Status & status) = 0;
    // Fills each `draft` with up to n_max tokens that follow `tokens` (all tokens of that sequence, the last not yet decoded by the target).
    virtual void draft(std::vector<Want> & wants, Status & status) = 0;
    // Sequence `seq` has been cut to its first n tokens, or copied from another, or given to another request: forget what is behind n.
    virtual void rewind(int32_t seq, int32_t n) = 0;
    virtual int32_t n_max() const = 0;
};

}  // namespace llama_crab
