#include "handles.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>

#include "ggml-cpu.h"
#include "gguf_check.h"
#include "vocab_cache.h"

namespace llama_crab {

std::atomic<int> fork_generation{0};
LiveCounts       live;

ModelHandle::ModelHandle(llama_model * model_)
    : model(model_), generation(fork_generation),
      vocab_cache(std::make_unique<VocabCache>(llama_model_get_vocab(model_))) {
    ++live.models;
}

ModelHandle::~ModelHandle() {
    --live.models;
    if (generation == fork_generation) {
        llama_model_free(model);
    }
}

ModelPtr load_model(const std::vector<std::string> & paths, llama_model_params params,
                    Status & status) noexcept {
    ModelPtr result;
    guarded(status, [&] {
        check_gguf(paths, params.kv_overrides);
        std::vector<const char *> names;
        for (const std::string & path : paths) {
            names.push_back(path.c_str());
        }
        llama_model * model = names.size() == 1
            ? llama_model_load_from_file(names[0], params)
            : llama_model_load_from_splits(names.data(), names.size(), params);
        if (model == nullptr) {
            status.set(Status::failed, "llama.cpp could not load the model");
            return;
        }
        result = std::make_shared<ModelHandle>(model);
    });
    return result;
}

void save_model(const ModelHandle & model, const std::string & path, Status & status) noexcept {
    guarded(status, [&] {
        // llama.cpp says nothing when it cannot write, so the file is asked before and after.
        std::FILE * file = std::fopen(path.c_str(), "wb");
        if (file == nullptr) {
            throw std::runtime_error(std::strerror(errno));
        }
        std::fclose(file);
        llama_model_save_to_file(model.model, path.c_str());
        file = std::fopen(path.c_str(), "rb");
        const bool whole = file != nullptr && std::fseek(file, 0, SEEK_END) == 0 &&
                           (uint64_t) std::ftell(file) >= llama_model_size(model.model);
        if (file != nullptr) {
            std::fclose(file);
        }
        if (!whole) {
            throw std::runtime_error("the file could not be written in full");
        }
    });
}

namespace {

bool on_abort_poll(void * data) {
    return static_cast<ContextHandle *>(data)->abort_requested();
}

}  // namespace

ContextHandle::ContextHandle(ModelPtr model_, llama_context * ctx_)
    : model(std::move(model_)), ctx(ctx_), generation(fork_generation) {
    ++live.contexts;
    llama_set_abort_callback(ctx, on_abort_poll, this);
}

ContextHandle::~ContextHandle() {
    --live.contexts;
    if (generation == fork_generation) {
        llama_free(ctx);
    }
    if (broken) {
        abandon_threadpools();
    }
}

ThreadPool::ThreadPool(int32_t n_threads_, bool paused)
    : pool([&] {
          ggml_threadpool_params params = ggml_threadpool_params_default(n_threads_);
          params.paused = paused;
          return ggml_threadpool_new(&params);
      }()),
      n_threads(n_threads_), generation_(fork_generation) {}

ThreadPool::~ThreadPool() {
    // Joining workers that wait for ever, or that are the parent's after a fork, would hang.
    if (!abandoned && generation_ == fork_generation) {
        ggml_threadpool_free(pool);
    }
}

void ContextHandle::abandon_threadpools() {
    for (const ThreadPoolPtr & pool : {threadpool_, threadpool_batch_}) {
        if (pool != nullptr) {
            pool->abandoned = true;
        }
    }
    for (const ThreadPoolPtr & pool : retired_) {
        pool->abandoned = true;
    }
}

void ContextHandle::attach(ThreadPoolPtr pool, ThreadPoolPtr batch_pool, int32_t n, int32_t n_batch) {
    llama_detach_threadpool(ctx);
    for (ThreadPoolPtr * old : {&threadpool_, &threadpool_batch_}) {
        if (*old != nullptr) {
            retired_.push_back(std::move(*old));
        }
    }
    llama_set_n_threads(ctx, n, n_batch);
    threadpool_       = std::move(pool);
    threadpool_batch_ = std::move(batch_pool);
    llama_attach_threadpool(ctx, threadpool_->pool, threadpool_batch_->pool);
}

void ContextHandle::set_threads(int32_t n_threads, int32_t n_threads_batch) {
    auto pool = std::make_shared<ThreadPool>(n_threads, false);
    // Only one of the two computes at a time; a paused pool does not spin.
    auto batch_pool = n_threads_batch == n_threads
        ? pool : std::make_shared<ThreadPool>(n_threads_batch, true);
    attach(std::move(pool), std::move(batch_pool), n_threads, n_threads_batch);
}

void ContextHandle::share_threads(const ContextHandle & other, int32_t n_threads,
                                  int32_t n_threads_batch) {
    attach(other.threadpool_, other.threadpool_batch_,
           std::min(n_threads, other.threadpool_->n_threads),
           std::min(n_threads_batch, other.threadpool_batch_->n_threads));
}

void mark_broken(ContextHandle & context, ContextHandle & partner) {
    context.broken = true;
    context.abandon_threadpools();
    if (context.shares_threads(partner)) {
        partner.set_threads(llama_n_threads(partner.ctx), llama_n_threads_batch(partner.ctx));
    }
}

bool has_room_for_cells(const llama_model * model, const llama_context_params & params,
                        Status & status) {
    // llama_kv_cells: position, shift and extent of a cell, and a bit for each sequence.
    const uint64_t cell_bytes = 4 * sizeof(llama_pos) + llama_max_parallel_sequences() / 8;
    const uint64_t n_caches   = llama_model_n_swa(model) > 0 && params.swa_full ? 2 : 1;
    const uint64_t n_ctx      = params.n_ctx != 0 ? params.n_ctx : llama_model_n_ctx_train(model);
    const uint64_t needed     = n_ctx * n_caches * cell_bytes;
    size_t free = 0, total = 0;
    ggml_backend_dev_memory(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), &free, &total);
    if (total == 0 || needed <= total || llama_model_is_recurrent(model)) {
        return true;
    }
    status.set(Status::no_memory, "n_ctx=" + std::to_string(n_ctx) + " needs " +
        std::to_string(needed >> 30) + " GiB of main memory for the cells of the KV cache alone, " +
        "the machine has " + std::to_string(total >> 30) + " GiB");
    return false;
}

