// Many texts as token ids: tokenised by several threads, cut to a length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "guard.h"
#include "llama.h"

namespace llama_crab {

using TokenLists = std::vector<std::vector<llama_token>>;

// Bytes of a text; the caller keeps them alive.
struct TextSpan {
    const char * data;
    size_t       size;
};

// Tokenises each text on the calling thread and on up to `n_threads` - 1 others. A failure names
// the text in `status`; `out` is then incomplete.
void tokenize_many(const llama_vocab * vocab, const std::vector<TextSpan> & texts, bool add_special,
                   bool parse_special, int32_t n_threads, TokenLists & out,
                   Status & status) noexcept;

// Cuts what is longer than `max_tokens` (1 at least) from the end; `keep_last` saves the last
// token. Returns how many texts were cut.
size_t truncate(TokenLists & texts, size_t max_tokens, bool keep_last);

}  // namespace llama_crab
