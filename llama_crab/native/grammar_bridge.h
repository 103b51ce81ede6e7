// What we use of llama.cpp's internal llama-grammar.h: the GBNF parser and the trigger patterns.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "llama.h"

namespace llama_crab {

// The element kinds of llama_gretype, with its values.
enum class Gbnf : uint32_t {
    end, alt, rule_ref, character, char_not, range_upper, char_alt, char_any, token, token_not,
};

struct GbnfElement {
    Gbnf     type;
    uint32_t value;  // a code point, a rule, or a token
};

struct GbnfRules {
    std::vector<std::vector<GbnfElement>> rules;
    uint32_t                              root;
};

// Throws std::runtime_error on what llama_sampler_init_grammar refuses, and on text made to exhaust
// its parser.
GbnfRules parse_gbnf(const llama_vocab * vocab, const std::string & text, const std::string & root);

// The regular expressions that wake a lazy grammar, compiled once.
class TriggerPatterns {
public:
    explicit TriggerPatterns(const std::vector<std::string> & patterns);  // std::runtime_error
    ~TriggerPatterns();
    TriggerPatterns(const TriggerPatterns &) = delete;

    // Where the grammar starts, by the first pattern that matches; npos when none does.
    // Words, which are patterns without operators, are not looked for in the first `seen` bytes again.
    size_t find(const std::string & text, size_t seen) const;

private:
    struct Compiled;
    std::unique_ptr<Compiled> compiled_;
};

}  // namespace llama_crab
