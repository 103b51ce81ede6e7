#include "trigger_patterns.h"

#include <algorithm>
#include <regex>
#include <stdexcept>

#include "grammar_bridge.h"

namespace llama_crab {

namespace {

constexpr const char * operators = "^$.*+?()[]{}|/";

bool is_operator(char c) { return std::string(operators).find(c) != std::string::npos; }

// The plain character at `at`, which moves behind it; 0 for an operator.
char literal_at(const std::string & pattern, size_t & at) {
    if (at >= pattern.size() || pattern[at] == 0 || (is_operator(pattern[at]) && pattern[at] != '/')) {
        return 0;
    }
    if (pattern[at] != '\\') {
        return pattern[at++];
    }
    if (at + 1 >= pattern.size() || !(is_operator(pattern[at + 1]) || pattern[at + 1] == '\\')) {
        return 0;
    }
    at += 2;
    return pattern[at - 1];
}

// Where the group that begins at `at` ends, or the pattern for one before all groups. `has_choice`:
// whether it has alternatives of its own.
size_t end_of_group(const std::string & pattern, size_t at, bool & has_choice) {
    int  depth    = 0;
    bool in_class = false;
    has_choice    = false;
    const int own = at < pattern.size() && pattern[at] == '(' ? 1 : 0;
    for (; at < pattern.size(); ++at) {
        const char c = pattern[at];
        if (c == '\\') {
            ++at;
        } else if (in_class) {
            in_class = c != ']';
        } else if (c == '[') {
            in_class = true;
        } else if (c == '(') {
            ++depth;
        } else if (c == ')') {
            if (--depth < own) {
                return at + 1;
            }
        } else if (c == '|' && depth == own) {
            has_choice = true;
        }
    }
    return at;
}

bool has_choice(const std::string & pattern) {
    bool result;
    end_of_group("^" + pattern, 0, result);
    return result;
}

bool repeats(const std::string & pattern, size_t at) {
    return at < pattern.size() && std::string("*+?{").find(pattern[at]) != std::string::npos;
}

// The plain characters that every match begins with. `at`: where they end, in the pattern.
std::string beginning_of(const std::string & pattern, size_t & at) {
    bool group_has_choice = false;
    if (at + 1 < pattern.size() && pattern[at] == '(' && pattern[at + 1] != '?') {
        const size_t end = end_of_group(pattern, at, group_has_choice);
        if (group_has_choice || repeats(pattern, end)) {
            return "";
        }
        ++at;
    }
    std::string text;
    for (;;) {
        size_t     next = at;
        const char c    = literal_at(pattern, next);
        if (c == 0 || repeats(pattern, next)) {
            return text;
        }
        text += c;
        at = next;
    }
}

size_t start_of(const std::smatch & match, size_t offset) {
    for (size_t i = 1; i < match.size(); ++i) {
        if (match.length(i) > 0) {
            return offset + (size_t) match.position(i);
        }
    }
    return offset + (size_t) match.position(0);
}

// A message to somebody else than the user or the model itself. The pattern of this format, read by
// std::regex, takes a stack frame per character.
constexpr const char * to_a_tool = R"((?:^|<\|start\|>assistant)( to=(?!self<\|message\|>))"
                                   R"((?!user<\|message\|>)[^<]*?<\|message\|>))";

constexpr size_t npos = std::string::npos;

}  // namespace

struct TriggerPatterns::Trigger {
    static constexpr size_t window = 1024;

    explicit Trigger(const std::string & pattern) : regex(pattern) {
        if (pattern == to_a_tool) {
            finds_recipient = true;
            beginning       = "<|start|>assistant";
            return;
        }
        if (has_choice(pattern)) {
            return;
        }
        const bool anchored = pattern.compare(0, 1, "^") == 0;
        size_t     at       = anchored ? 1 : 0;
        // "Anything, then a group" starts where the group does.
        const std::string anything = R"([\s\S]*?)";
        if (pattern.compare(at, anything.size(), anything) == 0
            && pattern.compare(at + anything.size(), 1, "(") == 0) {
            size_t            group = at + anything.size();
            const std::string found = beginning_of(pattern, group);
            if (!found.empty()) {
                regex     = std::regex(pattern.substr(at + anything.size()));
                beginning = found;
                return;
            }
        }
        is_anchored = anchored;
        is_whole    = anchored && pattern.size() > 1 && pattern.back() == '$'
                   && pattern[pattern.size() - 2] != '\\';
        after_space = anchored && pattern.compare(1, 3, R"(\s+)") == 0;
        if (after_space) {
            at          = 4;
            after_space = !beginning_of(pattern, at).empty();
            return;
        }
        beginning = beginning_of(pattern, at);
        is_word   = !anchored && at == pattern.size();
    }

