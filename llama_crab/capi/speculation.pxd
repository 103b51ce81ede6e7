# native/draft_control.h and the parts of native/slot.h that concern drafts.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr
from libcpp.vector cimport vector

from llama_crab.capi.ngram cimport CNgramCache

cdef extern from "native/draft_control.h" namespace "llama_crab" nogil:
    cppclass DraftOrigin:
        pass
    DraftOrigin draft_origin "(llama_crab::DraftOrigin)" (int32_t i)
    size_t N_DRAFT_ORIGINS "llama_crab::n_draft_origins"
    size_t N_AGREEMENT_CLASSES "llama_crab::DraftAcceptance::n_classes"
    int32_t smallest_agreement "llama_crab::DraftAcceptance::smallest_of"(size_t k)

    cppclass DraftAcceptance:
        double held(DraftOrigin origin, size_t k)
        double tried(DraftOrigin origin, size_t k)

    cppclass DraftOffer:
        int32_t slot
        DraftOrigin origin
        int32_t agreed
        int32_t n_max
        bool fixed
        const DraftAcceptance *acceptance

    cppclass DraftControl:
        int32_t n_most
        DraftControl(bool split) except +
        void choose(
            const vector[int32_t]& base, const vector[DraftOffer]& offers, int32_t n_room,
            vector[int32_t]& lengths) except +
        void observe_batch(
            const vector[int32_t]& layout, int32_t n_drafted, int32_t n_slots, int32_t n_given,
            int64_t us) except +
        void observe_drafting(DraftOrigin origin, int32_t n_tokens, int64_t us)
        void observe_token(
            DraftOrigin origin, DraftAcceptance& of_sequence, int32_t agreed, bool held)
        double probability "acceptance"(
            DraftOrigin origin, int32_t agreed, const DraftAcceptance *of_sequence)
        const DraftAcceptance& acceptance()
        double cost_us(int32_t n_tokens)
        int64_t n_observed(int32_t n_tokens)
        double measured_gain()
        double expected_gain()
    int32_t N_COSTS "llama_crab::DraftControl::n_most"

cdef extern from "native/slot.h" namespace "llama_crab" nogil:
    cppclass Speculation:
        int32_t n_max
        bool fixed
        int32_t min_ngram
        int32_t max_ngram
        shared_ptr[CNgramCache] cache
        bool model
        bool user

    cppclass Drafting:
        int32_t n_drafted
        int32_t n_accepted
