// A grammar in the form the automaton runs: one item a terminal or a reference, and code points
// grouped into the classes that the grammar tells apart.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "grammar_bridge.h"
#include "vocab_index.h"

namespace llama_crab {

struct GrammarProgram {
    enum class Kind : uint8_t { chars, token, token_not, rule };

    struct Item {
        Kind     kind;
        bool     last;   // of its alternative; the next item follows otherwise
        uint32_t value;  // index in `sets`, a token, or a rule
    };

    struct CharSet {
        bool                                       negated = false;
        bool                                       any     = false;
        std::vector<std::pair<uint32_t, uint32_t>> ranges;  // inclusive, as written
    };

    explicit GrammarProgram(const GbnfRules & grammar);  // throws std::runtime_error

    static constexpr int64_t empty = -1;

    std::vector<Item>                 items;
    std::vector<std::vector<int64_t>> alternatives;  // per rule: the first item of each, or `empty`
    uint32_t                          root;
    std::vector<CharSet>              sets;
    uint32_t                          n_classes = 0;
    uint32_t                          n_words   = 0;  // 64-bit words of a set of classes

    uint32_t class_of(uint32_t code_point) const {
        return code_point < 128 ? ascii_[code_point] : search(code_point);
    }

    // The classes of a set, as bits.
    const uint64_t * members(uint32_t set) const {
        return members_.data() + (size_t) set * n_words;
    }

    bool matches(uint32_t set, uint32_t char_class) const {
        return (members(set)[char_class / 64] >> (char_class % 64)) & 1;
    }

    // Whether llama.cpp thinks that some completion of `partial` is in the set. Of a negated set it
    // wants all of them.
    bool may_match(uint32_t set, PartialUtf8 partial) const;

private:
    void     add_rule(const std::vector<GbnfElement> & rule);
    void     make_classes();
    uint32_t search(uint32_t code_point) const;

    std::vector<uint32_t> starts_;    // of the intervals of code points, ascending from 0
    std::vector<uint32_t> class_at_;  // of each interval
    std::vector<uint64_t> members_;
    uint32_t              ascii_[128];
};

}  // namespace llama_crab
