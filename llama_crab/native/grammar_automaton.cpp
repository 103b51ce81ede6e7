#include "grammar_automaton.h"

#include <algorithm>
#include <stdexcept>

namespace llama_crab {

namespace {

// A grammar beyond these is hostile or hopeless; JSON schemas stay below a thousandth of them.
constexpr size_t max_stacks = 1 << 14;   // of a state
constexpr size_t max_work   = 1 << 21;   // stacks met in one call
constexpr size_t max_bytes  = 256 << 20;

uint64_t hash_of(uint32_t a, uint32_t b) {
    uint64_t x = ((uint64_t) a << 32 | b) * 0x9e3779b97f4a7c15;
    return x ^ (x >> 29);
}

uint64_t hash_of(const uint32_t * words, size_t n) {
    uint64_t x = n;
    for (size_t i = 0; i < n; ++i) {
        x = (x ^ words[i]) * 0x9e3779b97f4a7c15;
        x ^= x >> 29;
    }
    return x;
}

[[noreturn]] void too_ambiguous() {
    throw std::runtime_error("the grammar is too ambiguous: it can be in too many places at once");
}

}  // namespace

GrammarAutomaton::GrammarAutomaton(const GrammarProgram & program) : program_(program) {
    stacks_.push_back({0, 0});
    mark_.push_back(0);
    begin_expansion();
    for (const int64_t first : program_.alternatives[program_.root]) {
        push(first == GrammarProgram::empty ? bottom : stack_of((uint32_t) first, bottom));
    }
    expand();
    start_ = state_of(found_);
}

bool GrammarAutomaton::accepts_token(int32_t state, llama_token token) const {
    bool result = false;
    each_token(state, [&](llama_token id, bool negated) { result |= (id == token) != negated; });
    return result;
}

void GrammarAutomaton::live_classes(int32_t state, std::vector<uint64_t> & bits) const {
    bits.assign(program_.n_words, 0);
    for (const uint32_t * s = stacks_begin(state); s != stacks_end(state); ++s) {
        if (*s != bottom && item_of(*s).kind == Kind::chars) {
            const uint64_t * members = program_.members(item_of(*s).value);
            for (uint32_t w = 0; w < program_.n_words; ++w) {
                bits[w] |= members[w];
            }
        }
    }
}

bool GrammarAutomaton::may_match(int32_t state, PartialUtf8 partial) const {
    for (const uint32_t * s = stacks_begin(state); s != stacks_end(state); ++s) {
        if (*s != bottom && item_of(*s).kind == Kind::chars
            && program_.may_match(item_of(*s).value, partial)) {
            return true;
        }
    }
    return false;
}

int32_t GrammarAutomaton::step(int32_t state, uint32_t char_class) {
    begin_expansion();
    for (uint32_t i = 0; i < states_[(size_t) state].n; ++i) {
        const uint32_t stack = stacks_begin(state)[i];
        if (stack != bottom) {
            const GrammarProgram::Item & item = item_of(stack);
            if (item.kind == Kind::chars && program_.matches(item.value, char_class)) {
                push_past(stack);
            }
        }
    }
    work_ += states_[(size_t) state].n;
    expand();
    const int32_t to = state_of(found_);
    State &       from = states_[(size_t) state];
    if (from.row == no_row) {
        from.row = rows_.size();
        rows_.resize(rows_.size() + program_.n_classes, unknown);
    }
    rows_[from.row + char_class] = to;
    return to;
}

int32_t GrammarAutomaton::after_token(int32_t state, llama_token token, int32_t after,
                                      bool has_text) {
    if (has_text && !has_tokens(state)) {
        return after;
    }
    begin_expansion();
    for (uint32_t i = 0; i < states_[(size_t) state].n; ++i) {
        const uint32_t stack = stacks_begin(state)[i];
        if (stack == bottom) {
            continue;
        }
        const GrammarProgram::Item & item = item_of(stack);
        if (item.kind == Kind::chars) {
            if (!has_text) {
                push(stack);
            }
        } else if (((llama_token) item.value == token) == (item.kind == Kind::token)) {
            push_past(stack);
        }
    }
    if (has_text && after != dead) {
        for (const uint32_t * s = stacks_begin(after); s != stacks_end(after); ++s) {
            push(*s);
        }
    }
    expand();
    return state_of(found_);
}

uint32_t GrammarAutomaton::stack_of(uint32_t item, uint32_t below) {
    if (stacks_.size() * 2 >= stack_index_.size()) {
        stack_index_.assign(std::max<size_t>(stack_index_.size() * 2, 256), 0);
        for (uint32_t i = 1; i < stacks_.size(); ++i) {
            size_t at = hash_of(stacks_[i].item, stacks_[i].below);
            while (stack_index_[at &= stack_index_.size() - 1] != 0) {
                ++at;
            }
            stack_index_[at] = i + 1;
        }
    }
    const size_t mask = stack_index_.size() - 1;
    size_t       at   = hash_of(item, below) & mask;
    for (; stack_index_[at] != 0; at = (at + 1) & mask) {
        const uint32_t id = stack_index_[at] - 1;
        if (stacks_[id].item == item && stacks_[id].below == below) {
            return id;
        }
    }
    stacks_.push_back({item, below});
    mark_.push_back(0);
    stack_index_[at] = (uint32_t) stacks_.size();
    return (uint32_t) stacks_.size() - 1;
}

void GrammarAutomaton::begin_expansion() {
    if (++expansion_ == 0) {
        std::fill(mark_.begin(), mark_.end(), 0);
        expansion_ = 1;
    }
}

void GrammarAutomaton::push(uint32_t stack) {
    if (mark_[stack] != expansion_) {
        mark_[stack] = expansion_;
        todo_.push_back(stack);
    }
}

// The stack once its item is consumed.
void GrammarAutomaton::push_past(uint32_t stack) {
    const auto [item, below] = stacks_[stack];
    push(program_.items[item].last ? below : stack_of(item + 1, below));
}

// Replaces references by their alternatives until every stack of `found_` awaits input or is empty.
void GrammarAutomaton::expand() {
    found_.clear();
    while (!todo_.empty()) {
        const uint32_t stack = todo_.back();
        todo_.pop_back();
        if (stack == bottom || item_of(stack).kind != Kind::rule) {
            found_.push_back(stack);
            if (found_.size() > max_stacks) {
                todo_.clear();
                too_ambiguous();
            }
            continue;
        }
        const auto [item, below] = stacks_[stack];
        const auto & reference   = program_.items[item];
        const uint32_t rest      = reference.last ? below : stack_of(item + 1, below);
        for (const int64_t first : program_.alternatives[reference.value]) {
            push(first == GrammarProgram::empty ? rest : stack_of((uint32_t) first, rest));
        }
        work_ += program_.alternatives[reference.value].size();
        if (work_ > max_work || bytes() > max_bytes) {
            todo_.clear();
            too_ambiguous();
        }
    }
}

int32_t GrammarAutomaton::state_of(std::vector<uint32_t> & stacks) {
    if (stacks.empty()) {
        return dead;
    }
    std::sort(stacks.begin(), stacks.end());
    if (states_.size() * 2 >= state_index_.size()) {
        state_index_.assign(std::max<size_t>(state_index_.size() * 2, 256), 0);
        for (uint32_t i = 0; i < states_.size(); ++i) {
            size_t at = hash_of(stacks_begin((int32_t) i), states_[i].n);
            while (state_index_[at &= state_index_.size() - 1] != 0) {
                ++at;
            }
            state_index_[at] = i + 1;
        }
    }
    const size_t mask = state_index_.size() - 1;
    size_t       at   = hash_of(stacks.data(), stacks.size()) & mask;
    for (; state_index_[at] != 0; at = (at + 1) & mask) {
        const int32_t id = (int32_t) state_index_[at] - 1;
        if (std::equal(stacks.begin(), stacks.end(), stacks_begin(id), stacks_end(id))) {
            return id;
        }
    }
    if (bytes() > max_bytes) {
        too_ambiguous();
    }
    State state{no_row, pool_.size(), (uint32_t) stacks.size(), false, false};
    for (const uint32_t stack : stacks) {
        state.complete |= stack == bottom;
        state.has_tokens |= stack != bottom && item_of(stack).kind != Kind::chars;
    }
    pool_.insert(pool_.end(), stacks.begin(), stacks.end());
    states_.push_back(state);
    state_index_[at] = (uint32_t) states_.size();
    return (int32_t) states_.size() - 1;
}

size_t GrammarAutomaton::bytes() const {
    return stacks_.size() * (sizeof(Stack) + 16) + states_.size() * (sizeof(State) + 16)
           + pool_.size() * 4 + rows_.size() * 4;
}

void GrammarAutomaton::collect(const std::vector<int32_t *> & held) {
    std::vector<int32_t *> keep = held;
    keep.push_back(&start_);
    // A stack is stored after the one below it: one pass marks downwards, one renumbers upwards.
    std::vector<uint32_t> renamed(stacks_.size(), 0);
    for (const int32_t * state : keep) {
        if (*state != dead) {
            for (const uint32_t * s = stacks_begin(*state); s != stacks_end(*state); ++s) {
                renamed[*s] = 1;
            }
        }
    }
    for (size_t i = renamed.size(); i-- > 1;) {
        if (renamed[i] != 0) {
            renamed[stacks_[i].below] = 1;
        }
    }
    const std::vector<Stack>    old_stacks = std::move(stacks_);
    const std::vector<State>    old_states = std::move(states_);
    const std::vector<uint32_t> old_pool   = std::move(pool_);
    stacks_ = {{0, 0}};
    states_ = {};
    pool_   = {};
    rows_   = {};
    mark_   = {0};
    stack_index_ = {};
    state_index_ = {};
    renamed[bottom] = bottom;
    for (size_t i = 1; i < renamed.size(); ++i) {
        if (renamed[i] != 0) {
            renamed[i] = stack_of(old_stacks[i].item, renamed[old_stacks[i].below]);
        }
    }
    std::vector<uint32_t> stacks;
    for (int32_t * state : keep) {
        if (*state != dead) {
            const State & old = old_states[(size_t) *state];
            stacks.clear();
            for (uint32_t i = 0; i < old.n; ++i) {
                stacks.push_back(renamed[old_pool[old.first + i]]);
            }
            *state = state_of(stacks);
        }
    }
}

}  // namespace llama_crab
