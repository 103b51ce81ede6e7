// Drafts: which tokens may follow, and what became of them.
#include <algorithm>

#include "logsink.h"
#include "stepper.h"

namespace llama_crab {

bool Stepper::draftable(const Slot & slot) const {
    // What Python changes in a row is known only when the tokens before it are.
    return plannable(slot) && slot.decoding() && slot.request.speculation.n_max > 0 &&
           !slot.request.processed && slot.request.adapters == adapters_ && can_draft();
}

// Tokens that a draft may have: the answer's end gives one that was not drafted.
int32_t Stepper::draft_room(const Slot & slot) const {
    int32_t n = std::min(slot.request.speculation.n_max, n_ctx_seq_ - (int32_t) slot.tokens.size());
    if (slot.request.max_tokens >= 0) {
        n = std::min(n, slot.request.max_tokens - slot.n_generated() - 1);
    }
    return std::max(n, 0);
}

void Stepper::propose(int32_t n_tokens_max) {
    offers_.clear();
    bool    drafts  = false;
    int32_t n_tokens = 0, n_rows = 0;
    for (size_t i = 0; i < slots_.size(); ++i) {
        const Slot & slot = slots_[i];
        base_[i] = plannable(slot) && slot.request.adapters == adapters_ ? slot.n_waiting() : 0;
        n_tokens += base_[i];
        n_rows += base_[i] > 0;
        drafts |= draftable(slot);
        if (base_[i] > 0 && !slot.decoding()) {
            drop_drafts();  // prompts fill the batch
            return;
        }
    }
    if (!drafts) {
        return;
    }
    const int64_t begin_us = llama_time_us();
    for (int32_t i = 0; i < n_slots(); ++i) {
        Slot & slot = slots_[(size_t) i];
        if (!draftable(slot)) {
            continue;
        }
        const Speculation & wanted = slot.request.speculation;
        const int32_t       n_max  = draft_room(slot);
        if (!wanted.user) {
            slot.draft.drop();
        }
        int32_t n = std::min(n_max, (int32_t) slot.draft.tokens.size());
        slot.draft.tokens.resize((size_t) n);
        if (n > 0) {
            slot.draft.origin = DraftOrigin::user;
            slot.draft.agreed = 1;
        } else {
            look_up(slot, n_max);
            n = (int32_t) slot.draft.tokens.size();
        }
        slot.draft.at     = (int32_t) slot.tokens.size();
        slot.draft.n_held = 0;
        slot.draft.guess  = n > 0 ? slot.draft.tokens[0] : LLAMA_TOKEN_NULL;
        if (n == 0 && wanted.model && draft_source_ != nullptr) {
            slot.draft.origin = DraftOrigin::model;
            slot.draft.agreed = 1;
            n = std::min(n_max, draft_source_->n_max());
        }
        if (n > 0) {
            offers_.push_back({i, slot.draft.origin, slot.draft.agreed, n, wanted.fixed,
                               &slot.draft.acceptance});
        }
    }
    const int32_t room = std::min(std::min(n_tokens_max, n_batch_) - n_tokens,
                                  context_->n_outputs_max - n_rows);
    control_.choose(base_, offers_, std::max(room, 0), lengths_);
    wants_.clear();
    for (size_t k = 0; k < offers_.size(); ++k) {
        Slot & slot = slots_[(size_t) offers_[k].slot];
        if (offers_[k].origin == DraftOrigin::model) {
            if (lengths_[k] > 0) {
                wants_.push_back({offers_[k].slot, &slot.tokens, lengths_[k], &slot.draft.tokens});
            }
        } else {
            slot.draft.tokens.resize((size_t) lengths_[k]);
        }
    }
    counters->drafting_us.add(llama_time_us() - begin_us);
    if (!wants_.empty()) {
        ask_source();
    }
}

void Stepper::look_up(Slot & slot, int32_t n_max) {
    const Speculation & wanted = slot.request.speculation;
    Drafting &          draft  = slot.draft;
    if (wanted.max_ngram > 0) {
        if (!draft.index) {
            draft.index.emplace(wanted.min_ngram, wanted.max_ngram);
        }
        draft.index->extend(slot.tokens);
        draft.origin = DraftOrigin::lookup;
        draft.agreed = draft.index->draft(slot.tokens, n_max, draft.tokens);
    }
    if (draft.tokens.empty() && wanted.cache != nullptr) {
        draft.origin = DraftOrigin::cache;
        draft.agreed = wanted.cache->draft(slot.tokens, n_max, draft.tokens);
    }
}

void Stepper::ask_source() {
    const int64_t begin_us = llama_time_us();
    Status status;
    draft_source_->draft(wants_, status);
    const int64_t us = llama_time_us() - begin_us;
    int32_t n = 0;
    for (const DraftSource::Want & want : wants_) {
        if (status.kind != Status::ok) {
            want.draft->clear();
        }
        want.draft->resize(std::min(want.draft->size(), (size_t) want.n_max));
        n += (int32_t) want.draft->size();
    }
    control_.observe_drafting(DraftOrigin::model, n, us);
    counters->drafting_us.add(us);
    lose_source(status);
}

void Stepper::tell_source() {
    if (draft_source_ != nullptr) {
        Status status;
        draft_source_->decoded(batch_, status);
        lose_source(status);
    }
}

// What reads the model's hidden states must know that some are of tokens that are gone.
void Stepper::rewind_source(int32_t i, int32_t n) {
    if (draft_source_ != nullptr) {
        draft_source_->rewind(i, n);
    }
}

// Without drafts the answers are the same.
void Stepper::lose_source(const Status & status) {
    if (status.kind != Status::ok) {
        log_warn("drafts are given up: " + status.message);
        draft_source_.reset();
    }
}

// Returns whether there were any.
bool Stepper::drop_drafts() {
    bool any = false;
    for (Slot & slot : slots_) {
        any |= !slot.draft.tokens.empty();
        slot.draft.drop();
        slot.draft.guess = LLAMA_TOKEN_NULL;
    }
    return any;
}

// Counts the drafted tokens that have become tokens of the slot.
void Stepper::advance_draft(Slot & slot) {
    Drafting & draft = slot.draft;
    while (draft.n_held < (int32_t) draft.tokens.size()) {
        const size_t at = (size_t) (draft.at + draft.n_held);
        if (at >= slot.tokens.size() || slot.tokens[at] != draft.tokens[(size_t) draft.n_held]) {
            break;
        }
        ++draft.n_held;
    }
}

void Stepper::settle_drafts() {
    int32_t n_slots_given = 0, n_given = 0;
    for (int32_t i = 0; i < n_slots(); ++i) {
        if (added_[(size_t) i] > 0) {
            ++n_slots_given;
            n_given += 1 + slots_[(size_t) i].draft.n_held;
            settle_draft(i);
        }
    }
    if (n_prompt_ == 0 && n_slots_given > 0) {
        control_.observe_batch(added_, n_drafted_, n_slots_given, n_given, decode_us_);
        counters->draft_saved_us.add(control_.saved_us());
    }
}

void Stepper::settle_draft(int32_t i) {
    Slot &        slot      = slots_[(size_t) i];
    Drafting &    draft     = slot.draft;
    const int32_t n_drafted = (int32_t) draft.tokens.size();
    // A drafted token counts when its place was reached: by another token, or by one that ended the
    // answer and is no part of it.
    const bool ended = slot.finish == Finish::eog || slot.finish == Finish::stop_token;
    const auto reached = [&](int32_t place) {
        return place < (int32_t) slot.tokens.size() || ended;
    };
    for (int32_t k = 0; k < draft.n_held; ++k) {
        control_.observe_token(draft.origin, draft.acceptance, draft.agreed + k, true);
    }
    if (draft.n_held < n_drafted) {
        if (reached(draft.at + draft.n_held)) {
            control_.observe_token(draft.origin, draft.acceptance, draft.agreed + draft.n_held, false);
        }
    } else if (n_drafted == 0 && draft.guess != LLAMA_TOKEN_NULL && reached(draft.at)) {
        const bool held = draft.at < (int32_t) slot.tokens.size() &&
                          slot.tokens[(size_t) draft.at] == draft.guess;
        control_.observe_token(draft.origin, draft.acceptance, draft.agreed, held);
    }
    draft.guess = LLAMA_TOKEN_NULL;
    if (n_drafted == 0) {
        return;
    }
    counters->n_drafted.add(n_drafted);
    counters->n_draft_accepted.add(draft.n_held);
    draft.n_drafted += n_drafted;
    draft.n_accepted += draft.n_held;
    const int32_t n_valid = draft.at + draft.n_held;
    if (slot.n_past > n_valid) {
        if (!llama_memory_seq_rm(memory_, i, n_valid, -1)) {
            remove_cells(i);
        }
        slot.cut(n_valid);
        rewind_source(i, slot.n_past);
    }
    draft.drop();
}

const std::vector<int32_t> & Stepper::slots_to_draft() {
    to_draft_.clear();
    for (int32_t i = 0; i < n_slots(); ++i) {
        Slot & slot = slots_[(size_t) i];
        slot.draft.drop();
        if (slot.request.speculation.user && draftable(slot) && draft_room(slot) > 0) {
            to_draft_.push_back(i);
        }
    }
    return to_draft_;
}

void Stepper::set_draft(int32_t i, std::vector<llama_token> tokens) {
    slots_[(size_t) i].draft.tokens = std::move(tokens);
}

}  // namespace llama_crab
