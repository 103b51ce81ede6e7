# native/*.h: our own C++, which knows no Python.
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.map cimport map as cmap
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from llama_crab.capi.llama cimport (
    llama_adapter_lora, llama_batch, llama_context, llama_context_params, llama_model,
    llama_model_params, llama_sampler, llama_token, llama_token_data_array, llama_vocab)

# What setup.py built from; a build without it says so.
cdef extern from *:
    """
    #ifndef LLAMA_CRAB_LLAMA_COMMIT
    #define LLAMA_CRAB_LLAMA_COMMIT "unknown"
    #endif
    #ifndef LLAMA_CRAB_BACKEND
    #define LLAMA_CRAB_BACKEND "unknown"
    #endif
    """
    const char *BUILD_COMMIT "LLAMA_CRAB_LLAMA_COMMIT"
    const char *BUILD_BACKEND "LLAMA_CRAB_BACKEND"

cdef extern from "native/guard.h" namespace "llama_crab" nogil:
    cppclass Status:
        int kind
        int code
        string message
    int STATUS_OK "llama_crab::Status::ok"
    int STATUS_FAILED "llama_crab::Status::failed"
    int STATUS_THREW "llama_crab::Status::threw"
    int STATUS_ASSERTED "llama_crab::Status::asserted"
    int STATUS_NO_MEMORY "llama_crab::Status::no_memory"
    void install_abort_handler()
    bool enter_callback()
    void leave_callback()
    void refuse_callbacks()

cdef extern from "native/logsink.h" namespace "llama_crab" nogil:
    cppclass LogLine:
        int level
        string text
    void log_install()
    void log_set_level(int level)
    bool log_pending()
    vector[LogLine] log_drain() except +
    uint64_t log_mark()
    vector[string] log_errors_since(uint64_t mark) except +

cdef extern from "native/handles.h" namespace "llama_crab" nogil:
    void enter_forked_child()
    # std::atomic reads, spelt so that Cython sees plain values.
    int fork_generation "(int) llama_crab::fork_generation"
    long live_models "(long) llama_crab::live.models"
    long live_contexts "(long) llama_crab::live.contexts"
    long live_batches "(long) llama_crab::live.batches"
    long live_samplers "(long) llama_crab::live.samplers"
    long live_adapters "(long) llama_crab::live.adapters"
    long live_steppers "(long) llama_crab::live.steppers"
    long live_embedders "(long) llama_crab::live.embedders"
    long live_drafters "(long) llama_crab::live.drafters"
    void count_batches(long n)
    void count_samplers(long n)

    cppclass ModelHandle:
        llama_model *model
        int generation
    ctypedef shared_ptr[ModelHandle] ModelPtr
    ModelPtr load_model(
        const vector[string]& paths, llama_model_params params, Status& status)
    void save_model(const ModelHandle& model, const string& path, Status& status)

    cppclass ContextHandle:
        ModelPtr model
        llama_context *ctx
        int generation
        bool broken
        int32_t n_outputs_max
        bool try_enter()
        void leave()
        void set_threads(int32_t n_threads, int32_t n_threads_batch) except +
        int exports()
        void add_export(int n)
        long epoch()
        void request_abort()
        void clear_abort()
        bool abort_requested()
    ctypedef shared_ptr[ContextHandle] ContextPtr
    ContextPtr create_context(ModelPtr model, llama_context_params params, Status& status)
    void run_batch(
        ContextHandle& handle, const llama_batch& batch, bool encode, Status& status)
    void state_get(
        ContextHandle& handle, int32_t seq_id, uint32_t flags, vector[uint8_t]& out,
        Status& status)
    void state_set(
        ContextHandle& handle, int32_t seq_id, uint32_t flags, const uint8_t *data, size_t size,
        Status& status)
    void state_save_file(
        ContextHandle& handle, int32_t seq_id, const string& path,
        const vector[int32_t]& tokens, Status& status)
    void state_load_file(
        ContextHandle& handle, int32_t seq_id, const string& path, vector[int32_t]& tokens,
        Status& status)

    cppclass AdapterHandle:
        ModelPtr model
        llama_adapter_lora *adapter
        int generation
    ctypedef shared_ptr[AdapterHandle] AdapterPtr
    AdapterPtr load_adapter(ModelPtr model, const string& path, Status& status)
    void set_adapters(
        ContextHandle& handle, const vector[AdapterPtr]& adapters, vector[float] scales,
        Status& status)
    void set_control_vector(
        ContextHandle& handle, const float *data, size_t len, int32_t n_embd, int32_t il_start,
        int32_t il_end, Status& status)

    void tokenize(
        const llama_vocab *vocab, const char *text, size_t len, bool add_special,
        bool parse_special, vector[int32_t]& out, Status& status)
    void detokenize(
        const llama_vocab *vocab, const vector[int32_t]& tokens, bool remove_special,
        bool unparse_special, string& out, Status& status)

cdef extern from "native/row_kernels.h" namespace "llama_crab" nogil:
    vector[string] kernel_names() except +
    bool use_kernels(const string& name) except +

cdef extern from "native/logits_row.h" namespace "llama_crab" nogil:
    cppclass LogitsRow:
        LogitsRow() except +
        bool open(float *data, int32_t n) except +
        void undo() except +

