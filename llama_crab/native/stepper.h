// The work of one engine step without the GIL: plan a batch, decode it, sample every row that
// needs it, turn the tokens into bytes.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "handles.h"
#include "logits_row.h"
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

// What a request asks of one sequence. Lengths and ids were checked by L2.
struct SlotRequest {
    std::vector<llama_token> prompt;
    int32_t                  n_keep         = 0;   // leading prompt tokens that stay in memory
    int32_t                  leader         = -1;  // slot whose prefill this one copies
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
};

// One sequence of the context and what it is working on. tokens[0, n_past) are in memory.
struct Slot {
    bool                       active = false;
    Finish                     finish = Finish::none;
    SlotRequest                request;
    std::vector<llama_token>   tokens;
    int32_t                    n_past   = 0;
    int32_t                    n_prompt = 0;
    int32_t                    n_cached = 0;  // prompt tokens that needed no decode
    std::string                text;          // bytes of all generated tokens
    std::vector<int32_t>       text_ends;     // byte offset after each generated token
    std::vector<TokenLogprobs> logprobs;      // per generated token, when asked for
    std::vector<TokenLogprobs> prompt_logprobs;  // per prompt token but the first
    llama_token                stop_token = LLAMA_TOKEN_NULL;
    std::string                error;
    uint64_t                   order = 0;     // admission order: first come, first prefilled
    int64_t                    start_us = 0, first_us = 0, last_us = 0, sample_us = 0;

    int32_t n_generated() const { return (int32_t) tokens.size() - n_prompt; }
    int32_t n_waiting()   const { return (int32_t) tokens.size() - n_past; }
    // Several tokens wait when the sampler knew them without a row (RowSampler::forced).
    bool    decoding()    const { return n_generated() >= n_waiting() && n_waiting() > 0; }
};

class Stepper {
public:
    explicit Stepper(ContextPtr context);
    ~Stepper();
    Stepper(const Stepper &) = delete;

    // Longest prefix of `tokens` whose memory slot `i` can keep; 0 when it cannot be trusted.
    int32_t reusable_prefix(int32_t i, const std::vector<llama_token> & tokens) const;

    // Gives slot `i` a request. Returns the prompt tokens kept, which is 0 when llama.cpp refuses
    // to remove the rest of the old sequence.
    int32_t assign(int32_t i, SlotRequest request, Status & status);

    // A step is these three. `decode` runs at most `n_tokens_max` tokens; `copy_rows` copies the rows
    // that are to be processed by others, one for each of the slots it returns; `sample` chooses from
    // those copies and from the context's other rows. `events` then names the slots with news.
    void decode(int32_t n_tokens_max, Status & status);
    const std::vector<int32_t> & slots_to_process();
    void copy_rows(float * rows);
    void sample(Status & status);

    // Instead of `sample`: the rows count as not decoded, the next step decodes them again.
    void discard_rows() { resync(); }

    // Ends slot `i` with an error.
    void fail(int32_t i, const std::string & message);

    // Ends slot `i`; its memory stays for the next request with the same prefix.
    void release(int32_t i, Finish finish);

    // Forgets slot `i`'s tokens and removes its sequence from memory.
    void clear(int32_t i);

    const Slot & slot(int32_t i) const { return slots_[(size_t) i]; }
    int32_t      n_slots() const { return (int32_t) slots_.size(); }

    std::vector<int32_t> events;
    int64_t              n_steps = 0, n_decoded = 0;
    int64_t              decode_us = 0, sample_us = 0;  // inside llama.cpp and in choosing tokens

private:
    struct Row {
        int32_t slot;
        int32_t index;   // row of the batch
        int32_t target;  // position whose token the row predicts
    };

    void add_token(int32_t i, bool output);
    void plan(int32_t n_tokens_max);
    void resync();
    void sample_row(int32_t i);
    void start_followers(int32_t leader);
    void choose(int32_t i);
    void append_forced(int32_t i);
    bool may_end(const Slot & slot, llama_token token) const;
    void give_token(int32_t i, llama_token token);
    void take_token(Slot & slot, llama_token token);
    void finish(int32_t i, Finish reason);
    void tell(int32_t i);
    TokenLogprobs logprobs_of(llama_token token, int32_t n_top);

    ContextPtr               context_;
    const llama_vocab *      vocab_;
    llama_memory_t           memory_;
    const int32_t            n_vocab_;
    const int32_t            n_batch_;
    const int32_t            n_ctx_seq_;
    const int32_t            n_swa_;
    const bool               recurrent_;
    llama_batch              batch_;
    std::vector<Slot>        slots_;
    std::vector<int32_t>     plan_order_;
    std::vector<Row>         rows_;
    std::vector<int32_t>     added_;      // tokens of this batch per slot
    std::vector<llama_token> eog_tokens_;
    std::vector<int32_t>     processed_;       // slots that sample from `processed_rows_`,
    std::vector<int32_t>     processed_from_;  // and the batch rows that those are copies of
    float *                  processed_rows_ = nullptr;
    std::vector<char>        piece_;
    LogitsRow                row_;           // the context's row under work
    bool                     row_ok_ = false;  // it can be sampled
    LogitsRow                processed_row_;
    TokenList                best_;
    uint64_t                 next_order_ = 0;
};

}  // namespace llama_crab
