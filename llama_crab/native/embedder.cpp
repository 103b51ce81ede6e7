#include "embedder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace llama_crab {

namespace {

// A position beyond a learned table is an assertion in a compute thread, which ends the process.
bool has_position_table(const llama_model * model) {
    char name[32] = "";
    llama_model_meta_val_str(model, "general.architecture", name, sizeof(name));
    const auto is = [&](const char * other) { return std::strcmp(name, other) == 0; };
    return is("bert") || is("gpt2") || is("mpt") || is("starcoder");
}

int32_t batch_room(const ContextHandle & context) {
    const uint32_t n = std::min({llama_n_batch(context.ctx), llama_n_ubatch(context.ctx),
                                 (uint32_t) context.n_outputs_max});
    // Without a memory the size of the context means nothing.
    return (int32_t) (llama_get_memory(context.ctx) == nullptr
        ? n : std::min(n, llama_n_ctx(context.ctx)));
}

int32_t text_room(const ContextHandle & context) {
    int32_t n = batch_room(context);
    if (llama_get_memory(context.ctx) != nullptr) {
        n = std::min(n, (int32_t) llama_n_ctx_seq(context.ctx));
    }
    const llama_model * model = context.model->model;
    return has_position_table(model) ? std::min(n, llama_model_n_ctx_train(model)) : n;
}

void write_row(const float * from, float * to, int32_t n, bool l2) {
    double sum = 0.0;
    for (int32_t i = 0; i < n && l2; ++i) {
        sum += (double) from[i] * from[i];
    }
    const float scale = sum > 0.0 ? (float) (1.0 / std::sqrt(sum)) : 1.0f;
    for (int32_t i = 0; i < n; ++i) {
        to[i] = from[i] * scale;
    }
}

}  // namespace

Embedder::Embedder(ContextPtr context)
    : context_(std::move(context)),
      memory_(llama_get_memory(context_->ctx)),
      per_token_(llama_pooling_type(context_->ctx) == LLAMA_POOLING_TYPE_NONE),
      n_values_(llama_pooling_type(context_->ctx) == LLAMA_POOLING_TYPE_RANK
                    ? (int32_t) llama_model_n_cls_out(context_->model->model)
                    : llama_model_n_embd_out(context_->model->model)),
      n_tokens_max_(batch_room(*context_)),
      n_texts_max_((int32_t) llama_n_seq_max(context_->ctx)),
      n_text_tokens_max_(text_room(*context_)),
      seq_ids_((size_t) n_tokens_max_),
      n_seq_ids_((size_t) n_tokens_max_, 1),
      outputs_((size_t) n_tokens_max_, 1) {
    for (llama_seq_id & seq_id : seq_ids_) {
        seq_id_of_.push_back(&seq_id);
    }
    texts_.reserve((size_t) n_texts_max_);
    tokens_.reserve((size_t) n_tokens_max_);
    positions_.reserve((size_t) n_tokens_max_);
    ++live.embedders;
}

Embedder::~Embedder() { --live.embedders; }

bool Embedder::fits(size_t n_tokens) const {
    return n_texts() < n_texts_max_ && tokens_.size() + n_tokens <= (size_t) n_tokens_max_;
}

void Embedder::add(const std::vector<llama_token> & ids, float * out, int32_t n_dims) {
    const int32_t n     = (int32_t) ids.size();
    const int32_t first = n_tokens();
    for (int32_t i = 0; i < n; ++i) {
        seq_ids_[(size_t) (first + i)] = n_texts();
        positions_.push_back(i);
    }
    tokens_.insert(tokens_.end(), ids.begin(), ids.end());
    texts_.push_back({first, per_token_ ? n : 1, n_dims, out});
}

void Embedder::forget_sequences(Status & status) noexcept {
    if (memory_ == nullptr) {
        return;
    }
    guarded(status, [&] {
        for (int32_t i = 0; i < n_texts(); ++i) {
            llama_memory_seq_rm(memory_, i, -1, -1);
        }
    });
}

void Embedder::run(bool l2, Status & status) noexcept {
    forget_sequences(status);
    if (status.kind != Status::ok) {
        return;
    }
    llama_batch batch = {};
    batch.n_tokens    = n_tokens();
    batch.token       = tokens_.data();
    batch.pos         = positions_.data();
    batch.n_seq_id    = n_seq_ids_.data();
    batch.seq_id      = seq_id_of_.data();
    batch.logits      = outputs_.data();
    run_batch(*context_, batch, memory_ == nullptr, status);
    if (status.kind == Status::ok) {
        guarded(status, [&] {
            for (int32_t i = 0; i < n_texts(); ++i) {
                if (!write(i, l2)) {
                    status.set(Status::failed, "llama.cpp returned no embedding");
                    return;
                }
            }
        });
    }
    if (!context_->broken) {
        Status ignored;  // the batch's own failure is the one to report
        forget_sequences(ignored);
    }
}

bool Embedder::write(int32_t seq_id, bool l2) const {
    const Text & text = texts_[(size_t) seq_id];
    for (int32_t i = 0; i < text.n_rows; ++i) {
        const float * row = per_token_ ? llama_get_embeddings_ith(context_->ctx, text.first + i)
                                       : llama_get_embeddings_seq(context_->ctx, seq_id);
        if (row == nullptr) {
            return false;
        }
        write_row(row, text.out + (size_t) i * (size_t) text.n_dims, text.n_dims, l2);
    }
    return true;
}

void Embedder::clear() {
    texts_.clear();
    tokens_.clear();
    positions_.clear();
}

}  // namespace llama_crab