cdef extern from "native/row_sampler.h" namespace "llama_crab" nogil:
    cppclass Candidates:
        vector[int32_t] ids
        vector[float] logits
        vector[float] p
        llama_token selected

    cppclass RowSampler:
        llama_token sample(LogitsRow& row, Status& status)
        void accept(llama_token token, Status& status)
        void reset(Status& status)
        void explain(LogitsRow& row, Candidates& candidates, Status& status)
    const char *BAD_ROW "llama_crab::bad_row"
    vector[double] time_sampler(
        RowSampler& sampler, const vector[float]& rows, int32_t n_vocab, int32_t n_rounds,
        bool scan, Status& status) except +

cdef extern from "native/reference_sampler.h" namespace "llama_crab" nogil:
    cppclass ReferenceSampler(RowSampler):
        ReferenceSampler() except +
        llama_sampler *chain
    llama_sampler *new_grammar(
        const llama_vocab *vocab, const string& grammar, const string& root, bool lazy,
        const vector[string]& trigger_patterns, const vector[int32_t]& trigger_tokens,
        Status& status)

cdef extern from "native/fused_sampler.h" namespace "llama_crab" nogil:
    enum StageKind "llama_crab::StageKind":
        pass

    cppclass StageSpec:
        StageKind kind
        float p
        float t
        float delta
        float exponent
        float n
        float tau
        float eta
        float target
        float decay
        float penalty_repeat
        float penalty_freq
        float penalty_present
        float dry_multiplier
        float dry_base
        int32_t k
        int32_t m
        int32_t min_keep
        int32_t last_n
        int32_t dry_allowed_length
        uint32_t seed
        vector[string] seq_breakers
        vector[pair[int32_t, float]] logit_bias

    cppclass GrammarOpening:
        string prefix
        string thinking_start
        vector[string] thinking_ends

    cppclass GrammarSpec:
        string gbnf
        string root
        bool lazy
        vector[string] trigger_patterns
        vector[int32_t] trigger_tokens
        GrammarOpening opening

    cppclass FusedSampler(RowSampler):
        pass
    FusedSampler *new_fused_sampler(
        ModelPtr model, const vector[StageSpec]& stages, const GrammarSpec& grammar,
        Status& status)
    FusedSampler *clone_fused_sampler(const FusedSampler& sampler, Status& status)

cdef extern from "native/tokenized_texts.h" namespace "llama_crab" nogil:
    ctypedef vector[vector[int32_t]] TokenLists

    cppclass TextSpan:
        const char *data
        size_t size
    void tokenize_many(
        const llama_vocab *vocab, const vector[TextSpan]& texts, bool add_special,
        bool parse_special, int32_t n_threads, TokenLists& out, Status& status)
    size_t truncate(TokenLists& texts, size_t max_tokens, bool keep_last)

cdef extern from "native/embedder.h" namespace "llama_crab" nogil:
    cppclass CEmbedder "llama_crab::Embedder":
        CEmbedder(ContextPtr context) except +
        int32_t n_tokens_max()
        int32_t n_texts_max()
        int32_t n_text_tokens_max()
        int32_t n_values()
        bool per_token()
        int32_t n_texts()
        int32_t n_tokens()
        bool fits(size_t n_tokens)
        void add(const vector[int32_t]& ids, float *out, int32_t n_dims) except +
        void run(bool l2, Status& status)
        void clear()

cdef extern from "native/chat_bridge.h" namespace "llama_crab" nogil:
    cppclass ChatRequest:
        string messages
        string tools
        string tool_choice
        string json_schema
        string grammar
        string continue_final_message
        string reasoning_format
        string template_kwargs
        bool parallel_tool_calls
        bool add_generation_prompt
        bool enable_thinking
        int64_t now

    cppclass ChatTrigger:
        string kind
        string value
        int32_t token

    cppclass ChatFormat:
        pass

    cppclass CChatPrompt "llama_crab::ChatPrompt":
        string text
        vector[pair[size_t, size_t]] input
        string format
        string grammar
        bool grammar_lazy
        vector[ChatTrigger] grammar_triggers
        vector[string] preserved_tokens
        vector[string] additional_stops
        string generation_prompt
        bool supports_thinking
        string thinking_start_tag
        vector[string] thinking_end_tags

    cppclass CChatTemplates "llama_crab::ChatTemplates":
        void render(const ChatRequest& request, CChatPrompt& prompt, Status& status)
        void tokenize(const CChatPrompt& prompt, vector[int32_t]& out, Status& status)
        string source(bool tool_use) except +
        cmap[string, bool] capabilities() except +
        bool was_explicit()
    CChatTemplates *new_chat_templates(ModelPtr model, const string& source, Status& status)

    cppclass ChatToolCall:
        string id
        string name
        string arguments

    cppclass ChatMessage:
        string content
        string reasoning_content
        vector[ChatToolCall] tool_calls

    cppclass ChatDelta:
        int32_t index
        string content
        string reasoning_content
        string id
        string name
        string arguments

    void parse_chat_output(
        const CChatPrompt& prompt, const string& output, bool is_partial, ChatMessage& message,
        Status& status)

    cppclass CChatParser "llama_crab::ChatParser":
        void push(const char *data, size_t size, vector[ChatDelta]& deltas, Status& status)
        void finish(vector[ChatDelta]& deltas, Status& status)
        const ChatMessage& message()
    CChatParser *new_chat_parser(const CChatPrompt& prompt, Status& status)
