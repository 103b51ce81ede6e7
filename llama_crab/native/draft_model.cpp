#include "draft_model.h"

#include <algorithm>
#include <cstring>

namespace llama_crab {

namespace {

constexpr int32_t n_vocab_slack  = 128;  // padding at the end of a vocabulary
constexpr int32_t n_vocab_marks  = 5;    // the first ids often are marks with other names
constexpr size_t  n_copy_min     = 32;   // tokens that make copying cells worth it

std::string quoted(const char * text) { return "'" + std::string(text) + "'"; }

size_t n_common(const std::vector<llama_token> & a, const std::vector<llama_token> & b) {
    const size_t n = std::min(a.size(), b.size());
    return (size_t) (std::mismatch(a.begin(), a.begin() + (ptrdiff_t) n, b.begin()).first - a.begin());
}

// The mark that is added at one end of a text, or what it says about adding none.
std::string end_mark(const char * name, bool added, llama_token token) {
    return added ? std::string(name) + " token " + std::to_string(token)
                 : std::string("no ") + name + " token";
}

}  // namespace

std::string vocab_difference(const llama_vocab * target, const llama_vocab * draft) {
    const auto differ = [](const std::string & what, const std::string & a, const std::string & b) {
        return what + " " + a + " in the target and " + b + " in the draft model";
    };
    if (llama_vocab_type(target) != llama_vocab_type(draft)) {
        return differ("the type of the tokenizer is", std::to_string(llama_vocab_type(target)),
                      std::to_string(llama_vocab_type(draft)));
    }
    for (const bool begin : {true, false}) {
        const auto mark = [&](const llama_vocab * vocab) {
            return begin ? end_mark("BOS", llama_vocab_get_add_bos(vocab), llama_vocab_bos(vocab))
                         : end_mark("EOS", llama_vocab_get_add_eos(vocab), llama_vocab_eos(vocab));
        };
        if (mark(target) != mark(draft)) {
            return differ(begin ? "a text begins with" : "a text ends with", mark(target), mark(draft));
        }
    }
    const int32_t n_target = llama_vocab_n_tokens(target);
    const int32_t n_draft  = llama_vocab_n_tokens(draft);
    for (int32_t id = n_vocab_marks; id < std::min(n_target, n_draft); ++id) {
        const char * a = llama_vocab_get_text(target, id);
        const char * b = llama_vocab_get_text(draft, id);
        if (std::strcmp(a, b) != 0) {
            return differ("token " + std::to_string(id) + " is", quoted(a), quoted(b));
        }
    }
    if (std::abs(n_target - n_draft) > n_vocab_slack) {
        return differ("the number of tokens is", std::to_string(n_target), std::to_string(n_draft));
    }
    return "";
}

DraftModel::DraftModel(ContextPtr target, ContextPtr context, int32_t n_max, float p_min)
    : target_(std::move(target)),
      context_(std::move(context)),
      memory_(llama_get_memory(context_->ctx)),
      vocab_(llama_model_get_vocab(context_->model->model)),
      n_vocab_(std::min(llama_vocab_n_tokens(vocab_),
                        llama_vocab_n_tokens(llama_model_get_vocab(target_->model->model)))),
      n_row_(llama_vocab_n_tokens(vocab_)),
      n_ubatch_((int32_t) llama_n_ubatch(context_->ctx)),
      n_ctx_seq_((int32_t) llama_n_ctx_seq(context_->ctx)),
      n_swa_(context_->swa_full ? 0 : llama_model_n_swa(context_->model->model)),
      unified_(context_->kv_unified || llama_n_seq_max(context_->ctx) == 1),
      shares_threads_(llama_n_threads(context_->ctx) <= llama_n_threads(target_->ctx) &&
                      llama_n_threads_batch(context_->ctx) <= llama_n_threads_batch(target_->ctx)),
      n_threads_(llama_n_threads(context_->ctx)),
      n_threads_batch_(llama_n_threads_batch(context_->ctx)),
      n_max_(n_max),
      p_min_(p_min),
      batch_(llama_batch_init((int32_t) llama_n_batch(context_->ctx), 0, 1)),
      held_(llama_n_seq_max(context_->ctx)) {
    ++live.drafters;
}

DraftModel::~DraftModel() {
    --live.drafters;
    llama_batch_free(batch_);
}

void DraftModel::draft(std::vector<Want> & wants, Status & status) {
    for (Want & want : wants) {
        want.draft->clear();
    }
    if (context_->broken) {
        status.set(Status::failed, "an assertion of llama.cpp failed in the draft model's context");
        return;
    }
    std::vector<Work> works;
    guarded(status, [&] {
        if (shares_threads_ && !context_->shares_threads(*target_)) {
            context_->share_threads(*target_, n_threads_, n_threads_batch_);
        }
        for (Want & want : wants) {
            // The last token that is drafted takes no cell.
            const int32_t n_room  = n_ctx_seq_ - (int32_t) want.tokens->size() + 1;
            const int32_t n_draft = std::min({want.n_max, n_max_, n_room});
            if (!want.tokens->empty() && n_draft > 0 && (size_t) want.seq < held_.size() &&
                knows(want)) {
                works.push_back({&want, n_draft});
            }
        }
        // What one sequence is about to remove may be the beginning of another one.
        for (const Work & work : works) {
            copy_prefix(*work.want);
        }
        for (const Work & work : works) {
            keep_prefix(*work.want);
        }
        // Neighbours in the batch share a micro-batch.
        std::sort(works.begin(), works.end(),
                  [](const Work & a, const Work & b) { return a.want->seq < b.want->seq; });
        plan(works);
    });
    while (status.kind == Status::ok && batch_.n_tokens > 0 && !target_->abort_requested() &&
           decode(works, status)) {
        guarded(status, [&] {
            batch_.n_tokens = 0;
            for (Work & work : works) {
                const bool goes_on = work.row >= 0 && choose(work);
                work.n_taken       = 0;
                work.row           = -1;
                if (goes_on) {
                    add(work, &work.want->draft->back(), 1, true);
                }
            }
        });
    }
}

bool DraftModel::can_cut(int32_t seq, size_t n) const {
    // A sliding window may have dropped cells that the shorter prefix still attends to.
    return n_swa_ == 0 || llama_memory_seq_pos_min(memory_, seq) <= std::max(0, (int32_t) n - n_swa_);
}

// The last token is always decoded: its row is needed.
size_t DraftModel::n_usable(const Want & want, size_t seq) const {
    return std::min(n_common(held_[seq], *want.tokens), want.tokens->size() - 1);
}

// Takes over the cells of the sequence that has most of the text, if that is worth it.
void DraftModel::copy_prefix(const Want & want) {
    size_t n_least = n_usable(want, (size_t) want.seq) + n_copy_min;
    if (want.tokens->size() <= n_least) {
        return;
    }
    int32_t best = -1;
    for (size_t seq = 0; seq < held_.size(); ++seq) {
        const size_t n = n_usable(want, seq);
        if (n >= n_least && can_cut((int32_t) seq, n)) {
            n_least = n;
            best    = (int32_t) seq;
        }
    }
    if (best < 0) {
        return;
    }
    llama_memory_seq_rm(memory_, want.seq, -1, -1);
    // A stream is copied as a whole.
    llama_memory_seq_cp(memory_, best, want.seq, unified_ ? 0 : -1,
                        unified_ ? (llama_pos) n_least : -1);
    if (!unified_) {
        llama_memory_seq_rm(memory_, want.seq, (llama_pos) n_least, -1);
    }
    held_[(size_t) want.seq].assign(want.tokens->begin(),
                                    want.tokens->begin() + (ptrdiff_t) n_least);
}

// Removes what is not the beginning of the text.
void DraftModel::keep_prefix(const Want & want) {
    std::vector<llama_token> & held = held_[(size_t) want.seq];
    size_t                     n    = n_usable(want, (size_t) want.seq);
    if (n < held.size()) {
        if (n == 0 || !can_cut(want.seq, n) ||
            !llama_memory_seq_rm(memory_, want.seq, (llama_pos) n, -1)) {
            llama_memory_seq_rm(memory_, want.seq, -1, -1);
            n = 0;
        }
        held.resize(n);
    }
}

// A larger vocabulary of the target has tokens that this model cannot read.
bool DraftModel::knows(const Want & want) const {
    const size_t n = n_common(held_[(size_t) want.seq], *want.tokens);
    return std::all_of(want.tokens->begin() + (ptrdiff_t) n, want.tokens->end(),
                       [&](llama_token id) { return id >= 0 && id < n_vocab_; });
}

// The first batch: what each sequence lacks, those that lack little first.
void DraftModel::plan(std::vector<Work> & works) {
    batch_.n_tokens = 0;
    std::vector<Work *> order;
    for (Work & work : works) {
        order.push_back(&work);
    }
    const auto n_missing = [&](const Work & work) {
        return (int32_t) (work.want->tokens->size() - held_[(size_t) work.want->seq].size());
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](const Work * a, const Work * b) { return n_missing(*a) < n_missing(*b); });
    int32_t n_left = std::max(n_ubatch_, (int32_t) works.size());
    for (Work * work : order) {
        work->n_taken = std::min(n_missing(*work), n_left);
        n_left -= work->n_taken;
    }
    for (Work & work : works) {
        const int32_t n = work.n_taken;
        if (n > 0) {
            const llama_token * from =
                work.want->tokens->data() + held_[(size_t) work.want->seq].size();
            add(work, from, n, n == n_missing(work));
        }
    }
}

