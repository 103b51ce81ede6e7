// Where the end of a sequence has occurred in it before: prompt lookup without a search.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "llama.h"

namespace llama_crab {

// Keeps, for each place of a sequence, the previous place with the same last n tokens. It has such a
// chain for min_ngram, its doubles and max_ngram (1 to 16: 1, 2, 4, 8, 16): an order in between is
// found along the chain of the one below it. Memory: 4 bytes per token and chain, and 16 to 32 bytes
// per distinct n-gram. A call touches a few cache lines, whose number does not depend on the text.
//
// Thread-safety: as a std::vector.
class NgramIndex {
public:
    static constexpr int32_t max_order     = 16;
    static constexpr int32_t max_agreement = 32;  // tokens; more are not compared
    static constexpr int32_t max_walk      = 16;  // earlier places looked at in one call

    // 1 <= min_ngram <= max_ngram <= max_order, checked by the caller.
    NgramIndex(int32_t min_ngram, int32_t max_ngram);

    // Takes in what is new: `tokens` is the whole sequence, which has only grown since the last call.
    void extend(const std::vector<llama_token> & tokens);

    // Appends to `out` up to n_max tokens that followed an earlier occurrence of the end of `tokens`,
    // with which `extend` was called. Of the latest places with the same end the one with the longest
    // agreement is taken, then the one whose next token is the most frequent, then the latest. What
    // is copied may run over the end into itself, as in LZ77: periodic text goes on.
    // Returns how many tokens agree there, at most max_agreement; 0: nothing found.
    int32_t draft(const std::vector<llama_token> & tokens, int32_t n_max,
                  std::vector<llama_token> & out) const;

    // Tokens taken in.
    size_t size() const { return links_.size() / (size_t) n_orders_; }
    size_t n_bytes() const;

private:
    // A place is the number of tokens before it; 0 is none.
    struct Entry {
        uint32_t hash;   // of an n-gram; which n is part of it
        uint32_t place;  // behind its latest occurrence
    };

    void     grow();
    uint32_t replace(uint32_t hash, uint32_t place);

    std::array<int32_t, 5> orders_{};  // ascending
    int32_t                n_orders_ = 0;
    size_t                 n_used_   = 0;
    std::vector<Entry>     table_;  // open addressing; its size is a power of two
    std::vector<uint32_t>  links_;  // by token and order: the previous place with the same n-gram
};

// Times what a step does: `index` takes in the tokens that it has not, one at a time, with a draft of
// up to n_max tokens after each. Before each token evict_bytes of other memory are written to, as a
// decode does. Returns the microseconds of each token.
std::vector<double> time_ngram_index(NgramIndex & index, const std::vector<llama_token> & tokens,
                                     int32_t n_max, size_t evict_bytes);

}  // namespace llama_crab
