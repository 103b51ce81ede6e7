// Special tokens by their text, and texts in which some of them do not count.
#pragma once

#include <array>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "llama.h"

namespace llama_crab {

using TextRanges = std::vector<std::pair<size_t, size_t>>;  // begin, end; in order, disjoint

// Thread-safe.
class SpecialTokens {
public:
    explicit SpecialTokens(const llama_vocab * vocab);

    // The control token whose text is longest at `pos`; empty when there is none.
    std::string_view control_at(std::string_view text, size_t pos) const;

    // Ids of `text`, where control tokens inside `input` are plain text. Equal to llama_tokenize
    // where there are none. Throws std::runtime_error.
    void tokenize(const std::string & text, const TextRanges & input,
                  std::vector<llama_token> & out) const;

private:
    struct Token {
        std::string_view text;  // the vocabulary's own
        llama_token      id;
        bool             is_control;
        bool             strips_left;
        bool             strips_right;
    };
    // A stretch of a text that holds no special token, or a token found there.
    struct Fragment {
        size_t      begin;
        size_t      end;
        llama_token token;
    };
    using Ids = std::vector<llama_token>;

    // The token that `text` has at `pos`, when the length is one of lengths_; null for none.
    const Token * token_at(std::string_view text, size_t pos, size_t length) const;
    bool cut_at_controls(std::string_view text, const TextRanges & input,
                         std::vector<Fragment> & fragments) const;
    std::vector<Fragment> partition(std::string_view text, const TextRanges & input) const;
    void add_ids(std::string_view text, Ids & out) const;

    const llama_vocab *                   vocab_;
    std::vector<Token>                    tokens_;    // longest first, as llama.cpp orders them
    // The same by text, and the lengths of those that begin with a byte, in descending order.
    std::unordered_map<std::string_view, size_t> by_text_;
    std::array<std::vector<size_t>, 256>  lengths_;
    bool                                  strips_ = false;

    // What was between two special tokens lately: a conversation repeats itself at each turn.
    mutable std::mutex                             mutex_;
    mutable std::unordered_map<std::string, Ids>   recent_, older_;
    mutable size_t                                 recent_bytes_ = 0;
};

}  // namespace llama_crab
