// One sequence of the context, what it is asked for and what it has given.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "draft_control.h"
#include "llama.h"
#include "ngram_cache.h"
#include "ngram_index.h"
#include "row_sampler.h"

namespace llama_crab {

enum class Finish : int32_t {
    none         = 0,
    eog          = 1,  // an end-of-generation token was sampled
    stop_token   = 2,  // one of the request's stop tokens was sampled
    length       = 3,  // max_tokens reached
    context_full = 4,  // no position left in the sequence
    error        = 5,  // sampling failed; see Slot::error
    cancelled    = 6,
};

struct TokenLogprobs {
    float                                  logprob;  // of the token itself
    std::vector<std::pair<int32_t, float>> top;      // (id, logprob), descending
};

// Where drafts of a sequence may come from, and how long they may be.
struct Speculation {
    int32_t n_max = 0;      // tokens of a draft; 0: none
    bool    fixed = false;  // always as long as they can be
    int32_t min_ngram = 0, max_ngram = 0;   // of prompt lookup; 0: without
    std::shared_ptr<NgramCache> cache;      // null: without
    bool    model = false;  // the stepper's draft source
    bool    user  = false;  // Stepper::set_draft
};

// What a request asks of one sequence. Lengths and ids were checked by L2.
struct SlotRequest {
    std::vector<llama_token> prompt;
    int32_t                  source         = -1;  // slot whose first n_keep cells are used; -1: own
    int32_t                  n_keep         = 0;   // leading prompt tokens that are in memory
    int32_t                  leader         = -1;  // slot whose prefill this one waits for
    int32_t                  n_shared       = 0;   // leading prompt tokens it has in common with it
    int32_t                  checkpoint     = -1;  // prompt position at which prefill stops to tell
    int64_t                  rank           = 0;   // of several prompts the smallest goes first
    int64_t                  submit_us      = 0;   // 0: its first token's time is not counted
    int32_t                  adapters       = 0;   // index of the LoRA set; 0: none
    int32_t                  max_tokens     = -1;  // < 0: until the context is full
    int32_t                  min_tokens     = 0;
    int32_t                  n_logprobs     = -1;  // < 0: none; else size of `top`
    bool                     prompt_logprobs = false;
    bool                     ignore_eos     = false;
    bool                     special        = false;  // render control tokens
    bool                     emit           = false;  // report each token, not the end only
    std::vector<llama_token> stop_tokens;             // sorted
    RowSampler *             sampler        = nullptr;  // borrowed
    bool                     processed      = false;  // its rows pass through Python first
    Speculation              speculation;
};

// Tokens that may follow those of a slot. They are decoded with them, each with a row, and the sampler
// decides: what it does not choose is taken out of memory again.
struct Drafting {
    std::optional<NgramIndex> index;   // when the request asks for prompt lookup
    std::vector<llama_token>  tokens;
    DraftOrigin               origin = DraftOrigin::lookup;
    int32_t                   agreed = 0;  // context that agreed before the first of them
    int32_t                   at     = 0;  // position of the first of them
    int32_t                   n_held = 0;  // that were chosen
    // The likeliest next token, also when it was not worth decoding: so that it is known how often
    // drafts hold without making any.
    llama_token               guess  = LLAMA_TOKEN_NULL;
    DraftAcceptance           acceptance;
    int32_t                   n_drafted = 0, n_accepted = 0;

    void drop() {
        tokens.clear();
        n_held = 0;
    }
};

// Cells [begin, end) of a sequence that were decoded together by one request. Copies of a sequence
// in a unified cache carry the same births, which is how shared cells are counted once.
struct CellRun {
    uint64_t birth;
    int32_t  begin, end;
};

// tokens[0, n_past) are in memory; everything behind is still to be decoded.
struct Slot {
    bool                       active = false;
    bool                       held   = false;  // left out of batches until its reader catches up
    bool                       was_held = false;  // since its last token
    Finish                     finish = Finish::none;
    SlotRequest                request;
    std::vector<llama_token>   tokens;
    int32_t                    n_past   = 0;
    int32_t                    n_prompt = 0;
    int32_t                    n_cached = 0;  // prompt tokens that needed no decode
    int32_t                    adapters = 0;  // LoRA set that its cells were computed with
    uint64_t                   birth    = 0;
    std::vector<CellRun>       cells;
    std::string                text;          // bytes of all generated tokens
    std::vector<int32_t>       text_ends;     // byte offset after each generated token
    std::vector<TokenLogprobs> logprobs;      // per generated token, when asked for
    std::vector<TokenLogprobs> prompt_logprobs;  // per prompt token but the first
    llama_token                stop_token = LLAMA_TOKEN_NULL;
    std::string                error;
    Drafting                   draft;
    int64_t                    start_us = 0, first_us = 0, last_us = 0, sample_us = 0;

    int32_t n_generated() const { return (int32_t) tokens.size() - n_prompt; }
    int32_t n_waiting()   const { return (int32_t) tokens.size() - n_past; }
    // Several tokens wait when the sampler knew them without a row (RowSampler::forced).
    bool    decoding()    const { return n_generated() >= n_waiting() && n_waiting() > 0; }

    void grow(int32_t n);  // n more tokens are in memory
    void cut(int32_t n);   // only the first n still are
    void borrow(const Slot & other, int32_t n);  // the first n cells of another slot
};

}  // namespace llama_crab
