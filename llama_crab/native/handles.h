// Owners of llama.cpp's objects: shared where several Python handles need the same one alive.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "guard.h"
#include "llama.h"

namespace llama_crab {

// Raised by one in the child after a fork. Objects of an earlier generation belong to the parent:
// their worker threads do not exist here, so they are neither used nor freed.
extern std::atomic<int> fork_generation;
inline void enter_forked_child() { ++fork_generation; }

// Live C objects by kind; tests compare it with zero. Order: see live_handle_names in _core.
struct LiveCounts {
    std::atomic<long> models{0}, contexts{0}, batches{0}, samplers{0}, adapters{0}, steppers{0},
        embedders{0}, drafters{0};
};
extern LiveCounts live;
inline void count_batches(long n) { live.batches += n; }    // these two kinds are owned by L2
inline void count_samplers(long n) { live.samplers += n; }

class VocabCache;

class ModelHandle {
public:
    ModelHandle(llama_model * model);
    ~ModelHandle();
    ModelHandle(const ModelHandle &) = delete;

    llama_model *                     model;
    const int                         generation;
    const std::unique_ptr<VocabCache> vocab_cache;  // what samplers derive from the vocabulary
};
using ModelPtr = std::shared_ptr<ModelHandle>;

// Loads `paths` (one file, or all splits in order). Null with `status` set on failure.
ModelPtr load_model(const std::vector<std::string> & paths, llama_model_params params,
                    Status & status) noexcept;
void save_model(const ModelHandle & model, const std::string & path, Status & status) noexcept;

class AdapterHandle;

// A pool of ggml's threads. Contexts that compute by turns share one: the workers of a second pool
// would look for work on the cores that the first one needs.
class ThreadPool {
public:
    ThreadPool(int32_t n_threads, bool paused);
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;

    struct ggml_threadpool * const pool;
    const int32_t                  n_threads;
    bool                           abandoned = false;  // workers may wait at a barrier for ever

private:
    const int generation_;
};
using ThreadPoolPtr = std::shared_ptr<ThreadPool>;

class ContextHandle {
public:
    ContextHandle(ModelPtr model, llama_context * ctx);
    ~ContextHandle();
    ContextHandle(const ContextHandle &) = delete;

    // One caller at a time: concurrent use is refused, not interleaved.
    bool try_enter() { return !busy_.exchange(true, std::memory_order_acquire); }
    void leave() { busy_.store(false, std::memory_order_release); }

    // Attaches pools for these thread counts; llama.cpp would start and join threads per graph.
    void set_threads(int32_t n_threads, int32_t n_threads_batch);
    // Attaches another context's pools, of which at most these numbers of threads are used.
    void share_threads(const ContextHandle & other, int32_t n_threads, int32_t n_threads_batch);
    bool shares_threads(const ContextHandle & other) const {
        return threadpool_ == other.threadpool_ && threadpool_batch_ == other.threadpool_batch_;
    }

    void request_abort() { abort_requested_.store(true, std::memory_order_relaxed); }
    void clear_abort() { abort_requested_.store(false, std::memory_order_relaxed); }
    bool abort_requested() const { return abort_requested_.load(std::memory_order_relaxed); }

    // Live buffers over logits or embeddings, and the number of decodes that made older ones stale.
    int  exports() const { return exports_; }
    void add_export(int n) { exports_ += n; }
    long epoch() const { return epoch_; }
    void next_epoch() { ++epoch_; }

    ModelPtr        model;  // destroyed after the context
    std::vector<std::shared_ptr<AdapterHandle>> adapters;  // in use by the context
    llama_context * ctx;
    const int       generation;
    bool            broken        = false;  // an assertion fired inside: its state is unknown
    int32_t         n_outputs_max = 0;
    bool            kv_unified    = false;
    bool            swa_full      = false;

    // Lets go of pools that were replaced. ggml's CPU backend pauses the pool of its last graph when
    // it gets another one, so they must live until the next graph has run.
    void free_retired_threadpools() { retired_.clear(); }
    // After an assertion: whoever has a share of these pools must replace them.
    void abandon_threadpools();

private:
    void attach(ThreadPoolPtr pool, ThreadPoolPtr batch_pool, int32_t n, int32_t n_batch);

    std::atomic<bool>        busy_{false};
    std::atomic<bool>        abort_requested_{false};
    std::atomic<int>         exports_{0};
    std::atomic<long>        epoch_{0};
    ThreadPoolPtr            threadpool_, threadpool_batch_;  // one and the same for equal counts
    std::vector<ThreadPoolPtr> retired_;
};
using ContextPtr = std::shared_ptr<ContextHandle>;

// Whether main memory holds what a cache keeps of each cell outside of its tensors; else `status`
// says what it takes. Linux grants any amount, and kills the process that fills it.
bool has_room_for_cells(const llama_model * model, const llama_context_params & params,
                        Status & status);

// An assertion failed in `context`. Workers may wait at a barrier of its graph; `partner` must not
// wait for them.
void mark_broken(ContextHandle & context, ContextHandle & partner);

ContextPtr create_context(ModelPtr model, llama_context_params params, Status & status) noexcept;

// llama_decode (or llama_encode) with the codes of llama.h in status.code; an assertion marks the
// context broken.
void run_batch(ContextHandle & handle, const llama_batch & batch, bool encode,
               Status & status) noexcept;

// All of the functions below may meet damaged input, so they are guarded.
void state_get(ContextHandle & handle, int32_t seq_id, uint32_t flags, std::vector<uint8_t> & out,
               Status & status) noexcept;
void state_set(ContextHandle & handle, int32_t seq_id, uint32_t flags, const uint8_t * data,
               size_t size, Status & status) noexcept;
void state_save_file(ContextHandle & handle, int32_t seq_id, const std::string & path,
                     const std::vector<llama_token> & tokens, Status & status) noexcept;
void state_load_file(ContextHandle & handle, int32_t seq_id, const std::string & path,
                     std::vector<llama_token> & tokens, Status & status) noexcept;

class AdapterHandle {
public:
    AdapterHandle(ModelPtr model, llama_adapter_lora * adapter);
    ~AdapterHandle();
    AdapterHandle(const AdapterHandle &) = delete;

    ModelPtr             model;
    llama_adapter_lora * adapter;
    const int            generation;
};
using AdapterPtr = std::shared_ptr<AdapterHandle>;

AdapterPtr load_adapter(ModelPtr model, const std::string & path, Status & status) noexcept;
void set_adapters(ContextHandle & handle, const std::vector<AdapterPtr> & adapters,
                  std::vector<float> scales, Status & status) noexcept;
void set_control_vector(ContextHandle & handle, const float * data, size_t len, int32_t n_embd,
                        int32_t il_start, int32_t il_end, Status & status) noexcept;

// Text of any length to ids; grows the result as llama_tokenize asks.
void tokenize(const llama_vocab * vocab, const char * text, size_t len, bool add_special,
              bool parse_special, std::vector<llama_token> & out, Status & status) noexcept;
void detokenize(const llama_vocab * vocab, const std::vector<llama_token> & tokens,
                bool remove_special, bool unparse_special, std::string & out,
                Status & status) noexcept;

}  // namespace llama_crab
