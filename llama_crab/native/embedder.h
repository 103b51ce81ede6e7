// Packed batches of whole texts, each a sequence of its own, and their embeddings.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "handles.h"

namespace llama_crab {

class Embedder {
public:
    explicit Embedder(ContextPtr context);
    ~Embedder();
    Embedder(const Embedder &) = delete;

    // Room of a batch, and the longest text. A text must lie within one micro-batch: attention that
    // is not causal sees all of it at once, and pooling happens per micro-batch.
    int32_t n_tokens_max() const { return n_tokens_max_; }
    int32_t n_texts_max() const { return n_texts_max_; }
    int32_t n_text_tokens_max() const { return n_text_tokens_max_; }

    int32_t n_values() const { return n_values_; }    // of a row
    bool    per_token() const { return per_token_; }  // a row for each token, not for each text
    int32_t n_texts() const { return (int32_t) texts_.size(); }
    int32_t n_tokens() const { return (int32_t) tokens_.size(); }

    // False when the batch has no room for a text of `n_tokens` (1 .. n_text_tokens_max) more.
    bool fits(size_t n_tokens) const;

    // Queues a text that fits. `run` writes its row of `n_dims` floats to `out`, or one row after
    // the other when per_token(). Ids and sizes were checked by L2.
    void add(const std::vector<llama_token> & ids, float * out, int32_t n_dims);

    // Decodes what is queued and writes the rows, scaled to length 1 if `l2`. The memory of the
    // sequences that it uses is empty afterwards.
    void run(bool l2, Status & status) noexcept;

    void clear();

private:
    struct Text {
        int32_t first;  // token of the batch
        int32_t n_rows;
        int32_t n_dims;
        float * out;
    };

    void forget_sequences(Status & status) noexcept;
    bool write(int32_t seq_id, bool l2) const;  // false when there is none

    const ContextPtr            context_;
    const llama_memory_t        memory_;  // null for encoders
    const bool                  per_token_;
    const int32_t               n_values_;
    const int32_t               n_tokens_max_;
    const int32_t               n_texts_max_;
    const int32_t               n_text_tokens_max_;
    std::vector<Text>           texts_;  // the index is the sequence id
    std::vector<llama_token>    tokens_;
    std::vector<llama_pos>      positions_;
    std::vector<llama_seq_id>   seq_ids_;
    std::vector<llama_seq_id *> seq_id_of_;   // one element each, as llama_batch wants it
    std::vector<int32_t>        n_seq_ids_;   // all 1
    std::vector<int8_t>         outputs_;     // all 1
};

}  // namespace llama_crab
