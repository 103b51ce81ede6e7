#include "grammar_program.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <tuple>
#include <unordered_map>

namespace llama_crab {

namespace {

using Ranges = std::vector<std::pair<uint32_t, uint32_t>>;

// What the ranges cover, ascending and apart.
Ranges merged(const GrammarProgram::CharSet & set) {
    if (set.any) {
        return {{0, UINT32_MAX}};
    }
    Ranges sorted = set.ranges, result;
    std::sort(sorted.begin(), sorted.end());
    for (const auto & [low, high] : sorted) {
        if (low > high) {
            continue;
        }
        const uint64_t after = result.empty() ? 0 : result.back().second + 1ull;
        if (!result.empty() && low <= after) {
            result.back().second = std::max(result.back().second, high);
        } else {
            result.push_back({low, high});
        }
    }
    return result;
}

uint64_t mixed(uint64_t x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

}  // namespace

GrammarProgram::GrammarProgram(const GbnfRules & grammar) : root(grammar.root) {
    for (const auto & rule : grammar.rules) {
        add_rule(rule);
    }
    // Equal sets are one: [a-z] in a hundred rules is one set.
    std::map<std::tuple<bool, bool, Ranges>, uint32_t> known;
    std::vector<CharSet>                               distinct;
    for (Item & item : items) {
        if (item.kind == Kind::chars) {
            CharSet &  set = sets[item.value];
            const auto at  = known.emplace(std::make_tuple(set.negated, set.any, set.ranges),
                                           (uint32_t) distinct.size());
            if (at.second) {
                distinct.push_back(set);
            }
            item.value = at.first->second;
        }
    }
    sets = std::move(distinct);
    make_classes();
}

void GrammarProgram::add_rule(const std::vector<GbnfElement> & rule) {
    alternatives.emplace_back();
    size_t begin = items.size();
    for (const GbnfElement & element : rule) {
        CharSet * set = sets.empty() ? nullptr : &sets.back();
        switch (element.type) {
            case Gbnf::end:
            case Gbnf::alt:
                alternatives.back().push_back(items.size() > begin ? (int64_t) begin : empty);
                if (items.size() > begin) {
                    items.back().last = true;
                }
                begin = items.size();
                break;
            case Gbnf::rule_ref:
                items.push_back({Kind::rule, false, element.value});
                break;
            case Gbnf::token:
            case Gbnf::token_not:
                items.push_back({element.type == Gbnf::token ? Kind::token : Kind::token_not, false,
                                 element.value});
                break;
            case Gbnf::character:
            case Gbnf::char_not:
            case Gbnf::char_any:
                items.push_back({Kind::chars, false, (uint32_t) sets.size()});
                sets.push_back({element.type == Gbnf::char_not, element.type == Gbnf::char_any,
                                {{element.value, element.value}}});
                break;
            case Gbnf::char_alt:
                set->ranges.push_back({element.value, element.value});
                break;
            case Gbnf::range_upper:
                set->ranges.back().second = element.value;
                break;
        }
    }
}

void GrammarProgram::make_classes() {
    constexpr uint64_t max_bits = 1 << 27;
    // A sweep over the bounds of all sets. Code points in the same sets have the same sum of tags.
    std::vector<Ranges>                         covered;
    std::vector<std::pair<uint64_t, uint64_t>> toggles{{0, 0}};
    for (size_t i = 0; i < sets.size(); ++i) {
        covered.push_back(merged(sets[i]));
        for (const auto & [low, high] : covered.back()) {
            toggles.push_back({low, mixed(i)});
            toggles.push_back({high + 1ull, mixed(i)});
        }
    }
    std::sort(toggles.begin(), toggles.end());
    std::unordered_map<uint64_t, uint32_t> class_of_tags;
    uint64_t                               tags = 0;
    for (size_t i = 0; i < toggles.size(); ++i) {
        tags ^= toggles[i].second;
        const bool more = i + 1 < toggles.size() && toggles[i + 1].first == toggles[i].first;
        if (!more && toggles[i].first <= UINT32_MAX) {
            starts_.push_back((uint32_t) toggles[i].first);
            class_at_.push_back(class_of_tags.emplace(tags, (uint32_t) class_of_tags.size())
                                    .first->second);
        }
    }
    n_classes = (uint32_t) class_of_tags.size();
    n_words   = (n_classes + 63) / 64;
    if (n_words * 64ull * sets.size() > max_bits) {
        throw std::runtime_error("the grammar tells too many characters apart");
    }
    members_.resize((size_t) n_words * sets.size());
    for (size_t i = 0; i < sets.size(); ++i) {
        uint64_t * bits = members_.data() + i * n_words;
        for (const auto & [low, high] : covered[i]) {
            const auto first = std::lower_bound(starts_.begin(), starts_.end(), low);
            for (auto at = first; at != starts_.end() && *at <= high; ++at) {
                const uint32_t c = class_at_[(size_t) (at - starts_.begin())];
                bits[c / 64] |= 1ull << (c % 64);
            }
        }
        if (sets[i].negated) {
            for (uint32_t c = 0; c < n_classes; ++c) {
                bits[c / 64] ^= 1ull << (c % 64);
            }
        }
    }
    for (uint32_t c = 0; c < 128; ++c) {
        ascii_[c] = search(c);
    }
}

uint32_t GrammarProgram::search(uint32_t code_point) const {
    const auto after = std::upper_bound(starts_.begin(), starts_.end(), code_point);
    return class_at_[(size_t) (after - starts_.begin()) - 1];
}

bool GrammarProgram::may_match(uint32_t set, PartialUtf8 partial) const {
    // Two bytes with so few bits would be an overlong form of ASCII.
    if (partial.n_remain < 0 || (partial.n_remain == 1 && partial.value < 2)) {
        return false;
    }
    const CharSet & chars = sets[set];
    if (chars.any) {
        return true;
    }
    const int      shift = 6 * partial.n_remain;
    uint32_t       low   = partial.value << shift;
    const uint32_t high  = low | ((1u << shift) - 1);
    if (low == 0) {
        low = partial.n_remain == 2 ? 1u << 11 : partial.n_remain == 3 ? 1u << 16 : 0;
    }
    for (const auto & [first, last] : chars.ranges) {
        if (first <= high && low <= last) {
            return !chars.negated;
        }
    }
    return chars.negated;
}

}  // namespace llama_crab
