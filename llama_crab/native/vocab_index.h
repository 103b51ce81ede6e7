// The pieces of a vocabulary, indexed for grammars: which tokens start with which code points.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "llama.h"

namespace llama_crab {

// A UTF-8 sequence cut short: its bits so far and the bytes missing (-1: not UTF-8).
struct PartialUtf8 {
    uint32_t value    = 0;
    int32_t  n_remain = 0;
};

// Decodes as llama.cpp's grammars do, quirks included: only the bytes that complete `partial` must
// be continuation bytes, and a NUL ends the text. `partial` becomes what is pending at the end;
// where that is invalid there are no code points.
void decode_utf8(std::string_view text, PartialUtf8 & partial, std::vector<uint32_t> & code_points);

// Immutable once built; any number of threads may read it.
class VocabIndex {
public:
    explicit VocabIndex(const llama_vocab * vocab);

    // A trie over code points in depth-first order: the children of node i start at i + 1, and
    // nodes[i].end is the first node outside its subtree. The tokens spelled by the path to i are
    // tokens[nodes[i].tokens, nodes[i + 1].tokens); a last node closes the range.
    struct Node {
        uint32_t symbol;  // index of its code point in `symbols`
        uint32_t end;
        uint32_t tokens;
        uint32_t depth : 31;
        uint32_t is_hub : 1;
    };

    int32_t          n_tokens() const { return (int32_t) eog_.size(); }
    bool             is_eog(llama_token id) const { return eog_[(size_t) id]; }
    std::string_view piece(llama_token id) const {
        return {text_.data() + offsets_[(size_t) id],
                offsets_[(size_t) id + 1] - offsets_[(size_t) id]};
    }

    // False for what no grammar can take: a piece that is empty or has a NUL.
    bool is_text(llama_token id) const {
        const std::string_view p = piece(id);
        return !p.empty() && p.find('\0') == p.npos;
    }

    std::vector<uint32_t>    symbols;   // distinct code points, ascending
    std::vector<Node>        nodes;
    std::vector<llama_token> tokens;    // in the order of the nodes
    std::vector<uint32_t>    tails;     // of each of `tokens`: in `partials`, 0 when it is whole
    std::vector<PartialUtf8> partials;
    uint32_t                 max_depth = 0;

    // The root and the other nodes with so many children that a look at each would be slow.
    struct Hub {
        uint32_t              node;
        std::vector<uint32_t> children;
    };
    std::vector<Hub> hubs;  // ascending

    std::vector<llama_token> eog_tokens;
    std::vector<llama_token> continuations;  // start with a continuation byte; not in the trie
    std::vector<uint32_t>    spelled;        // bits of the tokens with a code point of their own
    int32_t                  n_spelled = 0;
    std::vector<llama_token> deepest;        // `tokens` by descending number of code points
    std::vector<uint32_t>    n_deeper;       // n_deeper[d]: how many of them have more than d

private:
    struct Entry;

    void add_trie(const std::vector<uint32_t> & points, std::vector<Entry> & entries);

    std::string         text_;
    std::vector<size_t> offsets_;
    std::vector<bool>   eog_;
};

}  // namespace llama_crab
