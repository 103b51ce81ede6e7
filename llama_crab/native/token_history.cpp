#include "token_history.h"

#include <algorithm>
#include <cmath>

namespace llama_crab {

llama_token TokenWindow::push(llama_token token) {
    if (tokens_.size() < capacity_) {
        tokens_.push_back(token);
        return LLAMA_TOKEN_NULL;
    }
    if (capacity_ == 0) {
        return token;
    }
    const llama_token oldest = tokens_[next_];
    tokens_[next_] = token;
    next_ = (next_ + 1) % capacity_;
    return oldest;
}

void TokenWindow::clear() {
    tokens_.clear();
    next_ = 0;
}

void TokenCounts::push(llama_token token) {
    const llama_token oldest = window_.push(token);
    if (oldest == token) {
        return;
    }
    ++counts_[token];
    if (oldest != LLAMA_TOKEN_NULL) {
        const auto entry = counts_.find(oldest);
        if (--entry->second == 0) {
            counts_.erase(entry);
        }
    }
}

void TokenCounts::clear() {
    window_.clear();
    counts_.clear();
}

namespace {

// llama.cpp's own bound: longer tails would make the search quadratic.
constexpr size_t max_tail = 20;

std::string text_of(const llama_vocab * vocab, llama_token token) {
    std::string text(64, '\0');
    int32_t n = llama_detokenize(vocab, &token, 1, text.data(), (int32_t) text.size(), false, true);
    if (n < 0) {
        text.resize((size_t) -n);
        n = llama_detokenize(vocab, &token, 1, text.data(), (int32_t) text.size(), false, true);
    }
    text.resize((size_t) std::max(0, n));
    return text;
}

std::vector<llama_token> tail_of(const llama_vocab * vocab, const std::string & text) {
    std::vector<llama_token> tokens(text.size() + 8);
    const int32_t n = llama_tokenize(vocab, text.data(), (int32_t) text.size(), tokens.data(),
                                     (int32_t) tokens.size(), false, false);
    tokens.resize(std::min((size_t) std::max(0, n), max_tail));
    return tokens;
}

}  // namespace

DryBreakers find_breakers(const llama_vocab * vocab, const std::vector<std::string> & breakers) {
    DryBreakers found;
    for (llama_token token = 0; token < llama_vocab_n_tokens(vocab); ++token) {
        const std::string word = text_of(vocab, token);
        for (const std::string & breaker : breakers) {
            if (word.find(breaker) != std::string::npos) {
                found[token].emplace_back();
                continue;
            }
            // The token may end in the beginning of the breaker; then the rest must follow.
            for (size_t at = word.find(breaker[0]); at != std::string::npos;
                 at = word.find(breaker[0], at + 1)) {
                const size_t n = std::min(breaker.size(), word.size() - at);
                if (word.compare(at, n, breaker, 0, n) != 0) {
                    continue;
                }
                std::vector<llama_token> tail = tail_of(vocab, breaker.substr(n));
                auto & tails = found[token];
                if (std::find(tails.begin(), tails.end(), tail) == tails.end()) {
                    tails.push_back(std::move(tail));
                }
            }
        }
    }
    return found;
}

// No repetition may reach back over a breaker: the number of tokens since the latest one.
int32_t DryHistory::repeat_limit() const {
    const int32_t n = (int32_t) latest_first_.size();
    for (int32_t i = 0; i < n; ++i) {
        const auto entry = breakers_->find(latest_first_[(size_t) i]);
        if (entry == breakers_->end()) {
            continue;
        }
        int32_t longest = -1;
        for (const std::vector<llama_token> & tail : entry->second) {
            const int32_t length = (int32_t) tail.size();
            if (length > longest && length <= i &&
                std::equal(tail.begin(), tail.end(), latest_first_.rend() - i)) {
                longest = length;
            }
        }
        if (longest >= 0) {
            return i - longest;
        }
    }
    return n;
}

const std::vector<std::pair<llama_token, float>> & DryHistory::penalties() {
    penalties_.clear();
    longest_.clear();
    const int32_t n = (int32_t) window_.size();
    if (n <= allowed_length_) {
        return penalties_;
    }
    latest_first_.resize((size_t) n);
    for (int32_t i = 0; i < n; ++i) {
        latest_first_[(size_t) i] = window_.back((size_t) i);
    }
    const int32_t limit = repeat_limit();
    if (limit < allowed_length_) {
        return penalties_;
    }
    // The Z function of the reversed history: match_[k] is how many of the last tokens are repeated
    // k steps back. The token that followed there would extend the repetition.
    const std::vector<llama_token> & t = latest_first_;
    match_.assign((size_t) n, 0);
    for (int32_t k = 1, begin = 0, end = 0; k < n; ++k) {
        int32_t length = k < end ? std::min(end - k, match_[(size_t) (k - begin)]) : 0;
        while (k + length < n && t[(size_t) length] == t[(size_t) (k + length)]) {
            ++length;
        }
        match_[(size_t) k] = length;
        if (k + length > end) {
            begin = k;
            end   = k + length;
        }
        const int32_t repeated = std::min(length, limit);
        if (repeated >= allowed_length_) {
            int32_t & longest = longest_[t[(size_t) (k - 1)]];
            longest = std::max(longest, repeated);
        }
    }
    // exp(88.7) is the largest float.
    const int32_t max_exponent = base_ > 1.000001f ? (int32_t) (88.7228391f / std::log(base_)) : 0;
    for (const auto & [token, length] : longest_) {
        const auto entry = breakers_->find(token);
        const bool breaks = entry != breakers_->end() &&
                            std::any_of(entry->second.begin(), entry->second.end(),
                                        [](const auto & tail) { return tail.empty(); });
        if (!breaks) {
            int32_t exponent = length - allowed_length_;
            if (max_exponent > 0) {
                exponent = std::min(exponent, max_exponent);
            }
            penalties_.emplace_back(token, (float) (multiplier_ * std::pow(base_, exponent)));
        }
    }
    return penalties_;
}

}  // namespace llama_crab
