// The work of one engine step without the GIL: plan a batch, decode it, sample every row that
// needs it, turn the tokens into bytes.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "draft_control.h"
#include "draft_source.h"
#include "handles.h"
#include "logits_row.h"
#include "slot.h"
#include "step_budget.h"
#include "step_counters.h"

namespace llama_crab {

// LoRA adapters with their scales; sequences with the same set share batches.
struct AdapterSet {
    std::vector<AdapterPtr> adapters;
    std::vector<float>      scales;
};

class Stepper {
public:
    explicit Stepper(ContextPtr context);
    ~Stepper();
    Stepper(const Stepper &) = delete;

    // How many leading `tokens` slot `i` has in memory such that it can be cut there, or copied;
    // 0 when they cannot be trusted.
    int32_t reusable_prefix(int32_t i, const std::vector<llama_token> & tokens,
                            int32_t adapters) const;

    // Gives slot `i` a request. Returns the prompt tokens that are in memory, which is 0 when
    // llama.cpp refuses to remove the rest of the old sequence.
    int32_t assign(int32_t i, SlotRequest request, Status & status);

    // Takes slot `i`'s work away with all it has given so far; its memory is removed.
    std::unique_ptr<Slot> suspend(int32_t i);

    // Goes on with it in slot `i`, whose first n_keep cells come from `source` as in `assign`.
    int32_t resume(int32_t i, std::unique_ptr<Slot> slot, int32_t source, int32_t n_keep,
                   Status & status);

    // The state of idle or running slot `i` (all that is in memory), and back into an idle one.
    // False where a copy that llama.cpp has put off would be missed or overwrite it.
    bool save(int32_t i, std::vector<uint8_t> & out, Status & status);
    bool restore(int32_t i, const std::vector<llama_token> & tokens, int32_t adapters,
                 const uint8_t * data, size_t size, Status & status);

    // A step is these three. `decode` runs at most `n_tokens_max` tokens; `copy_rows` copies the rows
    // that are to be processed by others, one for each of the slots it returns; `sample` chooses from
    // those copies and from the context's other rows. `events` then names the slots with news.
    void decode(int32_t n_tokens_max, Status & status);
    const std::vector<int32_t> & slots_to_process();
    void copy_rows(float * rows);
    void sample(Status & status);

    // Instead of `sample`: the rows count as not decoded, the next step decodes them again.
    void discard_rows() { resync(); }

    // Slots whose drafts the user makes, to be given by set_draft before the next `decode`.
    const std::vector<int32_t> & slots_to_draft();
    void set_draft(int32_t i, std::vector<llama_token> tokens);

    // Where drafts of requests with speculation.model come from.
    void set_draft_source(std::shared_ptr<DraftSource> source) { draft_source_ = std::move(source); }
    // Whether a rejected draft can be taken out of memory.
    bool can_draft() const { return !recurrent_; }
    const DraftControl & draft_control() const { return control_; }

    // Ends slot `i` with an error.
    void fail(int32_t i, const std::string & message);

    // Ends slot `i`; its memory stays for the next request with the same prefix.
    void release(int32_t i, Finish finish);

    // Forgets slot `i`'s tokens and removes its sequence from memory.
    void clear(int32_t i);

    // A held slot is left out of batches. The time to its next token is its reader's.
    void hold(int32_t i, bool held) {
        Slot & slot   = slots_[(size_t) i];
        slot.held     = held;
        slot.was_held = slot.was_held || held;
    }

    // Puts a LoRA set at `index` (1, 2, ...); no running slot may use the old one.
    void    set_adapters(int32_t index, AdapterSet set);
    int32_t n_adapter_sets() const { return (int32_t) adapter_sets_.size(); }

    // Cells in use by all slots together, shared ones counted once.
    int32_t n_cells_used() const;

    // Cells that the running slots' known tokens will take beyond those.
    int32_t n_cells_to_come() const;