ContextPtr create_context(ModelPtr model, llama_context_params params, Status & status) noexcept {
    ContextPtr result;
    guarded(status, [&] {
        if (!has_room_for_cells(model->model, params, status)) {
            return;
        }
        llama_context * ctx = llama_init_from_model(model->model, params);
        if (ctx == nullptr) {
            status.set(Status::failed, "llama.cpp could not create the context");
            return;
        }
        result = std::make_shared<ContextHandle>(std::move(model), ctx);
        result->n_outputs_max = params.n_outputs_max != 0
            ? (int32_t) params.n_outputs_max : (int32_t) llama_n_batch(ctx);
        result->kv_unified = params.kv_unified;
        result->swa_full   = params.swa_full;
        result->set_threads(params.n_threads, params.n_threads_batch);
    });
    return result;
}

void run_batch(ContextHandle & handle, const llama_batch & batch, bool encode,
               Status & status) noexcept {
    handle.next_epoch();
    guarded(status, [&] {
        const int32_t code = encode ? llama_encode(handle.ctx, batch) : llama_decode(handle.ctx, batch);
        if (code == 2) {
            // The request is spent on the call that it stopped.
            handle.clear_abort();
        }
        if (code != 0) {
            status.set(Status::failed, encode ? "llama_encode failed" : "llama_decode failed", code);
        }
    });
    if (status.kind == Status::asserted) {
        handle.broken = true;
    } else if (status.kind == Status::ok) {
        handle.free_retired_threadpools();
    }
}

void state_get(ContextHandle & handle, int32_t seq_id, uint32_t flags, std::vector<uint8_t> & out,
               Status & status) noexcept {
    guarded(status, [&] {
        size_t written = 0;
        if (seq_id < 0) {
            out.resize(llama_state_get_size(handle.ctx));
            written = llama_state_get_data(handle.ctx, out.data(), out.size());
        } else {
            out.resize(llama_state_seq_get_size_ext(handle.ctx, seq_id, flags));
            written = llama_state_seq_get_data_ext(handle.ctx, out.data(), out.size(), seq_id, flags);
        }
        if (written == 0) {
            status.set(Status::failed, "llama.cpp could not write the state");
            return;
        }
        out.resize(written);
    });
}

void state_set(ContextHandle & handle, int32_t seq_id, uint32_t flags, const uint8_t * data,
               size_t size, Status & status) noexcept {
    handle.next_epoch();
    guarded(status, [&] {
        const size_t read = seq_id < 0
            ? llama_state_set_data(handle.ctx, data, size)
            : llama_state_seq_set_data_ext(handle.ctx, data, size, seq_id, flags);
        if (read == 0) {
            status.set(Status::failed, "llama.cpp could not read the state");
        }
    });
}

void state_save_file(ContextHandle & handle, int32_t seq_id, const std::string & path,
                     const std::vector<llama_token> & tokens, Status & status) noexcept {
    guarded(status, [&] {
        const bool ok = seq_id < 0
            ? llama_state_save_file(handle.ctx, path.c_str(), tokens.data(), tokens.size())
            : llama_state_seq_save_file(handle.ctx, path.c_str(), seq_id, tokens.data(),
                                        tokens.size()) != 0;
        if (!ok) {
            status.set(Status::failed, "llama.cpp could not write the state file");
        }
    });
}

