// Which tokens a state of a grammar allows, found by walking the vocabulary's trie.
#pragma once

#include <map>
#include <memory>
#include <vector>

#include "grammar_automaton.h"
#include "token_mask.h"
#include "vocab_index.h"

namespace llama_crab {

class MaskBuilder {
public:
    MaskBuilder(const VocabIndex & index, const GrammarProgram & program,
                GrammarAutomaton & automaton);

    // The tokens that `state` allows at a character's start. When `enough` is given, some of them:
    // at least so many, or all.
    TokenMask build(int32_t state, size_t enough = SIZE_MAX);

private:
    // Below a hub, the walk of a state in which most characters (the classes of one set) lead to a
    // state like itself, as inside a string: what does not depend on the state.
    struct Run {
        struct Tail {
            llama_token token;
            uint32_t    tail, depth;
        };
        struct Exits {
            uint32_t char_class, end;  // in `exits`
        };
        std::vector<uint32_t> bits;       // the whole tokens made of the set alone
        int32_t               count = 0;
        uint32_t              depth = 0;  // code points of the longest path in the set
        std::vector<Tail>     tails;      // tokens of the set alone, cut short in a character
        std::vector<uint32_t> exits;      // nodes where a path leaves the set, by class
        std::vector<Exits>    groups;

        size_t bytes() const {
            return bits.size() * 4 + exits.size() * 4 + tails.size() * sizeof(Tail);
        }
    };

    // The states after 0, 1, 2 ... characters of a run's set, whichever they are.
    struct Chain {
        std::vector<int32_t> states;
        bool                 endless = false;  // the last one repeats; else the next is dead
    };
    using ClassSet = std::vector<uint64_t>;

    // The children of a hub of the trie, grouped by class.
    struct Fan {
        struct Group {
            uint32_t char_class, begin, end;  // in `children`
            uint32_t weight;                  // nodes of them and below, hubs left out
        };
        uint32_t              node;
        std::vector<uint32_t> children;  // in a group, hubs first
        std::vector<Group>    groups;
    };

    void        make_fans();
    const Fan & fan_of(uint32_t node) const;
    bool        is_hub(uint32_t node) const { return index_.nodes[node].is_hub; }
    uint64_t    estimate(const Fan & fan, int32_t state, std::vector<uint64_t> & by_group);
    bool        plan_run(const Fan & fan, int32_t state, ClassSet & set);
    bool        follow(int32_t state, const ClassSet & set, uint32_t depth, Chain & chain);
    bool        walk_run(const Fan & fan, int32_t state, TokenSet & out);

    std::shared_ptr<const Run> run_of(uint32_t hub, const ClassSet & set);
    void add_run(const Run & run, uint32_t hub_depth, const Chain & chain, TokenSet & out);

    void        walk(uint32_t node, int32_t state, TokenSet & out);
    void        walk_hub(const Fan & fan, int32_t state, TokenSet & out);
    void        add_tokens(uint32_t node, int32_t state, TokenSet & out);

    uint32_t class_of_node(uint32_t node) const { return class_of_[index_.nodes[node].symbol]; }

    const VocabIndex &     index_;
    const GrammarProgram & program_;
    GrammarAutomaton &     automaton_;

    std::vector<uint32_t> class_of_;     // per symbol
    ClassSet              occurring_;    // classes of some symbol
    std::vector<Fan>      fans_;         // ascending by node
    std::vector<int32_t>  path_;         // state per depth of the walk under way

    std::map<std::pair<uint32_t, ClassSet>, std::shared_ptr<const Run>> runs_;  // by hub and set
    size_t run_bytes_ = 0;
};

}  // namespace llama_crab
