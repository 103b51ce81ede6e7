// The regular expressions that wake a lazy grammar.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace llama_crab {

// Patterns compiled once, for texts that grow by a token at a time. A match is what llama.cpp's search of
// the whole text finds, but for one: behind a beginning of plain characters, as in <call>\s*x, it is
// looked for while the text has less than 1 KiB behind that beginning.
class TriggerPatterns {
public:
    explicit TriggerPatterns(const std::vector<std::string> & patterns);  // std::runtime_error
    ~TriggerPatterns();
    TriggerPatterns(const TriggerPatterns &) = delete;

    // What is known of a text so far; a new one for a text that does not begin with the last one.
    struct Progress {
        size_t              next = 0;  // where to look for the beginning of a match
        std::vector<size_t> open;      // beginnings that may become matches
        bool                begun = false;
    };
    using Seen = std::vector<Progress>;  // by pattern

    // Where the grammar starts, by the first pattern that matches; npos when none does.
    size_t find(const std::string & text, Seen & seen) const;

private:
    struct Trigger;
    std::vector<std::unique_ptr<const Trigger>> triggers_;
};

}  // namespace llama_crab
