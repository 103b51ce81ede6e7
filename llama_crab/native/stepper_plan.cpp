// Which tokens go into the next batch.
#include <algorithm>

#include "stepper.h"

namespace llama_crab {

namespace {

// Changing the LoRA set makes llama.cpp plan its graphs anew, so a set keeps its turn for a while.
constexpr int32_t adapters_turn = 8;

}  // namespace

bool Stepper::plannable(const Slot & slot) const {
    return slot.active && !slot.held && slot.request.leader < 0 && slot.n_waiting() > 0;
}

// Sets take turns: all sequences of a batch are computed with the same one.
void Stepper::choose_adapters(Status & status) {
    int32_t next = -1;
    bool    current_waits = false;
    for (const Slot & slot : slots_) {
        if (plannable(slot)) {
            const int32_t set = slot.request.adapters;
            current_waits |= set == adapters_;
            // The smallest behind the current one, round and round.
            const auto distance = [&](int32_t other) {
                const int32_t n = (int32_t) adapter_sets_.size();
                return (other - adapters_ - 1 + n) % n;
            };
            if (next < 0 || distance(set) < distance(next)) {
                next = set;
            }
        }
    }
    if (next < 0 || next == adapters_ || (current_waits && n_same_adapters_ < adapters_turn)) {
        ++n_same_adapters_;
        return;
    }
    const AdapterSet & set = adapter_sets_[(size_t) next];
    llama_crab::set_adapters(*context_, set.adapters, set.scales, status);
    // After a failure nobody knows which of them are applied.
    adapters_        = status.kind == Status::ok ? next : -1;
    n_same_adapters_ = 1;
}

// The position where prefill of slot `i` has to pause: others branch off there, or its state is
// wanted as it is there.
int32_t Stepper::prompt_stop(int32_t i) const {
    const Slot & slot = slots_[(size_t) i];
    int32_t stop = (int32_t) slot.tokens.size();
    if (slot.n_past < slot.request.checkpoint) {
        stop = std::min(stop, slot.request.checkpoint);
    }
    for (const Slot & other : slots_) {
        if (other.active && other.request.leader == i && other.request.n_shared > slot.n_past) {
            stop = std::min(stop, other.request.n_shared);
        }
    }
    return stop;
}

void Stepper::plan(int32_t n_tokens_max) {
    batch_.n_tokens = 0;
    rows_.clear();
    std::fill(added_.begin(), added_.end(), 0);
    n_decoding_ = n_prompt_ = n_drafted_ = 0;
    const int32_t budget_all = std::min(n_tokens_max, n_batch_);
    int32_t       rows_left  = context_->n_outputs_max;

    // Sequences that generate come first: a prompt must not stall them.
    prompts_.clear();
    for (int32_t i = 0; i < n_slots(); ++i) {
        Slot & slot = slots_[(size_t) i];
        if (!plannable(slot) || slot.request.adapters != adapters_) {
            slot.draft.drop();
            continue;
        }
        const int32_t n_draft = (int32_t) slot.draft.tokens.size();
        const int32_t n       = slot.n_waiting() + n_draft;
        if (slot.decoding() && n_decoding_ + n <= budget_all && rows_left > n_draft) {
            added_[(size_t) i] = n;
            n_decoding_ += n;
            n_drafted_ += n_draft;
            rows_left -= 1 + n_draft;
        } else {
            slot.draft.drop();
            prompts_.push_back(i);
        }
    }
    std::sort(prompts_.begin(), prompts_.end(), [&](int32_t a, int32_t b) {
        return slots_[(size_t) a].request.rank < slots_[(size_t) b].request.rank;
    });
    int32_t left = budget_all - n_decoding_;
    if (n_decoding_ > 0) {
        left = budget.prompt_tokens(left);
    }
    for (int32_t i : prompts_) {
        const Slot & slot = slots_[(size_t) i];
        int32_t n = std::min(prompt_stop(i) - slot.n_past, left);
        if (slot.request.prompt_logprobs) {
            n = std::min(n, rows_left);  // each token gives a row
            rows_left -= n;
        } else if (n == slot.n_waiting()) {
            n -= rows_left == 0;
            rows_left -= rows_left > 0;
        }
        added_[(size_t) i] = n;
        n_prompt_ += n;
        left -= n;
    }
    // In the slots' order: with a stream per sequence llama.cpp puts only neighbours into one
    // micro-batch, in the order in which they come.
    for (int32_t i = 0; i < n_slots(); ++i) {
        in_batch_[(size_t) i].store(added_[(size_t) i], std::memory_order_relaxed);
        add_tokens(i);
    }
}

void Stepper::add_tokens(int32_t i) {
    const Slot & slot = slots_[(size_t) i];
    for (int32_t k = 0; k < added_[(size_t) i]; ++k) {
        const int32_t at  = batch_.n_tokens++;
        const int32_t pos = slot.n_past + k;
        const int32_t n_known = (int32_t) slot.tokens.size();
        const bool output = pos + 1 >= n_known ||
                            (slot.request.prompt_logprobs && pos < slot.n_prompt);
        batch_.token[at]     = pos < n_known ? slot.tokens[(size_t) pos]
                                             : slot.draft.tokens[(size_t) (pos - n_known)];
        batch_.pos[at]       = pos;
        batch_.n_seq_id[at]  = 1;
        batch_.seq_id[at][0] = i;
        batch_.logits[at]    = output ? 1 : 0;
        if (output) {
            rows_.push_back({i, at, pos + 1});
        }
    }
}

}  // namespace llama_crab
