// What penalties and DRY remember: the last tokens of a sequence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "llama.h"

namespace llama_crab {

// The last `capacity` tokens, oldest first out. Memory grows with the tokens seen.
class TokenWindow {
public:
    explicit TokenWindow(size_t capacity) : capacity_(capacity) {}

    size_t size() const { return tokens_.size(); }
    // The token `i` steps back; 0 is the latest.
    llama_token back(size_t i) const {
        const size_t n = tokens_.size();
        return tokens_[(next_ + 2 * n - 1 - i) % n];
    }
    // Adds a token; returns the one that leaves, or LLAMA_TOKEN_NULL.
    llama_token push(llama_token token);
    void        clear();

private:
    size_t                   capacity_;
    size_t                   next_ = 0;  // where the next token goes once the window is full
    std::vector<llama_token> tokens_;
};

// How often each token occurs in a window.
class TokenCounts {
public:
    explicit TokenCounts(size_t capacity) : window_(capacity) {}

    void push(llama_token token);
    void clear();
    const std::unordered_map<llama_token, int32_t> & counts() const { return counts_; }

private:
    TokenWindow                              window_;
    std::unordered_map<llama_token, int32_t> counts_;
};

// The token sequences that spell a DRY breaker: by their first token, what follows it.
using DryBreakers = std::unordered_map<llama_token, std::vector<std::vector<llama_token>>>;

// Looks every token of the vocabulary up, which takes a while: share the result.
DryBreakers find_breakers(const llama_vocab * vocab, const std::vector<std::string> & breakers);

// DRY ("don't repeat yourself"): which tokens would extend a repetition, and by how much.
class DryHistory {
public:
    DryHistory(float multiplier, float base, int32_t allowed_length, int32_t last_n,
               std::shared_ptr<const DryBreakers> breakers)
        : multiplier_(multiplier), base_(base), allowed_length_(allowed_length),
          breakers_(std::move(breakers)), window_((size_t) last_n) {}

    void push(llama_token token) { window_.push(token); }
    void clear() { window_.clear(); }

    // (token, amount to subtract), one entry a token.
    const std::vector<std::pair<llama_token, float>> & penalties();

private:
    int32_t repeat_limit() const;

    float                                      multiplier_, base_;
    int32_t                                    allowed_length_;
    std::shared_ptr<const DryBreakers>         breakers_;
    TokenWindow                                window_;
    std::vector<llama_token>                   latest_first_;
    std::vector<int32_t>                       match_;  // length of the match with the end, per step back
    std::unordered_map<llama_token, int32_t>   longest_;
    std::vector<std::pair<llama_token, float>> penalties_;
};

}  // namespace llama_crab
