#include "speculative_bridge.h"

#include <algorithm>

#include "common.h"
#include "llama-ext.h"
#include "speculative.h"

namespace llama_crab {

namespace {

std::string architecture(const llama_model * model) {
    char name[64] = "";
    llama_model_meta_val_str(model, "general.architecture", name, sizeof(name));
    return name;
}

bool any_of(const std::string & name, std::initializer_list<const char *> names) {
    return std::any_of(names.begin(), names.end(), [&](const char * other) { return name == other; });
}

// What a sequence of the heads' context holds.
struct Sequence {
    std::vector<llama_token> tokens;         // whose hidden states were seen; -1 where they were not
    int32_t                  batch_pos = 0;  // where the target's last batch of it began,
    int32_t                  n_rows    = 0;  // and its tokens, whose states llama-common still has
    bool                     exact     = false;  // it goes on from the state of the last token
    llama_token              drafted   = -1;  // what a draft since that batch began behind
    bool                     can_go_back = false;  // llama-common does so only after a first draft
};

class HeadDrafts : public DraftSource {
public:
    HeadDrafts(ContextPtr target, ContextPtr context, HeadKind kind, int32_t n_max, float p_min)
        : target_(std::move(target)),
          context_(std::move(context)),
          memory_(llama_get_memory(context_->ctx)),
          n_ctx_seq_((int32_t) llama_n_ctx_seq(context_->ctx)),
          kind_(kind),
          generation_(fork_generation),
          sequences_(llama_n_seq_max(context_->ctx)) {
        const int32_t n_threads = llama_n_threads(context_->ctx);
        const int32_t n_threads_batch = llama_n_threads_batch(context_->ctx);
        if (n_threads <= llama_n_threads(target_->ctx) &&
            n_threads_batch <= llama_n_threads_batch(target_->ctx)) {
            shares_threads_ = true;
            context_->share_threads(*target_, n_threads, n_threads_batch);
        }
        common_params_speculative params;
        params.types = {kind == HeadKind::mtp ? COMMON_SPECULATIVE_TYPE_DRAFT_MTP
                                              : COMMON_SPECULATIVE_TYPE_DRAFT_EAGLE3};
        params.draft.n_max            = n_max;
        params.draft.p_min            = p_min;
        params.draft.backend_sampling = false;
        params.draft.ctx_tgt          = target_->ctx;
        params.draft.ctx_dft          = context_->ctx;
        spec_.reset(common_speculative_init(params, (uint32_t) sequences_.size()));
        // Models with a head for each token of a draft may have fewer than that.
        n_max_ = common_speculative_n_max(spec_.get());
        ++live.drafters;
    }

    ~HeadDrafts() override {
        --live.drafters;
        if (generation_ != fork_generation) {
            spec_.release();  // it would touch the parent's contexts
            return;
        }
        spec_.reset();
        // A target that computes at this moment goes on copying its hidden states, no more.
        if (target_->try_enter()) {
            stop_hidden_states();
            target_->leave();
        }
    }

    void decoded(const llama_batch & batch, Status & status) override {
        if (!usable(status)) {
            return;
        }
        guarded(status, [&] {
            if (shares_threads_ && !context_->shares_threads(*target_)) {
                context_->share_threads(*target_, llama_n_threads(context_->ctx),
                                        llama_n_threads_batch(context_->ctx));
            }
            if (kind_ == HeadKind::mtp && llama_get_embeddings_nextn(target_->ctx) == nullptr) {
                status.set(Status::failed, "the target has kept no hidden states");
                return;
            }
            batch_.clear();
            std::vector<llama_seq_id> found;
            for (int32_t i = 0; i < batch.n_tokens; ++i) {
                const llama_seq_id seq = batch.seq_id[i][0];
                Sequence & sequence    = sequences_.at((size_t) seq);
                batch_.add(batch.token[i], batch.pos[i], seq, false);
                if (std::find(found.begin(), found.end(), seq) == found.end()) {
                    found.push_back(seq);
                    go_to(seq, batch.pos[i], batch.token[i]);
                }
                sequence.tokens.push_back(batch.token[i]);
                ++sequence.n_rows;
            }
            const bool read = common_speculative_process(spec_.get(), batch_);
            for (const llama_seq_id seq : found) {
                sequences_[(size_t) seq].exact = read;
                if (!read) {
                    forget(seq);
                }
            }
            if (!read) {
                status.set(Status::failed, "the draft heads could not read the batch");
            }
        });
        after(status);
    }

