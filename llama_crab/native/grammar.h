// Grammar-constrained generation without llama.cpp's cost: it walks the whole vocabulary at each
// token, this remembers.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "grammar_automaton.h"
#include "grammar_bridge.h"
#include "trigger_patterns.h"
#include "grammar_mask.h"
#include "grammar_program.h"
#include "vocab_index.h"

namespace llama_crab {

// A grammar over one vocabulary and all that was learned about it. Any number of sequences and
// threads may share it.
class Grammar {
public:
    // Throws std::runtime_error.
    static std::shared_ptr<Grammar> parse(std::shared_ptr<const VocabIndex> index,
                                          const llama_vocab * vocab, const std::string & gbnf,
                                          const std::string & root);
    Grammar(const Grammar &) = delete;

    size_t bytes();  // of the tables and cached masks, about

private:
    friend class GrammarConstraint;

    // Where a sequence is. The grammar knows it, because it rebuilds its tables when they are large.
    struct Position {
        int32_t     state;
        PartialUtf8 partial;  // the start of a character that the last token left
    };

    // What is known about a state of the automaton, at its id.
    struct Known {
        std::shared_ptr<const TokenMask> mask;
        llama_token                      forced = not_asked;
    };

    static constexpr llama_token not_asked = -2;

    Grammar(std::shared_ptr<const VocabIndex> index, const GbnfRules & rules);

    void add(Position * position, const Position & value);
    void add(Position * position);  // at the start
    void remove(Position * position);
    void move(Position * position, const Position * to);  // null: to the start

    std::shared_ptr<const TokenMask> mask(const Position & position);
    bool                             allows(const Position & position, llama_token token);
    llama_token                      forced(const Position & position);
    void accept(Position & position, llama_token token);
    bool accept_pieces(Position & position,
                       const std::vector<std::pair<llama_token, std::string>> & pieces);

    struct Outcome {
        bool     allowed;  // llama.cpp's mask would let it through
        Position after;    // .state is dead where its accept would fail
    };
    Outcome   consume(const Position & from, llama_token token, std::string_view piece);
    bool      allowed(const Position & position, llama_token token);
    TokenMask continue_character(const Position & position);
    Known &   known(int32_t state);
    void      remember(int32_t state, TokenMask mask);
    void      begin();

    std::mutex                              mutex_;
    const std::shared_ptr<const VocabIndex> index_;
    const GrammarProgram                    program_;
    GrammarAutomaton                        automaton_;
    MaskBuilder                             builder_;
    std::vector<Known>                      known_;
    size_t                                  mask_bytes_ = 0;
    size_t                                  table_limit_;
    std::unordered_set<Position *>          positions_;
    std::vector<uint32_t>                   code_points_;
};

// What the prompt of an answer says about the grammar of that answer.
struct GrammarOpening {
    std::string              prefix;  // of the answer, written by the prompt: the grammar reads it first
    std::string              thinking_start;  // opens text in which a lazy grammar does not wake
    std::vector<std::string> thinking_ends;
};

// The constraint of one sequence: where it is in a grammar. A copy is an independent sequence. Not
// for several threads at once, though constraints that share a Grammar are independent.
class GrammarConstraint {
public:
    // A lazy grammar constrains nothing until one of the tokens, or text that matches one of the
    // patterns (ECMAScript), has been accepted. Throws std::runtime_error.
    GrammarConstraint(std::shared_ptr<Grammar> grammar, bool lazy,
                      const std::vector<std::string> & trigger_patterns,
                      const std::vector<llama_token> & trigger_tokens,
                      const GrammarOpening & opening = {});
    GrammarConstraint(const GrammarConstraint & other);
    GrammarConstraint & operator=(const GrammarConstraint & other);
    ~GrammarConstraint();

    bool active() const { return !waiting_; }  // false: a lazy grammar waits for its trigger

    // Null while inactive.
    std::shared_ptr<const TokenMask> mask();

    bool allows(llama_token token);

    // The only allowed token, or LLAMA_TOKEN_NULL; never one while inactive.
    llama_token forced();

    // Throws std::runtime_error, and stays where it was, if the token is not allowed.
    void accept(llama_token token);

    void reset();

private:
    struct Triggers {
        TriggerPatterns          patterns;
        std::vector<llama_token> tokens;
    };
    using Pieces = std::vector<std::pair<llama_token, std::string>>;

    void open();
    void forget();
    void follow_thinking(size_t from);

    std::shared_ptr<Grammar>        grammar_;
    std::shared_ptr<const Triggers> triggers_;
    std::shared_ptr<const GrammarOpening> opening_;
    Grammar::Position               position_;
    bool                            lazy_, waiting_;
    bool                            thinking_ = false;
    std::string                     buffer_;  // what was accepted while waiting
    TriggerPatterns::Seen           seen_;    // how far triggers were looked for in it
    std::vector<std::pair<llama_token, size_t>> buffered_;  // its tokens and their ends
};

}  // namespace llama_crab