void DraftModel::add(Work & work, const llama_token * tokens, int32_t n, bool output) {
    const int32_t n_past = (int32_t) held_[(size_t) work.want->seq].size();
    work.n_taken         = n;
    for (int32_t i = 0; i < n; ++i) {
        const int32_t at     = batch_.n_tokens++;
        batch_.token[at]     = tokens[i];
        batch_.pos[at]       = n_past + i;
        batch_.n_seq_id[at]  = 1;
        batch_.seq_id[at][0] = work.want->seq;
        batch_.logits[at]    = output && i == n - 1;
    }
    if (output) {
        work.row = batch_.n_tokens - 1;
    }
}

bool DraftModel::decode(const std::vector<Work> & works, Status & status) {
    run_batch(*context_, batch_, false, status);
    if (status.kind == Status::failed && status.code == 1 && forget_idle(works)) {
        status = Status();
        run_batch(*context_, batch_, false, status);
    }
    if (status.kind == Status::ok) {
        int32_t at = 0;
        for (const Work & work : works) {
            auto & held = held_[(size_t) work.want->seq];
            held.insert(held.end(), batch_.token + at, batch_.token + at + work.n_taken);
            at += work.n_taken;
        }
        return true;
    }
    if (context_->broken) {
        mark_broken(*context_, *target_);
    } else {
        resync(works);
    }
    return false;
}

