// Sets of tokens: short ones as lists, others as bits.
#pragma once

#include <cstdint>
#include <vector>

#include "llama.h"

namespace llama_crab {

// Which tokens may come next.
struct TokenMask {
    int32_t                  n_allowed = 0;
    std::vector<llama_token> ids;   // ascending, when there are few; else empty
    std::vector<uint32_t>    bits;  // bit id % 32 of word id / 32, when `ids` is empty

    bool has(llama_token id) const;
};

// Collects tokens: a list while they are few, bits afterwards.
class TokenSet {
public:
    // Needs no more than `enough` tokens.
    TokenSet(int32_t n_vocab, size_t enough = SIZE_MAX);

    void      add(llama_token id);
    void      add_all(std::vector<uint32_t> bits, int32_t count);  // `count` of them
    bool      full() const;
    bool      wants_all() const { return enough_ == SIZE_MAX; }
    TokenMask take();

private:
    const int32_t n_vocab_;
    const size_t  few_, enough_;
    bool          wide_ = false;
    TokenMask     mask_;
};

// Calls f(i) for every bit i that is set.
template <typename Word, typename F> void each_bit(const std::vector<Word> & bits, F f) {
    for (size_t w = 0; w < bits.size(); ++w) {
        for (Word rest = bits[w]; rest != 0; rest &= rest - 1) {
            f((uint32_t) (w * 8 * sizeof(Word)) + (uint32_t) __builtin_ctzll(rest));
        }
    }
}

}  // namespace llama_crab
