#include "grammar_bridge.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "llama-grammar.h"

namespace llama_crab {

static_assert((int) Gbnf::end == LLAMA_GRETYPE_END && (int) Gbnf::rule_ref == LLAMA_GRETYPE_RULE_REF
              && (int) Gbnf::character == LLAMA_GRETYPE_CHAR
              && (int) Gbnf::range_upper == LLAMA_GRETYPE_CHAR_RNG_UPPER
              && (int) Gbnf::token_not == LLAMA_GRETYPE_TOKEN_NOT, "llama_gretype changed");

namespace {

const char * skip_space(const char * p) {
    while (*p == ' ' || *p == '\t' || *p == '\r' || *p == '\n' || *p == '#') {
        p += *p == '#' ? std::strcspn(p, "\r\n") : 1;
    }
    return p;
}

// Saturates far above the 2000 repetitions that the parser grants.
const char * read_count(const char * p, uint64_t & count) {
    for (count = 0; *p >= '0' && *p <= '9'; ++p) {
        count = std::min<uint64_t>(count * 10 + (uint64_t) (*p - '0'), 1u << 20);
    }
    return p;
}

// llama.cpp's parser recurses at "(", takes {5,1} for 2^64 repetitions and copies what it repeats.
void check_text(const char * p) {
    constexpr int      max_depth    = 256;
    constexpr uint64_t max_elements = 1 << 20;
    int                depth    = 0;
    uint64_t           item     = 1;  // elements that a repetition would copy
    uint64_t           elements = 0;
    for (; *p != 0; ++p) {
        if (*p == '#') {
            p += std::strcspn(p, "\r\n");
        } else if (*p == '"' || *p == '[') {
            const char   last  = *p == '"' ? '"' : ']';
            const char * begin = p++;
            while (*p != 0 && *p != last) {
                p += *p == '\\' && p[1] != 0 ? 2 : 1;
            }
            item = (uint64_t) (p - begin);
        } else if (*p == '<') {
            p += std::strcspn(p, ">");
            item = 1;
        } else if (*p == '(' && ++depth > max_depth) {
            throw std::runtime_error("more than " + std::to_string(max_depth) + " nested groups");
        } else if (*p == ')') {
            --depth;
            item = 1;
        } else if (*p == '{') {
            uint64_t     least, most;
            const char * q = skip_space(read_count(skip_space(p + 1), least));
            most = least;
            if (*q == ',') {
                q = skip_space(q + 1);
                if (*q >= '0' && *q <= '9') {
                    read_count(q, most);
                    if (most < least) {
                        throw std::runtime_error("a repetition has a maximum below its minimum");
                    }
                }
            }
            item *= std::min<uint64_t>(std::max<uint64_t>(most, 1), 2000);
            elements += item;
        } else if (std::strchr(" \t\r\n*+?},0123456789", *p) == nullptr) {
            item = 1;
        }
        if (elements > max_elements) {
            throw std::runtime_error("its repetitions copy too much");
        }
        if (*p == 0) {
            return;
        }
    }
}

bool ends(Gbnf type) {
    return type == Gbnf::end || type == Gbnf::alt;
}

// The rules that a rule may begin with, by llama.cpp's notion: what precedes them has an empty
// alternative of its own.
std::vector<uint32_t> leftmost(const GbnfRules & grammar, const std::vector<bool> & may_be_empty,
                               uint32_t rule) {
    std::vector<uint32_t> result;
    bool                  at_left = true;
    for (const GbnfElement & element : grammar.rules[rule]) {
        if (element.type == Gbnf::rule_ref && at_left) {
            result.push_back(element.value);
            at_left = may_be_empty[element.value];
        } else {
            at_left = ends(element.type);
        }
    }
    return result;
}

// Looks for a cycle without recursion: chains of rules can be long.
bool is_left_recursive(const GbnfRules & grammar) {
    const size_t      n = grammar.rules.size();
    std::vector<bool> may_be_empty(n);
    for (size_t i = 0; i < n; ++i) {
        bool at_start = true;
        for (const GbnfElement & element : grammar.rules[i]) {
            may_be_empty[i] = may_be_empty[i] || (at_start && ends(element.type));
            at_start        = ends(element.type);
        }
    }
    struct Visit {
        uint32_t              rule;
        std::vector<uint32_t> todo;
    };
    enum : char { fresh, open, done };
    std::vector<char>  mark(n, fresh);
    std::vector<Visit> path;
    for (uint32_t i = 0; i < n; ++i) {
        if (mark[i] != fresh) {
            continue;
        }
        mark[i] = open;
        path.push_back({i, leftmost(grammar, may_be_empty, i)});
        while (!path.empty()) {
            if (path.back().todo.empty()) {
                mark[path.back().rule] = done;
                path.pop_back();
                continue;
            }
            const uint32_t next = path.back().todo.back();
            path.back().todo.pop_back();
            if (mark[next] == open) {
                return true;
            }
            if (mark[next] == fresh) {
                mark[next] = open;
                path.push_back({next, leftmost(grammar, may_be_empty, next)});
            }
        }
    }
    return false;
}

}  // namespace

std::string shortened(std::string message) {
    constexpr size_t longest = 160;
    if (message.size() > longest) {
        size_t n = longest;
        while (((uint8_t) message[n] >> 6) == 2) {
            --n;
        }
        message = message.substr(0, n) + "...";
    }
    return message;
}

GbnfRules parse_gbnf(const llama_vocab * vocab, const std::string & text,
                     const std::string & root) {
    llama_grammar_parser parser(vocab);
    try {
        // Rule by rule and not parse(), which prints the reason to stderr instead of telling it.
        check_text(text.c_str());
        const char * p = skip_space(text.c_str());
        while (*p != 0) {
            p = skip_space(parser.parse_rule(p));
        }
    } catch (const std::out_of_range &) {
        throw std::runtime_error("the grammar does not parse: a number is too large");
    } catch (const std::exception & error) {
        throw std::runtime_error("the grammar does not parse: " + shortened(error.what()));
    }
    const auto at = parser.symbol_ids.find(root);
    if (at == parser.symbol_ids.end()) {
        throw std::runtime_error("the grammar has no rule '" + shortened(root) + "'");
    }
    parser.rules.resize(parser.symbol_ids.size());
    for (const auto & [name, id] : parser.symbol_ids) {
        if (parser.rules[id].empty()) {
            throw std::runtime_error("the grammar has no rule '" + shortened(name) + "'");
        }
    }
    GbnfRules result;
    result.root = at->second;
    for (const llama_grammar_rule & rule : parser.rules) {
        result.rules.emplace_back();
        for (const llama_grammar_element & element : rule) {
            result.rules.back().push_back({(Gbnf) element.type, element.value});
        }
    }
    if (is_left_recursive(result)) {
        throw std::runtime_error("the grammar is left recursive");
    }
    return result;
}

}  // namespace llama_crab
