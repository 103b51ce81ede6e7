# native/slot.h, stepper.h and what they are made of: the engine's step.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from llama_crab.capi.draft_model cimport DraftSourcePtr
from llama_crab.capi.llama cimport llama_token
from llama_crab.capi.native cimport AdapterPtr, ContextPtr, RowSampler, Status
from llama_crab.capi.ngram cimport NgramCachePtr

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
    ctypedef enum Finish "llama_crab::Finish":
        FINISH_CANCELLED "llama_crab::Finish::cancelled"

    cppclass TokenLogprobs:
        float logprob
        vector[pair[int32_t, float]] top

    cppclass Speculation:
        int32_t n_max
        bool fixed
        int32_t min_ngram
        int32_t max_ngram
        NgramCachePtr cache
        bool model
        bool user

    cppclass Drafting:
        int32_t n_drafted
        int32_t n_accepted

    cppclass SlotRequest:
        vector[int32_t] prompt
        int32_t source
        int32_t n_keep
        int32_t leader
        int32_t n_shared
        int32_t checkpoint
        int64_t rank
        int64_t submit_us
        int32_t adapters
        int32_t max_tokens
        int32_t min_tokens
        int32_t n_logprobs
        bool prompt_logprobs
        bool ignore_eos
        bool special
        bool emit
        vector[int32_t] stop_tokens
        RowSampler *sampler
        bool processed
        Speculation speculation

    cppclass Slot:
        bool active
        Finish finish
        vector[int32_t] tokens
        int32_t n_past
        int32_t n_prompt
        int32_t n_cached
        int32_t adapters
        string text
        vector[int32_t] text_ends
        vector[TokenLogprobs] logprobs
        vector[TokenLogprobs] prompt_logprobs
        llama_token stop_token
        string error
        int64_t start_us
        int64_t first_us
        int64_t last_us
        int64_t sample_us
        Drafting draft
        int32_t n_generated()

cdef extern from "native/step_budget.h" namespace "llama_crab" nogil:
    cppclass StepBudget:
        int64_t target_us
        double prompt_us()

cdef extern from "native/step_counters.h" namespace "llama_crab" nogil:
    cppclass CLatencyHistogram "llama_crab::LatencyHistogram":
        void record(int64_t us)
        int64_t count(size_t bucket)
    size_t LATENCY_BUCKETS "llama_crab::LatencyHistogram::n_buckets"
    shared_ptr[CLatencyHistogram] make_latency_histogram \
        "std::make_shared<llama_crab::LatencyHistogram>"() except +

    # The counts are atomics that read as plain values.
    cppclass CStepCounters "llama_crab::StepCounters":
        int64_t n_steps
        int64_t n_decoded
        int64_t n_prefilled
        int64_t n_generated
        int64_t decode_us
        int64_t prefill_us
        int64_t sample_us
        int64_t n_drafted
        int64_t n_draft_accepted
        int64_t drafting_us
        int64_t draft_saved_us
        shared_ptr[CLatencyHistogram] first_token
        shared_ptr[CLatencyHistogram] inter_token
    shared_ptr[CStepCounters] make_step_counters \
        "std::make_shared<llama_crab::StepCounters>"() except +

cdef extern from "native/stepper.h" namespace "llama_crab" nogil:
    cppclass AdapterSet:
        vector[AdapterPtr] adapters
        vector[float] scales

    cppclass CStepper "llama_crab::Stepper":
        CStepper(ContextPtr context) except +
        int32_t reusable_prefix(int32_t i, const vector[int32_t]& tokens, int32_t adapters)
        int32_t assign(int32_t i, SlotRequest request, Status& status) except +
        unique_ptr[Slot] suspend(int32_t i) except +
        int32_t resume(
            int32_t i, unique_ptr[Slot] slot, int32_t source, int32_t n_keep,
            Status& status) except +
        bool save(int32_t i, vector[uint8_t]& out, Status& status) except +
        bool restore(
            int32_t i, const vector[int32_t]& tokens, int32_t adapters, const uint8_t *data,
            size_t size, Status& status) except +
        void decode(int32_t n_tokens_max, Status& status) except +
        const vector[int32_t]& slots_to_process() except +
        void copy_rows(float *rows) except +
        void sample(Status& status) except +
        void discard_rows() except +
        const vector[int32_t]& slots_to_draft() except +
        void set_draft(int32_t i, vector[int32_t] tokens) except +
        void set_draft_source(DraftSourcePtr source)
        bool can_draft()
        const DraftControl& draft_control()
        void fail(int32_t i, const string& message) except +
        void release(int32_t i, Finish finish)
        void clear(int32_t i) except +
        void hold(int32_t i, bool held)
        void set_adapters(int32_t index, AdapterSet set) except +
        int32_t n_adapter_sets()
        int32_t n_cells_used() except +
        int32_t n_cells_to_come()
        int32_t n_in_batch(int32_t i)
        bool can_abort()
        bool can_cut()
        bool can_cut_saved()
        const Slot& slot(int32_t i)
        int32_t n_slots()
        vector[int32_t] events
        StepBudget budget
        shared_ptr[CStepCounters] counters
