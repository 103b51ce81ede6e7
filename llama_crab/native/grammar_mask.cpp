#include "grammar_mask.h"

#include <algorithm>
#include <functional>

namespace llama_crab {

namespace {

constexpr uint32_t narrow        = 8192;  // nodes that are walked without further thought
constexpr size_t   max_run_bytes = 16 << 20;

bool has_bit(const std::vector<uint64_t> & bits, uint32_t i) {
    return (bits[i / 64] >> (i % 64)) & 1;
}

}  // namespace

MaskBuilder::MaskBuilder(const VocabIndex & index, const GrammarProgram & program,
                         GrammarAutomaton & automaton)
    : index_(index), program_(program), automaton_(automaton) {
    occurring_.assign(program.n_words, 0);
    class_of_.reserve(index.symbols.size());
    for (const uint32_t symbol : index.symbols) {
        const uint32_t c = program.class_of(symbol);
        class_of_.push_back(c);
        occurring_[c / 64] |= 1ull << (c % 64);
    }
    make_fans();
    path_.resize((size_t) index.max_depth + 1);
}

void MaskBuilder::make_fans() {
    std::vector<uint32_t> counts(program_.n_classes);
    for (const VocabIndex::Hub & hub : index_.hubs) {
        fans_.push_back({hub.node, std::vector<uint32_t>(hub.children.size()), {}});
        Fan & fan = fans_.back();
        for (const uint32_t node : hub.children) {
            ++counts[class_of_node(node)];
        }
        uint32_t begin = 0;
        for (const uint32_t node : hub.children) {
            const uint32_t c = class_of_node(node);
            if (counts[c] != 0) {
                fan.groups.push_back({c, begin, begin, 0});
                begin += counts[c];
                counts[c] = 0;
            }
        }
        // `counts` now leads from a class to its group.
        for (uint32_t i = 0; i < fan.groups.size(); ++i) {
            counts[fan.groups[i].char_class] = i;
        }
        const auto place = [&](bool hubs) {
            for (const uint32_t node : hub.children) {
                if (is_hub(node) == hubs) {
                    Fan::Group & group = fan.groups[counts[class_of_node(node)]];
                    fan.children[group.end++] = node;
                    group.weight += hubs ? 0 : index_.nodes[node].end - node;
                }
            }
        };
        place(true);
        place(false);
        for (const Fan::Group & group : fan.groups) {
            counts[group.char_class] = 0;
        }
    }
}

const MaskBuilder::Fan & MaskBuilder::fan_of(uint32_t node) const {
    return *std::lower_bound(fans_.begin(), fans_.end(), node,
                             [](const Fan & fan, uint32_t n) { return fan.node < n; });
}

// About how many nodes a walk from a hub meets, by group of its children.
uint64_t MaskBuilder::estimate(const Fan & fan, int32_t state, std::vector<uint64_t> & by_group) {
    ClassSet live;
    automaton_.live_classes(state, live);
    by_group.assign(fan.groups.size(), 0);
    uint64_t              total = 0;
    std::vector<uint64_t> below;
    for (size_t i = 0; i < fan.groups.size(); ++i) {
        const Fan::Group & group = fan.groups[i];
        if (!has_bit(live, group.char_class)) {
            continue;
        }
        by_group[i] = group.weight;
        for (uint32_t j = group.begin; j < group.end && is_hub(fan.children[j]); ++j) {
            const int32_t to = automaton_.next(state, group.char_class);
            by_group[i] += estimate(fan_of(fan.children[j]), to, below);
        }
        total += by_group[i];
    }
    return total;
}

TokenMask MaskBuilder::build(int32_t state, size_t enough) {
    TokenSet out(index_.n_tokens(), enough);
    walk(0, state, out);
    if (automaton_.complete(state)) {
        for (const llama_token id : index_.eog_tokens) {
            out.add(id);
        }
    }
    if (automaton_.has_tokens(state)) {
        const auto spelled = [&](llama_token id) {
            return id >= 0 && id < index_.n_tokens()
                   && ((index_.spelled[(size_t) id / 32] >> (id % 32)) & 1);
        };
        automaton_.each_token(state, [&](llama_token token, bool negated) {
            if (negated) {
                std::vector<uint32_t> others = index_.spelled;
                int32_t               count  = index_.n_spelled;
                if (spelled(token)) {
                    others[(size_t) token / 32] &= ~(1u << (token % 32));
                    --count;
                }
                out.add_all(std::move(others), count);
            } else if (spelled(token)) {
                out.add(token);
            }
        });
    }
    return out.take();
}

// Whether much of the hub's subtree is to be walked; `set` is then the classes of its best run.
bool MaskBuilder::plan_run(const Fan & fan, int32_t state, ClassSet & set) {
    std::vector<uint64_t> weights;
    if (estimate(fan, state, weights) < narrow) {
        return false;
    }
    std::map<int32_t, uint64_t> reached;  // weight by target
    for (size_t i = 0; i < weights.size(); ++i) {
        if (weights[i] > 0) {
            reached[automaton_.next(state, fan.groups[i].char_class)] += weights[i];
        }
    }
    const int32_t target = std::max_element(reached.begin(), reached.end(), [](auto & a, auto & b) {
        return a.second < b.second;
    })->first;
    ClassSet live;
    automaton_.live_classes(state, live);
    set.assign(live.size(), 0);
    each_bit(live, [&](uint32_t c) {
        if (has_bit(occurring_, c) && automaton_.next(state, c) == target) {
            set[c / 64] |= 1ull << (c % 64);
        }
    });
    return true;
}

// False when within `depth` characters the classes of the set part.
bool MaskBuilder::follow(int32_t state, const ClassSet & set, uint32_t depth, Chain & chain) {
    chain.states.assign(1, state);
    while (chain.states.size() <= depth) {
        int32_t common = GrammarAutomaton::unknown;
        bool    parted = false;
        each_bit(set, [&](uint32_t c) {
            if (!parted) {
                const int32_t to = automaton_.next(chain.states.back(), c);
                parted = common != GrammarAutomaton::unknown && to != common;
                common = to;
            }
        });
        chain.endless = common == chain.states.back();
        if (parted || chain.endless || common == GrammarAutomaton::dead) {
            return !parted;
        }
        chain.states.push_back(common);
    }
    return true;
}

std::shared_ptr<const MaskBuilder::Run> MaskBuilder::run_of(uint32_t hub, const ClassSet & set) {
    std::shared_ptr<const Run> & known = runs_[{hub, set}];
    if (known != nullptr) {
        return known;
    }
    auto run = std::make_shared<Run>();
    run->bits.resize(((size_t) index_.n_tokens() + 31) / 32);
    const auto & nodes = index_.nodes;

    std::vector<std::pair<uint32_t, uint32_t>> exits;  // class, node
    for (uint32_t i = hub + 1; i < nodes[hub].end;) {
        const VocabIndex::Node & node = nodes[i];
        if (!has_bit(set, class_of_node(i))) {
            exits.push_back({class_of_node(i), i});
            i = node.end;
            continue;
        }
        const uint32_t depth = node.depth - nodes[hub].depth;
        run->depth = std::max(run->depth, depth);
        for (uint32_t j = node.tokens; j < nodes[i + 1].tokens; ++j) {
            const llama_token id = index_.tokens[j];
            if (index_.tails[j] != 0) {
                run->tails.push_back({id, index_.tails[j], depth});
            } else {
                run->bits[(size_t) id / 32] |= 1u << (id % 32);
                ++run->count;
            }
        }
        ++i;
    }
    std::sort(exits.begin(), exits.end());
    for (const auto & [c, node] : exits) {
        if (run->groups.empty() || run->groups.back().char_class != c) {
            run->groups.push_back({c, 0});
        }
        run->exits.push_back(node);
        run->groups.back().end = (uint32_t) run->exits.size();
    }
    known = run;
    run_bytes_ += run->bytes();
    if (run_bytes_ > max_run_bytes) {
        runs_.clear();
        run_bytes_ = 0;
    }
    return run;
}

bool MaskBuilder::walk_run(const Fan & fan, int32_t state, TokenSet & out) {
    constexpr uint32_t cheap = 4;  // most sets that part do so at once, before a run is made
    ClassSet           set;
    Chain              chain;
    if (!plan_run(fan, state, set) || !follow(state, set, cheap, chain)) {
        return false;
    }
    if (!chain.endless && chain.states.size() <= 2) {
        return false;  // after a character of the set comes another kind: little to walk
    }
    const std::shared_ptr<const Run> run = run_of(fan.node, set);
    if (!follow(state, set, run->depth, chain)) {
        return false;
    }
    add_run(*run, index_.nodes[fan.node].depth, chain, out);
    return true;
}

// All tokens of the set alone, and what lies behind the exits.
void MaskBuilder::add_run(const Run & run, uint32_t hub_depth, const Chain & chain,
                          TokenSet & out) {
    const uint32_t last  = (uint32_t) chain.states.size() - 1;
    const auto     alive = [&](uint32_t depth) { return chain.endless || depth <= last; };
    const auto     at    = [&](uint32_t depth) { return chain.states[std::min(depth, last)]; };

    std::vector<uint32_t> bits  = run.bits;
    int32_t               count = run.count;
    if (!chain.endless && hub_depth + last < index_.max_depth) {
        for (uint32_t i = 0; i < index_.n_deeper[hub_depth + last]; ++i) {
            uint32_t &     word = bits[(size_t) index_.deepest[i] / 32];
            const uint32_t bit  = 1u << (index_.deepest[i] % 32);
            count -= (word & bit) != 0;
            word &= ~bit;
        }
    }
    out.add_all(std::move(bits), count);

    std::vector<int8_t> fits(index_.partials.size(), -1);  // in the state of the last such token
    int32_t             state = GrammarAutomaton::unknown;
    for (const Run::Tail & tail : run.tails) {
        if (!alive(tail.depth)) {
            continue;
        }
        if (at(tail.depth) != state) {
            state = at(tail.depth);
            std::fill(fits.begin(), fits.end(), -1);
        }
        int8_t & known = fits[tail.tail];
        if (known < 0) {
            known = automaton_.may_match(state, index_.partials[tail.tail]);
        }
        if (known != 0) {
            out.add(tail.token);
        }
    }

    ClassSet live, leading(program_.n_words);
    for (const int32_t from : chain.states) {
        automaton_.live_classes(from, live);
        std::transform(live.begin(), live.end(), leading.begin(), leading.begin(), std::bit_or<>());
    }
    uint32_t begin = 0;
    for (const Run::Exits & group : run.groups) {
        const bool leads = has_bit(leading, group.char_class);
        for (uint32_t i = begin; leads && i < group.end; ++i) {
            const uint32_t depth = index_.nodes[run.exits[i]].depth - 1 - hub_depth;
            if (!alive(depth)) {
                continue;
            }
            const int32_t to = automaton_.next(at(depth), group.char_class);
            if (to != GrammarAutomaton::dead) {
                walk(run.exits[i], to, out);
            }
        }
        begin = group.end;
    }
}

// The tokens of a node whose code point led to `state`, and of the nodes below.
void MaskBuilder::walk(uint32_t node, int32_t state, TokenSet & out) {
    const VocabIndex::Node * nodes = index_.nodes.data();
    add_tokens(node, state, out);
    if (nodes[node].is_hub) {
        walk_hub(fan_of(node), state, out);
        return;
    }
    path_[nodes[node].depth] = state;
    for (uint32_t i = node + 1; i < nodes[node].end && !out.full();) {
        const uint32_t depth = nodes[i].depth;
        const int32_t  to    = automaton_.next(path_[depth - 1], class_of_node(i));
        if (to == GrammarAutomaton::dead) {
            i = nodes[i].end;
        } else if (nodes[i].is_hub) {
            walk(i, to, out);
            i = nodes[i].end;
        } else {
            path_[depth] = to;
            add_tokens(i, to, out);
            ++i;
        }
    }
}

void MaskBuilder::walk_hub(const Fan & fan, int32_t state, TokenSet & out) {
    if (out.wants_all() && walk_run(fan, state, out)) {
        return;
    }
    ClassSet live;
    automaton_.live_classes(state, live);
    for (const Fan::Group & group : fan.groups) {
        if (has_bit(live, group.char_class)) {
            const int32_t to = automaton_.next(state, group.char_class);
            for (uint32_t i = group.begin; i < group.end && !out.full(); ++i) {
                walk(fan.children[i], to, out);
            }
        }
    }
}

void MaskBuilder::add_tokens(uint32_t node, int32_t state, TokenSet & out) {
    for (uint32_t j = index_.nodes[node].tokens; j < index_.nodes[node + 1].tokens; ++j) {
        if (index_.tails[j] == 0 || automaton_.may_match(state, index_.partials[index_.tails[j]])) {
            out.add(index_.tokens[j]);
        }
    }
}

}  // namespace llama_crab