    void draft(std::vector<Want> & wants, Status & status) override {
        for (Want & want : wants) {
            want.draft->clear();
        }
        if (!usable(status)) {
            return;
        }
        guarded(status, [&] {
            bool any = false;
            for (Want & want : wants) {
                any = prepare(want) || any;
            }
            if (any) {
                common_speculative_draft(spec_.get());
            }
            for (Want & want : wants) {
                if (!want.draft->empty()) {
                    sequences_[(size_t) want.seq].can_go_back = true;
                }
            }
        });
        after(status);
    }

    void rewind(int32_t seq, int32_t n) override {
        Status ignored;  // what it cannot do, it does not draft from
        guarded(ignored, [&] { cut(seq, n); });
    }

    int32_t n_max() const override { return n_max_; }

private:
    // llama-common begins with it and never ends it.
    void stop_hidden_states() {
        const llama_model * heads = context_->model->model;
        if (kind_ == HeadKind::mtp) {
            llama_set_embeddings_nextn(target_->ctx, false, false);
            return;
        }
        for (uint32_t i = 0; i < llama_model_target_layer_ids_n(heads); ++i) {
            llama_set_embeddings_layer_inp(target_->ctx,
                                           (uint32_t) llama_model_target_layer_ids(heads)[i], false);
        }
    }

    bool usable(Status & status) const {
        if (context_->broken) {
            status.set(Status::failed, "an assertion of llama.cpp failed in the heads' context");
        }
        return !context_->broken;
    }

    void after(const Status & status) {
        if (status.kind == Status::asserted) {
            mark_broken(*context_, *target_);
        }
    }

    void forget(llama_seq_id seq) {
        Sequence & sequence = sequences_[(size_t) seq];
        llama_memory_seq_rm(memory_, seq, -1, -1);
        std::fill(sequence.tokens.begin(), sequence.tokens.end(), -1);
        sequence.exact = false;
    }

    // Only the first n tokens count from now on.
    void cut(llama_seq_id seq, int32_t n) {
        Sequence & sequence = sequences_.at((size_t) seq);
        if (n < 0 || (size_t) n >= sequence.tokens.size()) {
            return;
        }
        sequence.tokens.resize((size_t) n);
        // The state of the new last token is among those of the last batch, or it is gone.
        const int32_t row = n - 1 - sequence.batch_pos;
        sequence.exact = sequence.can_go_back && row >= 0 && row < sequence.n_rows;
        if (sequence.exact) {
            common_speculative_accept(spec_.get(), seq, (uint16_t) row);
        }
    }

    // The target's batch has this sequence from `pos` on, where `token` is.
    void go_to(llama_seq_id seq, llama_pos pos, llama_token token) {
        Sequence & sequence = sequences_[(size_t) seq];
        cut(seq, pos);
        // EAGLE3's cell of a token also holds the next token. llama-common writes the last one with
        // the next batch, if no draft has written it.
        const bool waits = kind_ == HeadKind::eagle3 && sequence.exact && sequence.drafted != token &&
                           sequence.tokens.size() == (size_t) pos;
        const llama_pos from = waits ? pos - 1 : pos;
        if (!llama_memory_seq_rm(memory_, seq, from, -1) ||
            llama_memory_seq_pos_max(memory_, seq) != from - 1) {
            // Positions must follow each other, so what was missed takes what was before with it.
            sequence.tokens.assign((size_t) pos, -1);
            llama_memory_seq_rm(memory_, seq, -1, -1);
        }
        sequence.tokens.resize((size_t) pos, -1);
        sequence.batch_pos = pos;
        sequence.n_rows    = 0;
        sequence.drafted   = -1;
    }

