// llama-common's parser combinators over an input that grows. Same results as
// common_peg_arena::parse of the whole input (with its lenient flag), but only what the end of the
// input can still change is parsed again.
#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "peg-parser.h"
#include "trie.h"

namespace llama_crab {

struct PegNode;
using PegNodePtr = std::shared_ptr<const PegNode>;
using PegInvalid = std::vector<common_peg_invalid_utf8>;

struct PegNode {
    const std::string *     rule;  // borrowed from the arena; one of the two is set
    const std::string *     tag;
    size_t                  start;
    size_t                  end;
    bool                    is_partial;
    std::vector<PegNodePtr> children;
    PegInvalid              invalid_utf8;
};

struct PegResult {
    common_peg_parse_result_type type  = COMMON_PEG_PARSE_RESULT_FAIL;
    size_t                       start = 0;
    size_t                       end   = 0;
    std::vector<PegNodePtr>      nodes;
    PegInvalid                   invalid_utf8;
    bool                         is_final = false;  // no continuation of the input changes it

    bool fail() const { return type == COMMON_PEG_PARSE_RESULT_FAIL; }
    bool success() const { return type == COMMON_PEG_PARSE_RESULT_SUCCESS; }
    bool need_more_input() const { return type == COMMON_PEG_PARSE_RESULT_NEED_MORE_INPUT; }
};

class IncrementalPeg {
public:
    // `keep_rules`: nodes of rules as well, not only of tags.
    IncrementalPeg(std::shared_ptr<const common_peg_arena> arena, bool keep_rules);
    ~IncrementalPeg();

    // `input` must begin with what it was before. Throws std::runtime_error when it nests too deep.
    const PegResult & parse(const std::string & input);

    // The nodes of the last result in llama-common's form; their text points into `input`.
    void copy_ast(const std::string & input, common_peg_ast_arena & ast,
                  common_peg_parse_result & result) const;

private:
    struct Frame;
    struct Runner;

    std::shared_ptr<const common_peg_arena>               arena_;
    const bool                                            keep_rules_;
    std::unique_ptr<Frame>                                root_;
    std::unordered_map<common_peg_parser_id, common_trie> tries_;  // of delimiters, made once
};

}  // namespace llama_crab
