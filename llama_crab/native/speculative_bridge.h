// Drafts by heads that read the target's hidden states (MTP, EAGLE3), through llama-common.
#pragma once

#include "draft_model.h"

namespace llama_crab {

enum class HeadKind : int32_t { mtp = 1, eagle3 = 2 };

// Why these heads cannot draft for the target, empty when they can. `heads` is the target's own
// model for heads in its file.
std::string heads_difference(const llama_model * target, const llama_model * heads, HeadKind kind);

// `context` was made of the heads' model with the target as its ctx_other and has as many sequences
// and as large batches. From now on each decode of the target keeps hidden states, which `decoded`
// reads: it must follow each decode, in whose batch a sequence's tokens are in one piece. A draft is
// computed in its longest length whatever is asked for. Null with `status` set on failure.
DraftSourcePtr new_head_drafts(ContextPtr target, ContextPtr context, HeadKind kind, int32_t n_max,
                               float p_min, Status & status) noexcept;

}  // namespace llama_crab