namespace {

// Both file formats begin with magic, version and the token count; the count is checked against
// the file's size here because llama.cpp trusts it.
size_t token_count_of(const std::string & path) {
    std::FILE * file = std::fopen(path.c_str(), "rb");
    if (file == nullptr) {
        throw std::runtime_error("cannot open " + path);
    }
    uint32_t header[3] = {0, 0, 0};
    const size_t n = std::fread(header, sizeof(uint32_t), 3, file);
    std::fseek(file, 0, SEEK_END);
    const long size = std::ftell(file);
    std::fclose(file);
    if (n != 3 || size < 0 || (uint64_t) size < sizeof(header) + uint64_t(header[2]) * sizeof(llama_token)) {
        throw std::runtime_error("the state file is truncated");
    }
    return header[2];
}

}  // namespace

void state_load_file(ContextHandle & handle, int32_t seq_id, const std::string & path,
                     std::vector<llama_token> & tokens, Status & status) noexcept {
    handle.next_epoch();
    guarded(status, [&] {
        // One spare: llama.cpp reads a null output as a question for the count.
        tokens.resize(token_count_of(path) + 1);
        size_t n_tokens = 0;
        const bool ok = seq_id < 0
            ? llama_state_load_file(handle.ctx, path.c_str(), tokens.data(), tokens.size(), &n_tokens)
            : llama_state_seq_load_file(handle.ctx, path.c_str(), seq_id, tokens.data(),
                                        tokens.size(), &n_tokens) != 0;
        if (!ok) {
            status.set(Status::failed, "llama.cpp could not read the state file");
            return;
        }
        tokens.resize(n_tokens);
    });
}

AdapterHandle::AdapterHandle(ModelPtr model_, llama_adapter_lora * adapter_)
    : model(std::move(model_)), adapter(adapter_), generation(fork_generation) {
    ++live.adapters;
}

AdapterHandle::~AdapterHandle() {
    --live.adapters;
    if (generation == fork_generation) {
        llama_adapter_lora_free(adapter);
    }
}

AdapterPtr load_adapter(ModelPtr model, const std::string & path, Status & status) noexcept {
    AdapterPtr result;
    guarded(status, [&] {
        llama_adapter_lora * adapter = llama_adapter_lora_init(model->model, path.c_str());
        if (adapter == nullptr) {
            status.set(Status::failed, "llama.cpp could not load the adapter");
            return;
        }
        result = std::make_shared<AdapterHandle>(std::move(model), adapter);
    });
    return result;
}

void set_adapters(ContextHandle & handle, const std::vector<AdapterPtr> & adapters,
                  std::vector<float> scales, Status & status) noexcept {
    guarded(status, [&] {
        std::vector<llama_adapter_lora *> raw;
        for (const AdapterPtr & adapter : adapters) {
            raw.push_back(adapter->adapter);
        }
        if (llama_set_adapters_lora(handle.ctx, raw.data(), raw.size(), scales.data()) != 0) {
            status.set(Status::failed, "llama.cpp could not apply the adapters");
            return;
        }
        handle.adapters = adapters;
    });
}

void set_control_vector(ContextHandle & handle, const float * data, size_t len, int32_t n_embd,
                        int32_t il_start, int32_t il_end, Status & status) noexcept {
    guarded(status, [&] {
        if (llama_set_adapter_cvec(handle.ctx, data, len, n_embd, il_start, il_end) != 0) {
            status.set(Status::failed, "llama.cpp could not apply the control vector");
        }
    });
}

void tokenize(const llama_vocab * vocab, const char * text, size_t len, bool add_special,
              bool parse_special, std::vector<llama_token> & out, Status & status) noexcept {
    guarded(status, [&] {
        if (len > (size_t) INT32_MAX) {
            status.set(Status::failed, "the text is longer than 2 GiB");
            return;
        }
        // Most texts have fewer tokens than bytes; the second call is for the rest.
        out.resize(len / 2 + 16);
        int32_t n = llama_tokenize(vocab, text, (int32_t) len, out.data(), (int32_t) out.size(),
                                   add_special, parse_special);
        if (n < 0 && n != INT32_MIN) {
            out.resize((size_t) -(int64_t) n);
            n = llama_tokenize(vocab, text, (int32_t) len, out.data(), (int32_t) out.size(),
                               add_special, parse_special);
        }
        if (n < 0) {
            status.set(Status::failed, "the text has too many tokens");
            return;
        }
        out.resize((size_t) n);
    });
}

void detokenize(const llama_vocab * vocab, const std::vector<llama_token> & tokens,
                bool remove_special, bool unparse_special, std::string & out,
                Status & status) noexcept {
    guarded(status, [&] {
        out.resize(tokens.size() * 8 + 16);
        int32_t n = llama_detokenize(vocab, tokens.data(), (int32_t) tokens.size(), &out[0],
                                     (int32_t) out.size(), remove_special, unparse_special);
        if (n < 0) {
            out.resize((size_t) -(int64_t) n);
            n = llama_detokenize(vocab, tokens.data(), (int32_t) tokens.size(), &out[0],
                                 (int32_t) out.size(), remove_special, unparse_special);
        }
        if (n < 0) {
            status.set(Status::failed, "the tokens cannot be turned into text");
            return;
        }
        out.resize((size_t) n);
    });
}

}  // namespace llama_crab
