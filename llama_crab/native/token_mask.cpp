#include "token_mask.h"

#include <algorithm>

namespace llama_crab {

bool TokenMask::has(llama_token id) const {
    if (!bits.empty()) {
        return id >= 0 && (size_t) id / 32 < bits.size()
               && ((bits[(size_t) id / 32] >> (id % 32)) & 1) != 0;
    }
    return std::binary_search(ids.begin(), ids.end(), id);
}

TokenSet::TokenSet(int32_t n_vocab, size_t enough)
    : n_vocab_(n_vocab), few_((size_t) std::max(64, n_vocab / 64)), enough_(enough) {}

void TokenSet::add(llama_token id) {
    if (!wide_) {
        mask_.ids.push_back(id);
        if (mask_.ids.size() > few_) {
            add_all(std::vector<uint32_t>(((size_t) n_vocab_ + 31) / 32), 0);
        }
        return;
    }
    uint32_t &     word = mask_.bits[(size_t) id / 32];
    const uint32_t bit  = 1u << (id % 32);
    mask_.n_allowed += (word & bit) == 0;
    word |= bit;
}

void TokenSet::add_all(std::vector<uint32_t> bits, int32_t count) {
    if (!wide_) {
        wide_           = true;
        mask_.bits      = std::move(bits);
        mask_.n_allowed = count;
        for (const llama_token id : mask_.ids) {
            add(id);
        }
        mask_.ids = {};
        return;
    }
    for (size_t w = 0; w < bits.size(); ++w) {
        const uint32_t fresh = bits[w] & ~mask_.bits[w];
        mask_.bits[w] |= fresh;
        mask_.n_allowed += fresh != 0 ? __builtin_popcount(fresh) : 0;
    }
}

bool TokenSet::full() const {
    // A token can be found twice, as a terminal and as text; then two are one.
    return enough_ != SIZE_MAX && (wide_ ? (size_t) mask_.n_allowed : mask_.ids.size()) >= enough_
           && (wide_ || mask_.ids.front() != mask_.ids.back());
}

TokenMask TokenSet::take() {
    std::vector<llama_token> & ids = mask_.ids;
    if (!wide_) {
        std::sort(ids.begin(), ids.end());
        ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
        mask_.n_allowed = (int32_t) ids.size();
        ids.shrink_to_fit();
    } else if ((size_t) mask_.n_allowed <= few_) {
        each_bit(mask_.bits, [&](uint32_t id) { ids.push_back((llama_token) id); });
        mask_.bits = {};
    }
    return std::move(mask_);
}

}  // namespace llama_crab
