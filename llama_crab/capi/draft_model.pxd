# native/draft_source.h, native/draft_model.h: what drafts tokens for a speculative
# step; native/speculative_bridge.h: heads that read the target's hidden states.
from libc.stdint cimport int32_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

from llama_crab.capi.llama cimport llama_batch, llama_model, llama_vocab
from llama_crab.capi.native cimport ContextPtr, Status

cdef extern from "native/draft_source.h" namespace "llama_crab" nogil:
    cppclass Want "llama_crab::DraftSource::Want":
        int32_t seq
        const vector[int32_t] *tokens
        int32_t n_max
        vector[int32_t] *draft

    cppclass DraftSource:
        void decoded(const llama_batch& batch, Status& status)
        void draft(vector[Want]& wants, Status& status)
        void rewind(int32_t seq, int32_t n)
        int32_t n_max()

cdef extern from "native/draft_model.h" namespace "llama_crab" nogil:
    ctypedef shared_ptr[DraftSource] DraftSourcePtr
    string vocab_difference(const llama_vocab *target, const llama_vocab *draft) except +
    DraftSourcePtr new_draft_model "std::make_shared<llama_crab::DraftModel>" (
        ContextPtr target, ContextPtr context, int32_t n_max, float p_min) except +

cdef extern from "native/speculative_bridge.h" namespace "llama_crab" nogil:
    enum HeadKind "llama_crab::HeadKind":
        pass
    string heads_difference(
        const llama_model *target, const llama_model *heads, HeadKind kind) except +
    DraftSourcePtr new_head_drafts(
        ContextPtr target, ContextPtr context, HeadKind kind, int32_t n_max, float p_min,
        Status& status)
