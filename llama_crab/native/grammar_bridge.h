// What we use of llama.cpp's internal llama-grammar.h: the GBNF parser.
#pragma once

#include <cstdint>
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

// The beginning of a text for a message: the parser quotes all the rest of a grammar in its own.
std::string shortened(std::string text);

}  // namespace llama_crab