    // Tokens of slot `i` in the batch that is being decoded; from any thread.
    int32_t n_in_batch(int32_t i) const {
        return in_batch_[(size_t) i].load(std::memory_order_relaxed);
    }
    // Whether an aborted batch can be decoded again: a recurrent state is lost with it.
    bool can_abort() const { return !recurrent_; }
    // Whether any prefix of a sequence can be kept: not of a recurrent state, and of a sliding window
    // only while it still covers that place.
    bool can_cut() const { return !recurrent_ && (n_swa_ == 0 || context_->swa_full); }
    // The same of a state that was saved: llama.cpp saves no more than the window.
    bool can_cut_saved() const { return !recurrent_ && n_swa_ == 0; }

    const Slot & slot(int32_t i) const { return slots_[(size_t) i]; }
    int32_t      n_slots() const { return (int32_t) slots_.size(); }

    std::vector<int32_t> events;
    StepBudget           budget;
    const std::shared_ptr<StepCounters> counters = std::make_shared<StepCounters>();

private:
    struct Row {
        int32_t slot;
        int32_t index;   // row of the batch
        int32_t target;  // position whose token the row predicts
    };

    // stepper_plan.cpp
    bool    plannable(const Slot & slot) const;
    void    choose_adapters(Status & status);
    int32_t prompt_stop(int32_t i) const;
    void    plan(int32_t n_tokens_max);
    void    add_tokens(int32_t i);

    // stepper_draft.cpp
    bool    draftable(const Slot & slot) const;
    int32_t draft_room(const Slot & slot) const;
    void    propose(int32_t n_tokens_max);
    void    look_up(Slot & slot, int32_t n_max);
    void    ask_source();
    void    tell_source();
    void    rewind_source(int32_t i, int32_t n);
    void    lose_source(const Status & status);
    bool    drop_drafts();
    void    advance_draft(Slot & slot);
    void    settle_drafts();
    void    settle_draft(int32_t i);

    // stepper_memory.cpp
    int32_t take_cells(int32_t i, Slot & fresh, int32_t source, int32_t n_keep);
    void    copy_cells(int32_t source, int32_t target, int32_t n);
    void    remove_cells(int32_t i);
    void    resync();
    void    start_sharers();

    // stepper.cpp
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
    const bool               unified_;
    llama_batch              batch_;
    std::vector<Slot>        slots_;
    std::vector<int32_t>     prompts_;    // slots that prefill, by rank
    std::vector<Row>         rows_;
    std::vector<int32_t>     added_;      // tokens of this batch per slot
    std::vector<std::atomic<int32_t>> in_batch_;  // the same, for other threads
    int32_t                  n_decoding_ = 0, n_prompt_ = 0;  // tokens of this batch by kind
    int32_t                  n_drafted_ = 0;                  // of the first kind, only hoped for
    int64_t                  decode_us_ = 0;                  // of this batch
    std::vector<char>        copy_pending_;  // slots of a copy that the next decode makes
    std::vector<AdapterSet>  adapter_sets_;
    int32_t                  adapters_ = 0;        // set that is applied; -1: not known
    int32_t                  n_same_adapters_ = 0; // batches in a row with it
    std::vector<llama_token> eog_tokens_;
    std::vector<int32_t>     processed_;       // slots that sample from `processed_rows_`,
    std::vector<int32_t>     processed_from_;  // and the batch rows that those are copies of
    float *                  processed_rows_ = nullptr;
    std::vector<char>        piece_;
    LogitsRow                row_;           // the context's row under work
    bool                     row_ok_ = false;  // it can be sampled
    LogitsRow                processed_row_;
    TokenList                best_;
    uint64_t                 next_birth_ = 1;
    DraftControl             control_;
    std::shared_ptr<DraftSource> draft_source_;
    std::vector<DraftOffer>  offers_;
    std::vector<int32_t>     base_, lengths_, to_draft_;
    std::vector<DraftSource::Want> wants_;
};

}  // namespace llama_crab
