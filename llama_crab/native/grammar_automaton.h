// The states a grammar can be in, built as they are met. A state is a set of stacks; a stack is the
// item that comes next and the stack below it, and equal stacks are stored once.
#pragma once

#include <cstdint>
#include <vector>

#include "grammar_program.h"

namespace llama_crab {

// Not thread-safe. Every call that may build states throws std::runtime_error when the grammar is
// too ambiguous to follow.
class GrammarAutomaton {
public:
    static constexpr int32_t unknown = -1, dead = -2;

    explicit GrammarAutomaton(const GrammarProgram & program);

    // Starts a call from outside: it may do so much work until it fails.
    void begin() { work_ = 0; }

    // The start state of the grammar; ids are stable until collect().
    int32_t start() const { return start_; }

    int32_t next(int32_t state, uint32_t char_class) {
        const size_t  row = states_[(size_t) state].row;
        const int32_t to  = row == no_row ? unknown : rows_[row + char_class];
        return to == unknown ? step(state, char_class) : to;
    }

    // A stack is empty: the text may end here.
    bool complete(int32_t state) const { return states_[(size_t) state].complete; }
    bool has_tokens(int32_t state) const { return states_[(size_t) state].has_tokens; }

    // The token terminals of a state: f(token, negated).
    template <typename F> void each_token(int32_t state, F f) const {
        for (const uint32_t * s = stacks_begin(state); s != stacks_end(state); ++s) {
            if (*s != bottom) {
                const GrammarProgram::Item & item = item_of(*s);
                if (item.kind == Kind::token || item.kind == Kind::token_not) {
                    f((llama_token) item.value, item.kind == Kind::token_not);
                }
            }
        }
    }

    bool accepts_token(int32_t state, llama_token token) const;

    // The classes that lead somewhere, as program.n_words words.
    void live_classes(int32_t state, std::vector<uint64_t> & bits) const;

    // Some completion of the code point fits.
    bool may_match(int32_t state, PartialUtf8 partial) const;

    // The state after a token: where its text leads (`after`, or dead), or, for a text that has no
    // whole code point, the stacks of `state` that wait for one; and past its token terminals.
    int32_t after_token(int32_t state, llama_token token, int32_t after, bool has_text);

    // Bytes of all tables, about.
    size_t bytes() const;

    // Forgets every state but the start and those in `held`, whose ids it replaces.
    void collect(const std::vector<int32_t *> & held);

    size_t n_states() const { return states_.size(); }

private:
    using Kind = GrammarProgram::Kind;

    static constexpr uint32_t bottom = 0;  // the empty stack
    static constexpr size_t   no_row = SIZE_MAX;

    struct Stack {
        uint32_t item, below;
    };
    struct State {
        size_t   row;
        size_t   first;  // of its stacks in pool_
        uint32_t n;
        bool     complete, has_tokens;
    };

    const uint32_t * stacks_begin(int32_t state) const {
        return pool_.data() + states_[(size_t) state].first;
    }
    const uint32_t * stacks_end(int32_t state) const {
        return stacks_begin(state) + states_[(size_t) state].n;
    }
    const GrammarProgram::Item & item_of(uint32_t stack) const {
        return program_.items[stacks_[stack].item];
    }
    int32_t  step(int32_t state, uint32_t char_class);
    uint32_t stack_of(uint32_t item, uint32_t below);
    void     begin_expansion();
    void     push(uint32_t stack);
    void     push_past(uint32_t stack);
    void     expand();
    int32_t  state_of(std::vector<uint32_t> & stacks);

    const GrammarProgram & program_;
    int32_t                start_ = dead;
    std::vector<Stack>     stacks_;
    std::vector<State>     states_;
    std::vector<uint32_t>  pool_;
    std::vector<int32_t>   rows_;         // transitions, n_classes a row
    std::vector<uint32_t>  stack_index_;  // hash tables of ids + 1, sizes are powers of two
    std::vector<uint32_t>  state_index_;
    size_t                 work_ = 0;

    // Of the expansion under way.
    std::vector<uint32_t> mark_;  // per stack: the last expansion that met it
    uint32_t              expansion_ = 0;
    std::vector<uint32_t> todo_, found_;
};

}  // namespace llama_crab