    bool prepare(Want & want) {
        const int32_t n = (int32_t) want.tokens->size() - 1;
        if ((size_t) want.seq >= sequences_.size() || n < 1 || want.n_max < 1 ||
            n + n_max_ > n_ctx_seq_) {
            return false;
        }
        Sequence & sequence = sequences_[(size_t) want.seq];
        cut(want.seq, n);
        if (!sequence.exact || sequence.tokens.size() != (size_t) n) {
            return false;
        }
        const bool same = std::equal(sequence.tokens.begin(), sequence.tokens.end(),
                                     want.tokens->begin(),
                                     [](llama_token a, llama_token b) { return a == b || a == -1; });
        if (!same) {
            forget(want.seq);
            return false;
        }
        if (kind_ == HeadKind::mtp) {
            llama_memory_seq_rm(memory_, want.seq, n, -1);
        }
        common_speculative_draft_params & params =
            common_speculative_get_draft_params(spec_.get(), want.seq);
        params.drafting  = true;
        params.n_max     = want.n_max;
        params.pos0      = n;
        params.id_last   = want.tokens->back();
        params.prompt    = want.tokens;
        params.result    = want.draft;
        sequence.drafted = want.tokens->back();
        return true;
    }

    const ContextPtr       target_, context_;
    const llama_memory_t   memory_;
    const int32_t          n_ctx_seq_;
    const HeadKind         kind_;
    const int              generation_;
    common_batch           batch_;  // of tokens only: nothing computes it
    std::vector<Sequence>  sequences_;
    common_speculative_ptr spec_;
    int32_t                n_max_          = 0;
    bool                   shares_threads_ = false;
};

}  // namespace

std::string heads_difference(const llama_model * target, const llama_model * heads, HeadKind kind) {
    const std::string of_target = architecture(target), of_heads = architecture(heads);
    if (kind == HeadKind::mtp) {
        if (llama_model_n_layer_nextn(heads) == 0) {
            return "the model has no MTP layers";
        }
        // What llama.cpp computes them for. Gemma 4's read the target's own memory, and recurrent
        // targets cannot go back to before a draft.
        if (!any_of(of_heads, {"cohere2moe", "deepseek2", "glm4moe", "hy_v3", "mimo2", "step35"})) {
            return "MTP layers of the architecture " + of_heads + " cannot be used";
        }
        if (llama_model_n_embd_out(target) != llama_model_n_embd_out(heads)) {
            return "the MTP layers are of another width than the target";
        }
        return "";
    }
    if (of_heads != "eagle3") {
        return "the model is of the architecture " + of_heads + ", not eagle3";
    }
    // Those that give the inputs of their layers: another target would fail in its next decode.
    if (!any_of(of_target, {"gemma4", "gpt-oss", "llama", "minimax-m2", "qwen3", "qwen3moe"})) {
        return "a target of the architecture " + of_target + " does not show what EAGLE3 reads";
    }
    char width[32] = "";
    llama_model_meta_val_str(heads, "eagle3.target_hidden_size", width, sizeof(width));
    if (std::to_string(llama_model_n_embd(target)) != width) {
        return "it reads a target of width " + std::string(width) + ", this one has " +
               std::to_string(llama_model_n_embd(target));
    }
    for (uint32_t i = 0; i < llama_model_target_layer_ids_n(heads); ++i) {
        const int32_t layer = llama_model_target_layer_ids(heads)[i];
        if (layer < 0 || layer >= llama_model_n_layer(target)) {
            return "it reads layer " + std::to_string(layer) + " of a target that has " +
                   std::to_string(llama_model_n_layer(target));
        }
    }
    return "";
}

DraftSourcePtr new_head_drafts(ContextPtr target, ContextPtr context, HeadKind kind, int32_t n_max,
                               float p_min, Status & status) noexcept {
    DraftSourcePtr result;
    guarded(status, [&] {
        result = std::make_shared<HeadDrafts>(std::move(target), std::move(context), kind, n_max,
                                              p_min);
    });
    return result;
}

}  // namespace llama_crab
