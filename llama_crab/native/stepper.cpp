#include "stepper.h"

#include <algorithm>
#include <limits>

namespace llama_crab {

namespace {

// Tokens that a grammar forces, decoded in one batch: it must fit a micro-batch beside others.
constexpr int32_t max_forced = 16;

}  // namespace

Stepper::Stepper(ContextPtr context)
    : context_(std::move(context)),
      vocab_(llama_model_get_vocab(context_->model->model)),
      memory_(llama_get_memory(context_->ctx)),
      n_vocab_(llama_vocab_n_tokens(vocab_)),
      n_batch_((int32_t) llama_n_batch(context_->ctx)),
      n_ctx_seq_((int32_t) llama_n_ctx_seq(context_->ctx)),
      n_swa_(llama_model_n_swa(context_->model->model)),
      recurrent_(llama_model_is_recurrent(context_->model->model) ||
                 llama_model_is_hybrid(context_->model->model)),
      unified_(context_->kv_unified || llama_n_seq_max(context_->ctx) == 1),
      batch_(llama_batch_init(n_batch_, 0, 1)),
      slots_((size_t) llama_n_seq_max(context_->ctx)),
      added_(slots_.size(), 0),
      in_batch_(slots_.size()),
      copy_pending_(slots_.size(), 0),
      adapter_sets_(1),
      control_(!unified_),
      base_(slots_.size(), 0) {
    for (llama_token id = 0; id < n_vocab_; ++id) {
        if (llama_vocab_is_eog(vocab_, id)) {
            eog_tokens_.push_back(id);
        }
    }
    ++live.steppers;
}

Stepper::~Stepper() {
    --live.steppers;
    llama_batch_free(batch_);
}

void Stepper::decode(int32_t n_tokens_max, Status & status) {
    events.clear();
    processed_.clear();
    choose_adapters(status);
    guarded(status, [&] { propose(n_tokens_max); });
    plan(n_tokens_max);
    if (batch_.n_tokens == 0 || status.kind != Status::ok) {
        return;
    }
    const int64_t begin_us = llama_time_us();
    run_batch(*context_, batch_, false, status);
    if (status.code == 1 && status.kind != Status::ok && drop_drafts()) {
        // There may be cells for what has to be decoded.
        status = Status();
        plan(n_tokens_max);
        run_batch(*context_, batch_, false, status);
    }
    for (std::atomic<int32_t> & n : in_batch_) {
        n.store(0, std::memory_order_relaxed);
    }
    if (status.kind == Status::ok || status.code == 1 || status.code == 2) {
        std::fill(copy_pending_.begin(), copy_pending_.end(), 0);
    }
    if (status.kind != Status::ok) {
        if (!context_->broken && status.code != 1) {
            resync();
        }
        return;
    }
    counters->n_steps.add(1);
    counters->n_decoded.add(batch_.n_tokens);
    counters->n_prefilled.add(n_prompt_);
    for (size_t i = 0; i < slots_.size(); ++i) {
        slots_[i].grow(added_[i]);
        if (added_[i] > 0 && slots_[i].n_past == slots_[i].request.checkpoint) {
            tell((int32_t) i);
        }
    }
    // The device works asynchronously until its output is asked for.
    guarded(status, [&] {
        start_sharers();
        llama_synchronize(context_->ctx);
    });
    decode_us_ = llama_time_us() - begin_us;
    counters->decode_us.add(decode_us_);
    counters->prefill_us.add(decode_us_ * n_prompt_ / batch_.n_tokens);
    if (n_drafted_ == 0) {
        budget.observe(n_decoding_, n_prompt_, decode_us_);
    }
    tell_source();
}

const std::vector<int32_t> & Stepper::slots_to_process() {
    processed_from_.clear();
    for (const Row & row : rows_) {
        if (row.target < (int32_t) slots_[(size_t) row.slot].tokens.size()) {
            continue;
        }
        for (int32_t i = 0; i < n_slots(); ++i) {
            const Slot & slot = slots_[(size_t) i];
            const bool uses_row = i == row.slot || (slot.active && slot.request.leader == row.slot);
            if (uses_row && slot.request.processed && slot.request.max_tokens != 0) {
                processed_.push_back(i);
                processed_from_.push_back(row.index);
            }
        }
    }
    return processed_;
}

void Stepper::copy_rows(float * rows) {
    processed_rows_ = rows;
    for (int32_t index : processed_from_) {
        // Without logits `sample` ends the slot before it looks at the copy.
        if (const float * logits = llama_get_logits_ith(context_->ctx, index)) {
            std::copy(logits, logits + n_vocab_, rows);
        }
        rows += n_vocab_;
    }
}

void Stepper::sample(Status & status) {
    const int64_t begin_us = llama_time_us();
    guarded(status, [&] {
        for (const Row & row : rows_) {
            Slot & slot = slots_[(size_t) row.slot];
            if (slot.draft.tokens.size() > 0 && row.target > slot.draft.at + slot.draft.n_held) {
                continue;  // behind a drafted token that was not chosen
            }
            float * logits = llama_get_logits_ith(context_->ctx, row.index);
            if (logits == nullptr) {
                fail(row.slot, "llama.cpp returned no logits");
                continue;
            }
            row_ok_ = row_.open(logits, n_vocab_);
            if (row.target < (int32_t) slot.tokens.size()) {
                // A prompt that is decoded again after an abort has given some of them already.
                if ((int32_t) slot.prompt_logprobs.size() + 1 == row.target &&
                    row.target < slot.n_prompt) {
                    slot.prompt_logprobs.push_back(
                        logprobs_of(slot.tokens[(size_t) row.target], slot.request.n_logprobs));
                }
            } else {
                // Followers first: their copy must hold the prompt alone.
                start_followers(row.slot);
                sample_row(row.slot);
            }
            advance_draft(slot);
        }
        settle_drafts();
    });
    rows_.clear();
    counters->sample_us.add(llama_time_us() - begin_us);
}

void Stepper::start_followers(int32_t leader) {
    for (int32_t i = 0; i < n_slots(); ++i) {
        Slot & slot = slots_[(size_t) i];
        if (!slot.active || slot.request.leader != leader) {
            continue;
        }
        copy_cells(leader, i, slot.n_prompt);
        slot.borrow(slots_[(size_t) leader], slot.n_prompt);
        slot.request.leader = -1;
        slot.n_cached       = slot.n_prompt;
        sample_row(i);
    }
}

TokenLogprobs Stepper::logprobs_of(llama_token token, int32_t n_top) {
    TokenLogprobs result;
    const float lse = row_.log_sum_exp();
    row_.top(n_top, best_);
    for (size_t i = 0; i < best_.size(); ++i) {
        result.top.emplace_back(best_.ids[i], best_.logits[i] - lse);
    }
    result.logprob = row_.data()[token] - lse;
    return result;
}

// Below min_tokens nothing may end the answer.
bool Stepper::may_end(const Slot & slot, llama_token token) const {
    const bool early = slot.n_generated() < slot.request.min_tokens;
    const std::vector<llama_token> & stops = slot.request.stop_tokens;
    return !((early || slot.request.ignore_eos) && llama_vocab_is_eog(vocab_, token)) &&
           !(early && std::binary_search(stops.begin(), stops.end(), token));
}

void Stepper::sample_row(int32_t i) {
    Slot & slot = slots_[(size_t) i];
    if (!slot.active) {
        return;  // a logits processor has failed
    }
    if (slot.request.max_tokens == 0) {
        finish(i, Finish::length);  // the prompt alone was asked for
        return;
    }
    const int64_t begin_us = llama_time_us();
    choose(i);
    if (slot.active) {
        append_forced(i);
    }
    slot.sample_us += llama_time_us() - begin_us;
    if (slot.active && slot.request.emit) {
        tell(i);
    }
}

void Stepper::choose(int32_t i) {
    Slot & slot = slots_[(size_t) i];
    const auto at = std::find(processed_.begin(), processed_.end(), i);
    LogitsRow * row = &row_;
    bool        ok  = row_ok_;
    if (at != processed_.end()) {
        row = &processed_row_;
        ok  = row->open(processed_rows_ + (at - processed_.begin()) * n_vocab_, n_vocab_);
    }
    if (!ok) {
        fail(i, bad_row);
        return;
    }
    // The row belongs to the context and other slots may share it: what is masked is put back.
    const float banned = -std::numeric_limits<float>::infinity();
    const bool  early  = slot.n_generated() < slot.request.min_tokens;
    if (early || slot.request.ignore_eos) {
        for (llama_token token : eog_tokens_) {
            row->edit(token, banned);
        }
    }
    if (early) {
        for (llama_token token : slot.request.stop_tokens) {
            row->edit(token, banned);
        }
    }
    Status status;
    llama_token token = slot.request.sampler->sample(*row, status);
    row->undo();
    if (token != LLAMA_TOKEN_NULL) {
        slot.request.sampler->accept(token, status);
    }
    if (status.kind != Status::ok) {
        fail(i, status.message);
        return;
    }
    if (slot.request.n_logprobs >= 0) {
        // Those of the model, so of the row as it came.
        slot.logprobs.push_back(logprobs_of(token, slot.request.n_logprobs));
    }
    give_token(i, token);
}

// A grammar often leaves a single token: those need no row, and are decoded together.
void Stepper::append_forced(int32_t i) {
    Slot & slot = slots_[(size_t) i];
    if (slot.request.n_logprobs >= 0 || slot.request.processed) {
        return;  // each row is wanted
    }
    Status status;
    while (slot.active && slot.n_waiting() < max_forced) {
        const llama_token token = slot.request.sampler->forced(status);
        if (token == LLAMA_TOKEN_NULL || !may_end(slot, token)) {
            break;
        }
        slot.request.sampler->accept(token, status);
        if (status.kind == Status::ok) {
            give_token(i, token);
        }
    }
    if (status.kind != Status::ok) {
        fail(i, status.message);
    }
}

void Stepper::give_token(int32_t i, llama_token token) {
    Slot & slot = slots_[(size_t) i];
    const int64_t before_us = slot.last_us;
    slot.last_us = llama_time_us();
    if (slot.first_us == 0) {
        slot.first_us = slot.last_us;
        if (slot.request.submit_us != 0) {
            counters->first_token->record(slot.first_us - slot.request.submit_us);
        }
    }
    const std::vector<llama_token> & stops = slot.request.stop_tokens;
    const bool is_stop = std::binary_search(stops.begin(), stops.end(), token);
    if (is_stop || llama_vocab_is_eog(vocab_, token)) {
        if (slot.request.n_logprobs >= 0) {
            slot.logprobs.pop_back();
        }
        slot.stop_token = token;
        finish(i, is_stop ? Finish::stop_token : Finish::eog);
        return;
    }
    take_token(slot, token);
    counters->n_generated.add(1);
    if (before_us != 0 && !slot.was_held) {
        counters->inter_token->record(slot.last_us - before_us);
    }
    slot.was_held = false;
    if (slot.request.max_tokens >= 0 && slot.n_generated() >= slot.request.max_tokens) {
        finish(i, Finish::length);
    } else if ((int32_t) slot.tokens.size() > n_ctx_seq_) {
        // The token just sampled has no position left to be decoded at.
        finish(i, Finish::context_full);
    }
}

void Stepper::take_token(Slot & slot, llama_token token) {
    if (piece_.empty()) {
        piece_.resize(256);
    }
    int32_t n = llama_token_to_piece(vocab_, token, piece_.data(), (int32_t) piece_.size(), 0,
                                     slot.request.special);
    if (n < 0) {
        piece_.resize((size_t) -n);
        n = llama_token_to_piece(vocab_, token, piece_.data(), (int32_t) piece_.size(), 0,
                                 slot.request.special);
    }
    slot.text.append(piece_.data(), (size_t) std::max(0, n));
    slot.text_ends.push_back((int32_t) slot.text.size());
    slot.tokens.push_back(token);
}

void Stepper::finish(int32_t i, Finish reason) {
    release(i, reason);
    tell(i);
}

void Stepper::fail(int32_t i, const std::string & message) {
    slots_[(size_t) i].error = message;
    finish(i, Finish::error);
}

void Stepper::tell(int32_t i) {
    if (events.empty() || events.back() != i) {
        events.push_back(i);
    }
}

void Stepper::release(int32_t i, Finish reason) {
    Slot & slot = slots_[(size_t) i];
    slot.active = false;
    slot.finish = reason;
    if (slot.request.speculation.cache != nullptr && reason != Finish::none) {
        slot.request.speculation.cache->learn(slot.tokens, (size_t) slot.n_prompt,
                                               slot.tokens.size());
    }
    // Of those that wait for its prompt one goes on, and leads the others: what each has in common
    // with the old leader they have in common with each other.
    Slot *  heir    = nullptr;
    int32_t heir_at = -1;
    for (int32_t k = 0; k < n_slots(); ++k) {
        Slot & other = slots_[(size_t) k];
        if (!other.active || other.request.leader != i) {
            continue;
        }
        if (heir == nullptr) {
            heir = &other;
            heir_at = k;
            heir->request.leader = -1;
        } else {
            other.request.leader   = heir_at;
            other.request.n_shared = std::min(other.request.n_shared, heir->request.n_shared);
            if (heir->n_prompt != other.n_prompt) {
                // No other answer to the same prompt: it needs a row of its own.
                other.request.n_shared = std::min(other.request.n_shared, other.n_prompt - 1);
            }
        }
    }
}

}  // namespace llama_crab