// Makes room in cells that all sequences share; false when there is none to be made.
bool DraftModel::forget_idle(const std::vector<Work> & works) {
    bool found = false;
    for (size_t seq = 0; seq < held_.size(); ++seq) {
        const bool idle = std::none_of(works.begin(), works.end(), [&](const Work & work) {
            return work.want->seq == (int32_t) seq;
        });
        if (idle && !held_[seq].empty()) {
            llama_memory_seq_rm(memory_, (llama_seq_id) seq, -1, -1);
            held_[seq].clear();
            found = true;
        }
    }
    return found;
}

// Takes the best token of the sequence's row; false when its draft ends.
bool DraftModel::choose(Work & work) {
    float * logits = llama_get_logits_ith(context_->ctx, work.row);
    if (logits == nullptr || !row_.open(logits, n_row_)) {
        return false;
    }
    const llama_token id = row_.argmax();
    if (id >= n_vocab_ || (p_min_ > 0.0f && 1.0 / row_.sum_exp(1.0f) < p_min_)) {
        return false;
    }
    work.want->draft->push_back(id);
    return (int32_t) work.want->draft->size() < work.n_draft && !llama_vocab_is_eog(vocab_, id);
}

// After a failed batch: some of its micro-batches may be in memory, and others have dropped what
// they touched.
void DraftModel::resync(const std::vector<Work> & works) {
    Status ignored;  // the batch's own failure is the one to report
    guarded(ignored, [&] {
        for (const Work & work : works) {
            const int32_t seq = work.want->seq;
            auto &        held = held_[(size_t) seq];
            const size_t  n_in_memory = (size_t) (llama_memory_seq_pos_max(memory_, seq) + 1);
            held.resize(std::min(held.size(), n_in_memory));
            if (n_in_memory > held.size() &&
                !llama_memory_seq_rm(memory_, seq, (llama_pos) held.size(), -1)) {
                llama_memory_seq_rm(memory_, seq, -1, -1);
                held.clear();
            }
        }
    });
}

}  // namespace llama_crab
