// Drafts of a second, smaller model: greedy, all sequences of a step together in one batch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "draft_source.h"
#include "handles.h"
#include "logits_row.h"

namespace llama_crab {

using DraftSourcePtr = std::shared_ptr<DraftSource>;

// Why a draft model's tokens are not those of the target, with the first difference; empty when
// they are. The rules are those of llama.cpp's own tools: the same kind of tokenizer, the same
// tokens at both ends of a text, the same texts from id 5 on, and at most 128 more or fewer.
std::string vocab_difference(const llama_vocab * target, const llama_vocab * draft);

class DraftModel : public DraftSource {
public:
    // `context` has as many sequences as the target and at least one output row for each. A draft
    // ends where the most likely token has a probability below `p_min`.
    DraftModel(ContextPtr target, ContextPtr context, int32_t n_max, float p_min);
    ~DraftModel() override;
    DraftModel(const DraftModel &) = delete;

    // Each sequence's tokens are compared with what is in memory, whoever has changed them since:
    // what they have in common is kept, the rest is removed and decoded again. A call decodes at
    // most one micro-batch of that beside the drafts; a sequence that needs more gets none yet.
    void draft(std::vector<Want> & wants, Status & status) override;

    // Nothing is to be done where everything is compared; and what a sequence leaves behind may be
    // the beginning of the next one's text.
    void decoded(const llama_batch &, Status &) override {}
    void rewind(int32_t, int32_t) override {}
    int32_t n_max() const override { return n_max_; }

private:
    // A sequence on its way to a draft.
    struct Work {
        Want *  want;
        int32_t n_draft;      // tokens that are wanted and have room
        int32_t n_taken = 0;  // tokens in the batch
        int32_t row     = -1; // its row of the batch
    };

    bool   knows(const Want & want) const;
    bool   can_cut(int32_t seq, size_t n) const;
    size_t n_usable(const Want & want, size_t seq) const;
    void   copy_prefix(const Want & want);
    void   keep_prefix(const Want & want);
    void   plan(std::vector<Work> & works);
    void   add(Work & work, const llama_token * tokens, int32_t n, bool output);
    bool   decode(const std::vector<Work> & works, Status & status);
    bool   forget_idle(const std::vector<Work> & works);
    bool   choose(Work & work);
    void   resync(const std::vector<Work> & works);

    const ContextPtr     target_, context_;
    const llama_memory_t memory_;
    const llama_vocab *  vocab_;
    const int32_t        n_vocab_;         // ids that both models know
    const int32_t        n_row_;           // floats of a row
    const int32_t        n_ubatch_;
    const int32_t        n_ctx_seq_;
    const int32_t        n_swa_;           // 0: any prefix of a sequence can be kept
    const bool           unified_;
    const bool           shares_threads_;
    const int32_t        n_threads_, n_threads_batch_;
    const int32_t        n_max_;
    const float          p_min_;
    llama_batch          batch_;
    LogitsRow            row_;
    std::vector<std::vector<llama_token>> held_;  // what each sequence has in memory
};

}  // namespace llama_crab
