// What samplers derive from a vocabulary, made once and shared by the sequences of a model.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "grammar.h"
#include "token_history.h"

namespace llama_crab {

// Thread-safe. Whoever comes second waits for whoever builds.
class VocabCache {
public:
    explicit VocabCache(const llama_vocab * vocab) : vocab_(vocab) {}

    std::shared_ptr<const DryBreakers> dry_breakers(const std::vector<std::string> & breakers);
    // Throws std::runtime_error when the text does not parse.
    std::shared_ptr<Grammar> grammar(const std::string & gbnf, const std::string & root);

private:
    template <typename Value> struct Entry {
        std::vector<std::string> key;
        std::shared_ptr<Value>   value;
    };
    // The latest first; a few, for grammars keep their masks.
    template <typename Value> using Entries = std::list<Entry<Value>>;

    template <typename Value, typename Make>
    std::shared_ptr<Value> look_up(Entries<Value> & entries, std::vector<std::string> key,
                                   Make make);

    const llama_vocab *               vocab_;
    std::mutex                        mutex_;
    std::shared_ptr<const VocabIndex> index_;
    Entries<const DryBreakers>        breakers_;
    Entries<Grammar>                  grammars_;
};

}  // namespace llama_crab
