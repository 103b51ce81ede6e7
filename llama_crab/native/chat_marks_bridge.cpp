#include "chat_marks_bridge.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <stdexcept>

namespace llama_crab {

namespace {

std::string escaped(char c) {
    char text[8];
    std::snprintf(text, sizeof(text), "\\u%04x", (unsigned) (unsigned char) c);
    return text;
}

// Joins ranges that touch or overlap.
void tidy(TextRanges & ranges) {
    std::sort(ranges.begin(), ranges.end());
    TextRanges joined;
    for (const auto & range : ranges) {
        if (!joined.empty() && range.first <= joined.back().second) {
            joined.back().second = std::max(joined.back().second, range.second);
        } else {
            joined.push_back(range);
        }
    }
    ranges.swap(joined);
}

}  // namespace

TokenMarks::TokenMarks(const SpecialTokens & specials, const std::string & text)
    : specials_(specials) {
    std::array<bool, 32> used = {};
    for (size_t i = 0; i < text.size(); ++i) {
        const auto c = (unsigned char) text[i];
        if (c < used.size()) {
            used[c] = true;
        } else if (c == '\\' && text.compare(i, 4, "\\u00") == 0 && i + 6 <= text.size()
                   && (text[i + 4] == '0' || text[i + 4] == '1')) {
            const int low = std::tolower((unsigned char) text[i + 5]);
            if (std::isxdigit(low)) {
                used[(size_t) ((text[i + 4] - '0') * 16 + (low <= '9' ? low - '0' : low - 'a' + 10))] =
                    true;
            }
        }
    }
    // Neither white space nor what JSON has a short escape for.
    for (const char c : {1, 2, 3, 4, 5, 6, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26}) {
        if (!used[(size_t) c]) {
            free_.push_back(c);
        }
    }
}

char TokenMarks::take() {
    if (free_.empty()) {
        throw std::invalid_argument(
            "the messages have too many kinds of control characters and special tokens");
    }
    const char mark = free_.back();
    free_.pop_back();
    return mark;
}

const std::string & TokenMarks::end_mark() {
    if (end_mark_.empty()) {
        end_mark_ = std::string(3, take());
    }
    return end_mark_;
}

bool TokenMarks::replace(std::string & text) {
    bool any = false;
    for (size_t i = 0; i < text.size();) {
        const std::string_view token = specials_.control_at(text, i);
        if (token.empty()) {
            ++i;
            continue;
        }
        const char first = text[i];
        if (marks_.count(first) == 0) {
            const char mark = take();
            marks_[first]   = mark;
            firsts_[mark]   = first;
        }
        text[i] = marks_[first];
        i += token.size();
        any = true;
    }
    return any;
}

bool TokenMarks::replace(common_json & value) {
    bool any = false;
    if (value.is_string()) {
        std::string text = value.get<std::string>();
        any              = replace(text);
        if (any) {
            value = text;
        }
    } else if (value.is_array()) {
        for (common_json & item : value) {
            any = replace(item) || any;
        }
    } else if (value.is_object()) {
        bool        renamed = false;
        common_json copy    = common_json::object();
        for (const auto & [name, item] : value.items()) {
            std::string key = name;
            renamed         = replace(key) || renamed;
            any             = replace(item) || any;
            copy[key]       = item;
        }
        if (renamed) {
            value = copy;
            any   = true;
        }
    }
    return any;
}

bool TokenMarks::replace(autoparser::generation_params & params, common_json & shown_tools) {
    bool any = replace(params.messages);
    any      = replace(shown_tools) || any;
    any      = replace(params.tools) || any;
    any      = replace(params.extra_context) || any;
    any      = replace(params.continue_msg.content) || any;
    any      = replace(params.continue_msg.reasoning_content) || any;
    for (auto & part : params.continue_msg.content_parts) {
        any = replace(part.text) || any;
    }
    return any;
}

void TokenMarks::restore(std::string & text, TextRanges & input) const {
    // Written by tojson, a mark takes six bytes: everything behind it moves.
    std::string         result;
    std::vector<size_t> moved(text.size() + 1);
    std::vector<size_t> begins;
    for (size_t i = 0; i < text.size();) {
        auto   mark = firsts_.find(text[i]);
        size_t n    = 1;
        if (text.compare(i, 4, "\\u00") == 0 && text.size() - i >= 6) {
            for (auto other = firsts_.begin(); other != firsts_.end(); ++other) {
                if (text.compare(i, 6, escaped(other->first)) == 0) {
                    mark = other;
                    n    = 6;
                }
            }
        }
        std::fill_n(moved.begin() + (std::ptrdiff_t) i, n, result.size());
        if (mark == firsts_.end()) {
            result += text[i];
        } else {
            if (n > 1 && (mark->second == '"' || mark->second == '\\')) {
                result += '\\';
            }
            begins.push_back(result.size());
            result += mark->second;
        }
        i += n;
    }
    moved[text.size()] = result.size();
    for (auto & range : input) {
        range = {moved[range.first], moved[range.second]};
    }
    for (const size_t begin : begins) {
        const size_t n = specials_.control_at(result, begin).size();
        input.emplace_back(begin, begin + std::max<size_t>(n, 1));
    }
    tidy(input);
    text.swap(result);
}

}  // namespace llama_crab
