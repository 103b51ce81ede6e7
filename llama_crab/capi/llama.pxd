# llama.h
from libc.stddef cimport size_t
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libcpp cimport bool

from llama_crab.capi.ggml cimport ggml_type
from llama_crab.capi.ggml_backend cimport ggml_backend_buffer_type_t, ggml_backend_dev_t

# Functions that can only run out of memory carry `except +`; what can throw or assert on bad input
# is called through the guarded functions of native.pxd instead.

cdef extern from "llama.h" nogil:
    enum:
        LLAMA_DEFAULT_SEED
        LLAMA_TOKEN_NULL
        LLAMA_STATE_SEQ_FLAGS_NONE
        LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        LLAMA_STATE_SEQ_FLAGS_ON_DEVICE

    ctypedef struct llama_vocab:
        pass
    ctypedef struct llama_model:
        pass
    ctypedef struct llama_context:
        pass
    ctypedef struct llama_sampler:
        pass
    ctypedef struct llama_adapter_lora:
        pass
    ctypedef struct llama_memory_i:
        pass
    ctypedef llama_memory_i *llama_memory_t

    ctypedef int32_t llama_pos
    ctypedef int32_t llama_token
    ctypedef int32_t llama_seq_id
    ctypedef uint32_t llama_state_seq_flags

    enum llama_vocab_type:
        LLAMA_VOCAB_TYPE_NONE
        LLAMA_VOCAB_TYPE_SPM
        LLAMA_VOCAB_TYPE_BPE
        LLAMA_VOCAB_TYPE_WPM
        LLAMA_VOCAB_TYPE_UGM
        LLAMA_VOCAB_TYPE_RWKV
        LLAMA_VOCAB_TYPE_PLAMO2
        LLAMA_VOCAB_TYPE_TEST

    enum llama_rope_type:
        LLAMA_ROPE_TYPE_NONE
        LLAMA_ROPE_TYPE_NORM
        LLAMA_ROPE_TYPE_NEOX
        LLAMA_ROPE_TYPE_MROPE
        LLAMA_ROPE_TYPE_IMROPE
        LLAMA_ROPE_TYPE_VISION

    enum llama_token_attr:
        LLAMA_TOKEN_ATTR_UNDEFINED
        LLAMA_TOKEN_ATTR_UNKNOWN
        LLAMA_TOKEN_ATTR_UNUSED
        LLAMA_TOKEN_ATTR_NORMAL
        LLAMA_TOKEN_ATTR_CONTROL
        LLAMA_TOKEN_ATTR_USER_DEFINED
        LLAMA_TOKEN_ATTR_BYTE
        LLAMA_TOKEN_ATTR_NORMALIZED
        LLAMA_TOKEN_ATTR_LSTRIP
        LLAMA_TOKEN_ATTR_RSTRIP
        LLAMA_TOKEN_ATTR_SINGLE_WORD

    enum llama_ftype:
        pass
    const char *llama_ftype_name(llama_ftype ftype)

    enum llama_rope_scaling_type:
        LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED
        LLAMA_ROPE_SCALING_TYPE_NONE
        LLAMA_ROPE_SCALING_TYPE_LINEAR
        LLAMA_ROPE_SCALING_TYPE_YARN
        LLAMA_ROPE_SCALING_TYPE_LONGROPE

    enum llama_pooling_type:
        LLAMA_POOLING_TYPE_UNSPECIFIED
        LLAMA_POOLING_TYPE_NONE
        LLAMA_POOLING_TYPE_MEAN
        LLAMA_POOLING_TYPE_CLS
        LLAMA_POOLING_TYPE_LAST
        LLAMA_POOLING_TYPE_RANK

    enum llama_attention_type:
        LLAMA_ATTENTION_TYPE_UNSPECIFIED
        LLAMA_ATTENTION_TYPE_CAUSAL
        LLAMA_ATTENTION_TYPE_NON_CAUSAL

    enum llama_flash_attn_type:
        LLAMA_FLASH_ATTN_TYPE_AUTO
        LLAMA_FLASH_ATTN_TYPE_DISABLED
        LLAMA_FLASH_ATTN_TYPE_ENABLED

    enum llama_split_mode:
        LLAMA_SPLIT_MODE_NONE
        LLAMA_SPLIT_MODE_LAYER
        LLAMA_SPLIT_MODE_ROW
        LLAMA_SPLIT_MODE_TENSOR

    enum llama_load_mode:
        LLAMA_LOAD_MODE_AUTO
        LLAMA_LOAD_MODE_NONE
        LLAMA_LOAD_MODE_MMAP
        LLAMA_LOAD_MODE_MLOCK
        LLAMA_LOAD_MODE_MMAP_MLOCK
        LLAMA_LOAD_MODE_DIRECT_IO

    enum llama_lazy_mode:
        LLAMA_LAZY_MODE_OFF
        LLAMA_LAZY_MODE_AUTO
        LLAMA_LAZY_MODE_ON

    enum llama_context_type:
        LLAMA_CONTEXT_TYPE_DEFAULT
        LLAMA_CONTEXT_TYPE_MTP

    ctypedef struct llama_token_data:
        llama_token id
        float logit
        float p

    ctypedef struct llama_token_data_array:
        llama_token_data *data
        size_t size
        int64_t selected
        bool sorted

    ctypedef bool (*llama_progress_callback)(float progress, void *user_data) noexcept

    ctypedef struct llama_batch:
        int32_t n_tokens
        llama_token *token
        float *embd
        llama_pos *pos
        int32_t *n_seq_id
        llama_seq_id **seq_id
        int8_t *logits

    enum llama_model_kv_override_type:
        LLAMA_KV_OVERRIDE_TYPE_INT
        LLAMA_KV_OVERRIDE_TYPE_FLOAT
        LLAMA_KV_OVERRIDE_TYPE_BOOL
        LLAMA_KV_OVERRIDE_TYPE_STR

    ctypedef struct llama_model_kv_override:
        llama_model_kv_override_type tag
        char key[128]
        int64_t val_i64
        double val_f64
        bool val_bool
        char val_str[128]

    ctypedef struct llama_model_tensor_buft_override:
        const char *pattern
        ggml_backend_buffer_type_t buft

    ctypedef struct llama_model_params:
        ggml_backend_dev_t *devices
        const llama_model_tensor_buft_override *tensor_buft_overrides
        int32_t n_gpu_layers
        llama_split_mode split_mode
        llama_load_mode load_mode
        llama_lazy_mode lazy_mode
        int32_t main_gpu
        const float *tensor_split
        llama_progress_callback progress_callback
        void *progress_callback_user_data
        const llama_model_kv_override *kv_overrides
        bool vocab_only
        bool check_tensors
        bool use_extra_bufts
        bool no_host
        bool no_alloc
        bool load_mtp

    ctypedef struct llama_context_params:
        uint32_t n_ctx
        uint32_t n_batch
        uint32_t n_ubatch
        uint32_t n_seq_max
        uint32_t n_rs_seq
        uint32_t n_outputs_max
        uint32_t n_outputs_max_per_seq
        int32_t n_threads
        int32_t n_threads_batch
        llama_context_type ctx_type
        llama_context *ctx_other
        llama_rope_scaling_type rope_scaling_type
        llama_pooling_type pooling_type
        llama_attention_type attention_type
        llama_flash_attn_type flash_attn_type
        float rope_freq_base
        float rope_freq_scale
        float yarn_ext_factor
        float yarn_attn_factor
        float yarn_beta_fast
        float yarn_beta_slow
        uint32_t yarn_orig_ctx
        ggml_type type_k
        ggml_type type_v
        bool embeddings
        bool offload_kqv
        bool no_perf
        bool op_offload
        bool swa_full
        bool kv_unified

    ctypedef struct llama_logit_bias:
        llama_token token
        float bias

    ctypedef struct llama_sampler_chain_params:
        bool no_perf

    const char *llama_version()
    llama_model_params llama_model_default_params()
    llama_context_params llama_context_default_params()
    llama_sampler_chain_params llama_sampler_chain_default_params()

    void llama_backend_init()
    int64_t llama_time_us()
    size_t llama_max_devices()
    size_t llama_max_parallel_sequences()
    size_t llama_max_tensor_buft_overrides()
    bool llama_supports_mmap()
    bool llama_supports_mlock()
    bool llama_supports_gpu_offload()
    bool llama_supports_rpc()

    uint32_t llama_n_ctx(const llama_context *ctx)
    uint32_t llama_n_ctx_seq(const llama_context *ctx)
    uint32_t llama_n_batch(const llama_context *ctx)
    uint32_t llama_n_ubatch(const llama_context *ctx)
    uint32_t llama_n_seq_max(const llama_context *ctx)
    llama_memory_t llama_get_memory(const llama_context *ctx)
    # The C function shares its name with the enum above.
    int c_pooling_type "llama_pooling_type" (const llama_context *ctx)

    const llama_vocab *llama_model_get_vocab(const llama_model *model)
    int llama_model_rope_type(const llama_model *model)
    int32_t llama_model_n_ctx_train(const llama_model *model)
    int32_t llama_model_n_embd(const llama_model *model)
    int32_t llama_model_n_embd_inp(const llama_model *model)
    int32_t llama_model_n_embd_out(const llama_model *model)
    int32_t llama_model_n_layer(const llama_model *model)
    int32_t llama_model_n_head(const llama_model *model)
    int32_t llama_model_n_head_kv(const llama_model *model)
    int32_t llama_model_n_swa(const llama_model *model)
    float llama_model_rope_freq_scale_train(const llama_model *model)
    uint32_t llama_model_n_cls_out(const llama_model *model)
    const char *llama_model_cls_label(const llama_model *model, uint32_t i)
    # The C function shares its name with the enum above.
    int c_vocab_type "llama_vocab_type" (const llama_vocab *vocab)
    int32_t llama_vocab_n_tokens(const llama_vocab *vocab)
    int32_t llama_model_meta_count(const llama_model *model)
    int32_t llama_model_meta_key_by_index(
        const llama_model *model, int32_t i, char *buf, size_t buf_size)
    int32_t llama_model_meta_val_str_by_index(
        const llama_model *model, int32_t i, char *buf, size_t buf_size)
    int32_t llama_model_desc(const llama_model *model, char *buf, size_t buf_size)
    llama_ftype llama_model_ftype(const llama_model *model)
    uint64_t llama_model_size(const llama_model *model)
    const char *llama_model_chat_template(const llama_model *model, const char *name)
    uint64_t llama_model_n_params(const llama_model *model)
    bool llama_model_has_encoder(const llama_model *model)
    bool llama_model_has_decoder(const llama_model *model)
    llama_token llama_model_decoder_start_token(const llama_model *model)
    bool llama_model_is_recurrent(const llama_model *model)
    bool llama_model_is_hybrid(const llama_model *model)
    bool llama_model_is_diffusion(const llama_model *model)

    int32_t llama_adapter_meta_count(const llama_adapter_lora *adapter)
    int32_t llama_adapter_meta_key_by_index(
        const llama_adapter_lora *adapter, int32_t i, char *buf, size_t buf_size)
    int32_t llama_adapter_meta_val_str_by_index(
        const llama_adapter_lora *adapter, int32_t i, char *buf, size_t buf_size)
    uint64_t llama_adapter_get_alora_n_invocation_tokens(const llama_adapter_lora *adapter)
    const llama_token *llama_adapter_get_alora_invocation_tokens(
        const llama_adapter_lora *adapter)

    void llama_memory_clear(llama_memory_t mem, bool data)
    bool llama_memory_seq_rm(llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1)
    void llama_memory_seq_cp(
        llama_memory_t mem, llama_seq_id seq_id_src, llama_seq_id seq_id_dst,
        llama_pos p0, llama_pos p1)
    void llama_memory_seq_keep(llama_memory_t mem, llama_seq_id seq_id)
    void llama_memory_seq_add(
        llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos delta)
    void llama_memory_seq_div(
        llama_memory_t mem, llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d)
    llama_pos llama_memory_seq_pos_min(llama_memory_t mem, llama_seq_id seq_id)
    llama_pos llama_memory_seq_pos_max(llama_memory_t mem, llama_seq_id seq_id)
    bool llama_memory_can_shift(llama_memory_t mem)

    llama_batch llama_batch_init(int32_t n_tokens, int32_t embd, int32_t n_seq_max) except +
    void llama_batch_free(llama_batch batch)

    int32_t llama_n_threads(llama_context *ctx)
    int32_t llama_n_threads_batch(llama_context *ctx)
    void llama_set_embeddings(llama_context *ctx, bool embeddings)
    void llama_set_causal_attn(llama_context *ctx, bool causal_attn)
    bool llama_get_causal_attn(const llama_context *ctx)

    void llama_synchronize(llama_context *ctx) except +
    float *llama_get_logits_ith(llama_context *ctx, int32_t i)
    float *llama_get_embeddings_ith(llama_context *ctx, int32_t i)
    float *llama_get_embeddings_seq(llama_context *ctx, llama_seq_id seq_id)

    const char *llama_vocab_get_text(const llama_vocab *vocab, llama_token token)
    float llama_vocab_get_score(const llama_vocab *vocab, llama_token token)
    int llama_vocab_get_attr(const llama_vocab *vocab, llama_token token)
    bool llama_vocab_is_eog(const llama_vocab *vocab, llama_token token)
    bool llama_vocab_is_control(const llama_vocab *vocab, llama_token token)
    llama_token llama_vocab_bos(const llama_vocab *vocab)
    llama_token llama_vocab_eos(const llama_vocab *vocab)
    llama_token llama_vocab_eot(const llama_vocab *vocab)
    llama_token llama_vocab_sep(const llama_vocab *vocab)
    llama_token llama_vocab_nl(const llama_vocab *vocab)
    llama_token llama_vocab_pad(const llama_vocab *vocab)
    llama_token llama_vocab_mask(const llama_vocab *vocab)
    bool llama_vocab_get_add_bos(const llama_vocab *vocab)
    bool llama_vocab_get_add_eos(const llama_vocab *vocab)
    bool llama_vocab_get_add_sep(const llama_vocab *vocab)
    const llama_token *llama_vocab_get_suppress_tokens(
        const llama_vocab *vocab, int32_t *n_suppress_tokens)
    llama_token llama_vocab_fim_pre(const llama_vocab *vocab)
    llama_token llama_vocab_fim_suf(const llama_vocab *vocab)
    llama_token llama_vocab_fim_mid(const llama_vocab *vocab)
    llama_token llama_vocab_fim_pad(const llama_vocab *vocab)
    llama_token llama_vocab_fim_rep(const llama_vocab *vocab)
    llama_token llama_vocab_fim_sep(const llama_vocab *vocab)

    int32_t llama_token_to_piece(
        const llama_vocab *vocab, llama_token token, char *buf, int32_t length,
        int32_t lstrip, bool special) except +

    const char *llama_sampler_name(const llama_sampler *smpl)
    void llama_sampler_reset(llama_sampler *smpl) except +
    llama_sampler *llama_sampler_clone(const llama_sampler *smpl) except +
    void llama_sampler_free(llama_sampler *smpl)
    llama_sampler *llama_sampler_chain_init(llama_sampler_chain_params params) except +
    void llama_sampler_chain_add(llama_sampler *chain, llama_sampler *smpl) except +
    llama_sampler *llama_sampler_chain_get(llama_sampler *chain, int32_t i)
    int32_t llama_sampler_chain_n(const llama_sampler *chain)
    llama_sampler *llama_sampler_chain_remove(llama_sampler *chain, int32_t i)
    llama_sampler *llama_sampler_init_greedy() except +
    llama_sampler *llama_sampler_init_dist(uint32_t seed) except +
    llama_sampler *llama_sampler_init_top_k(int32_t k) except +
    llama_sampler *llama_sampler_init_top_p(float p, size_t min_keep) except +
    llama_sampler *llama_sampler_init_min_p(float p, size_t min_keep) except +
    llama_sampler *llama_sampler_init_typical(float p, size_t min_keep) except +
    llama_sampler *llama_sampler_init_temp(float t) except +
    llama_sampler *llama_sampler_init_temp_ext(float t, float delta, float exponent) except +
    llama_sampler *llama_sampler_init_xtc(
        float p, float t, size_t min_keep, uint32_t seed) except +
    llama_sampler *llama_sampler_init_top_n_sigma(float n) except +
    llama_sampler *llama_sampler_init_mirostat(
        int32_t n_vocab, uint32_t seed, float tau, float eta, int32_t m) except +
    llama_sampler *llama_sampler_init_mirostat_v2(uint32_t seed, float tau, float eta) except +
    llama_sampler *llama_sampler_init_penalties(
        int32_t n_vocab, int32_t penalty_last_n, float penalty_repeat, float penalty_freq,
        float penalty_present) except +
    llama_sampler *llama_sampler_init_dry(
        const llama_vocab *vocab, float dry_multiplier, float dry_base,
        int32_t dry_allowed_length, int32_t dry_penalty_last_n, const char **seq_breakers,
        size_t num_breakers) except +
    llama_sampler *llama_sampler_init_adaptive_p(float target, float decay, uint32_t seed) except +
    llama_sampler *llama_sampler_init_logit_bias(
        int32_t n_vocab, int32_t n_logit_bias, const llama_logit_bias *logit_bias) except +
    llama_sampler *llama_sampler_init_infill(const llama_vocab *vocab) except +
    uint32_t llama_sampler_get_seed(const llama_sampler *smpl)

    const char *llama_print_system_info()

    ctypedef struct llama_perf_context_data:
        double t_start_ms
        double t_load_ms
        double t_p_eval_ms
        double t_eval_ms
        int32_t n_p_eval
        int32_t n_eval
        int32_t n_reused

    llama_perf_context_data llama_perf_context(const llama_context *ctx)
    void llama_perf_context_reset(llama_context *ctx)
