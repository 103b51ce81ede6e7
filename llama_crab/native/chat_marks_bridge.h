// Special tokens in what users wrote, followed through a render. The Jinja runtime loses track of
// its input in several filters (tojson, split, keys of objects), so the first character of each
// such token is replaced by a control character that occurs nowhere else, and put back afterwards.
// That keeps all lengths, so that templates may cut the text anywhere.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "chat-auto-parser.h"
#include "chat_tokens.h"

namespace llama_crab {

class TokenMarks {
public:
    // `text` is all that users wrote, as JSON: its characters are not used.
    TokenMarks(const SpecialTokens & specials, const std::string & text);

    // True when there was anything to mark. `shown_tools`: what the template sees as tools instead.
    bool replace(autoparser::generation_params & params, common_json & shown_tools);

    // Puts the characters back and adds the places of the tokens to `input`.
    void restore(std::string & text, TextRanges & input) const;

    // A text that occurs nowhere else. Throws std::invalid_argument, as replace, when all characters
    // that could mark something are used.
    const std::string & end_mark();

private:
    char take();
    bool replace(std::string & text);
    bool replace(common_json & value);

    const SpecialTokens & specials_;
    std::string           free_;  // control characters that can be used
    std::map<char, char>  marks_; // of first characters of tokens
    std::map<char, char>  firsts_;
    std::string           end_mark_;
};

}  // namespace llama_crab