    size_t find(const std::string & text, Progress & progress) const {
        if (after_space) {
            const size_t n = text.find_first_not_of(" \t\n\v\f\r");
            return n == npos || n > window ? npos : match(text, 0);
        }
        if (is_anchored) {
            const size_t n = std::min(beginning.size(), text.size());
            return n < beginning.size() || text.compare(0, n, beginning) != 0
                       || (n > 0 && text.size() > window)
                       ? npos : match(text, 0);
        }
        if (beginning.empty()) {
            std::smatch found;
            return std::regex_search(text, found, regex) ? start_of(found, 0) : npos;
        }
        if (finds_recipient && !progress.begun) {
            progress.open.push_back(0);
        }
        progress.begun = true;
        for (size_t at; (at = text.find(beginning, progress.next)) != npos;) {
            if (is_word) {
                return at;
            }
            progress.open.push_back(finds_recipient ? at + beginning.size() : at);
            progress.next = at + 1;
        }
        progress.next = std::max(progress.next,
                                 text.size() - std::min(text.size(), beginning.size() - 1));
        size_t kept   = 0;
        size_t result = npos;
        for (const size_t at : progress.open) {
            bool is_over = false;
            if (result == npos) {
                result = finds_recipient ? recipient(text, at, is_over) : match(text, at);
            }
            if (!is_over && (finds_recipient || text.size() - at < window)) {
                progress.open[kept++] = at;
            }
        }
        progress.open.resize(kept);
        return result;
    }

    size_t match(const std::string & text, size_t at) const {
        std::smatch found;
        const auto  begin = text.begin() + (std::ptrdiff_t) at;
        auto        flags = std::regex_constants::match_default;
        if (is_whole) {
            return std::regex_match(begin, text.end(), found, regex) ? start_of(found, at) : npos;
        }
        flags |= std::regex_constants::match_continuous;
        if (at > 0) {
            flags |= std::regex_constants::match_prev_avail;
        }
        return std::regex_search(begin, text.end(), found, regex, flags) ? start_of(found, at)
                                                                         : npos;
    }

    static size_t recipient(const std::string & text, size_t at, bool & is_over) {
        const std::string to = " to=", message = "<|message|>";
        const size_t      n = std::min(to.size(), text.size() - at);
        if (text.compare(at, n, to, 0, n) != 0) {
            is_over = true;
            return npos;
        }
        const size_t name = at + to.size();
        const size_t end  = name < text.size() ? text.find('<', name) : npos;
        if (end == npos) {
            return npos;
        }
        const size_t m = std::min(message.size(), text.size() - end);
        if (text.compare(end, m, message, 0, m) != 0) {
            is_over = true;
        } else if (m == message.size()) {
            const std::string to_whom = text.substr(name, end - name);
            is_over                   = true;
            return to_whom == "self" || to_whom == "user" ? npos : at;
        }
        return npos;
    }

    std::regex  regex;
    std::string beginning;  // what every match begins with; may be empty
    bool        is_word         = false;  // nothing but the beginning
    bool        is_anchored     = false;
    bool        is_whole        = false;
    bool        after_space     = false;
    bool        finds_recipient = false;
};

TriggerPatterns::TriggerPatterns(const std::vector<std::string> & patterns) {
    for (const std::string & pattern : patterns) {
        try {
            triggers_.push_back(std::make_unique<const Trigger>(pattern));
        } catch (const std::regex_error & error) {
            throw std::runtime_error("the trigger pattern '" + shortened(pattern)
                                     + "' is not valid: " + error.what());
        }
    }
}

TriggerPatterns::~TriggerPatterns() = default;

size_t TriggerPatterns::find(const std::string & text, Seen & seen) const {
    seen.resize(triggers_.size());
    for (size_t i = 0; i < triggers_.size(); ++i) {
        const size_t at = triggers_[i]->find(text, seen[i]);
        if (at != npos) {
            return at;
        }
    }
    return npos;
}

}  // namespace llama_crab
