#include "peg_bridge.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <stdexcept>
#include <variant>

#include "../common/unicode.h"  // src has one of the same name

namespace llama_crab {

namespace {

// A frame takes about 300 bytes of stack; the smallest stack in use is 512 KiB.
constexpr int max_depth = 1000;

constexpr auto failed    = COMMON_PEG_PARSE_RESULT_FAIL;
constexpr auto succeeded = COMMON_PEG_PARSE_RESULT_SUCCESS;
constexpr auto need_more = COMMON_PEG_PARSE_RESULT_NEED_MORE_INPUT;

template <typename T> void append(std::vector<T> & to, const std::vector<T> & from) {
    to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

// One parser at one place. What can no longer change is folded into `done`; `live` are the frames
// from the first child on that the end of the input can still change.
struct IncrementalPeg::Frame {
    Frame(common_peg_parser_id id_, size_t start) : id(id_) {
        done.start = done.end = start;
    }

    common_peg_parser_id                id;
    PegResult                           result;
    PegResult                           done;
    size_t                              n_done = 0;  // children, matches or characters in `done`
    std::vector<std::unique_ptr<Frame>> live;
};

struct IncrementalPeg::Runner {
    IncrementalPeg &    peg;
    const std::string & input;
    int                 depth = 0;

    const PegResult & run(Frame & frame) {
        if (frame.result.is_final) {
            return frame.result;
        }
        if (++depth > max_depth) {
            throw std::runtime_error("the output nests too deep");
        }
        std::visit([&](const auto & parser) { step(frame, parser); }, peg.arena_->get(frame.id));
        --depth;
        return frame.result;
    }

    // Goes through the children of a frame: the ones of last time while they start at the same
    // place, then new ones.
    struct Children {
        Runner &                            runner;
        Frame &                             frame;
        std::vector<std::unique_ptr<Frame>> old = std::move(frame.live);
        size_t                              n   = 0;

        const PegResult & next(common_peg_parser_id id, size_t start) {
            std::unique_ptr<Frame> child;
            if (n < old.size() && old[n]->id == id && old[n]->done.start == start) {
                child = std::move(old[n]);
            } else {
                child = std::make_unique<Frame>(id, start);
            }
            ++n;
            frame.live.push_back(std::move(child));
            return runner.run(*frame.live.back());
        }

        // True when everything up to the child just run is final: it need not be kept.
        bool settle() {
            if (frame.live.size() == 1 && frame.live[0]->result.is_final) {
                frame.live.clear();
                return true;
            }
            return false;
        }
    };

    static void end_with(Frame & frame, common_peg_parse_result_type type, size_t end,
                         bool is_final) {
        frame.result.type     = type;
        frame.result.start    = frame.done.start;
        frame.result.end      = end;
        frame.result.is_final = is_final;
    }

    bool at_end(size_t pos) const { return pos >= input.size(); }

    void step(Frame & frame, const common_peg_epsilon_parser &) {
        end_with(frame, succeeded, frame.done.start, true);
    }

    void step(Frame & frame, const common_peg_start_parser &) {
        end_with(frame, frame.done.start == 0 ? succeeded : failed, frame.done.start, true);
    }

    void step(Frame & frame, const common_peg_end_parser &) {
        const bool ended = at_end(frame.done.start);
        end_with(frame, ended ? succeeded : failed, frame.done.start, !ended);
    }

    void step(Frame & frame, const common_peg_literal_parser & parser) {
        const size_t start = frame.done.start;
        const size_t n     = std::min(parser.literal.size(), input.size() - start);
        if (std::memcmp(input.data() + start, parser.literal.data(), n) != 0) {
            end_with(frame, failed, start, true);
        } else if (n < parser.literal.size()) {
            end_with(frame, need_more, start + n, false);
        } else {
            end_with(frame, succeeded, start + n, true);
        }
    }

    void step(Frame & frame, const common_peg_any_parser &) {
        const size_t start = frame.done.start;
        const auto   point = common_parse_utf8_codepoint(input, start);
        if (point.status == utf8_parse_result::INCOMPLETE) {
            end_with(frame, need_more, start, false);
        } else if (point.status == utf8_parse_result::INVALID) {
            end_with(frame, failed, start, true);
        } else {
            end_with(frame, succeeded, start + point.bytes_consumed, true);
        }
    }

    void step(Frame & frame, const common_peg_space_parser &) {
        size_t & pos = frame.done.end;
        while (!at_end(pos) && std::isspace((unsigned char) input[pos])) {
            ++pos;
        }
        end_with(frame, succeeded, pos, !at_end(pos));
    }

    void step(Frame & frame, const common_peg_chars_parser & parser) {
        size_t &     pos    = frame.done.end;
        const size_t least  = parser.min_count > 0 ? (size_t) parser.min_count : 0;
        bool         waits  = false;
        while (parser.max_count == -1 || frame.n_done < (size_t) parser.max_count) {
            const auto point = common_parse_utf8_codepoint(input, pos);
            if (point.status != utf8_parse_result::SUCCESS) {
                waits = point.status == utf8_parse_result::INCOMPLETE;
                if (frame.n_done < least) {
                    // llama-common gives the place of the character here, and not its start.
                    end_with(frame, waits ? need_more : failed, waits ? pos : frame.done.start,
                             !waits);
                    return;
                }
                break;
            }
            bool matches = false;
            for (const auto & range : parser.ranges) {
                matches = matches || range.contains(point.codepoint);
            }
            if (matches == parser.negated) {
                break;
            }
            pos += point.bytes_consumed;
            ++frame.n_done;
        }
        end_with(frame, frame.n_done < least ? failed : succeeded, pos, !waits);
    }

    void step(Frame & frame, const common_peg_string_parser & parser) {
        size_t & pos = frame.done.end;
        while (!at_end(pos)) {
            const char c = input[pos];
            if (c == parser.delimiter) {
                end_with(frame, succeeded, pos, true);
                return;
            }
            size_t n = 1;
            if (c == '\\') {
                const size_t room = input.size() - pos;
                n = room > 1 && input[pos + 1] == 'u' ? 6 : 2;
                bool valid = true;
                for (size_t i = 1; i < std::min(n, room); ++i) {
                    const char at = input[pos + i];
                    valid = valid && (i > 1 ? std::isxdigit((unsigned char) at) != 0
                                            : at == parser.delimiter
                                                  || (at != 0 && std::strchr("\\/bfnrtu", at)));
                }
                if (!valid || room < n) {
                    end_with(frame, valid ? need_more : failed, valid ? pos : frame.done.start,
                             !valid);
                    return;
                }
            } else {
                const auto point = common_parse_utf8_codepoint(input, pos);
                if (point.status != utf8_parse_result::SUCCESS) {
                    const bool waits = point.status == utf8_parse_result::INCOMPLETE;
                    end_with(frame, waits ? need_more : failed, waits ? pos : frame.done.start,
                             !waits);
                    return;
                }
                n = point.bytes_consumed;
            }
            pos += n;
        }
        end_with(frame, need_more, pos, false);
    }

    void step(Frame & frame, const common_peg_until_parser & parser) {
        auto found = peg.tries_.find(frame.id);
        if (found == peg.tries_.end()) {
            found = peg.tries_.emplace(frame.id, common_trie(parser.delimiters)).first;
        }
        const common_trie & trie = found->second;
        size_t &            pos  = frame.done.end;
        while (!at_end(pos)) {
            const auto point = common_parse_utf8_codepoint(input, pos);
            if (point.status == utf8_parse_result::INCOMPLETE) {
                break;
            }
            if (point.status == utf8_parse_result::INVALID) {
                frame.done.invalid_utf8.push_back({pos, point.bytes_consumed});
            } else if (!parser.delimiters.empty()) {
                const auto match = trie.check_at(input, pos);
                if (match != common_trie::NO_MATCH) {
                    frame.result.invalid_utf8 = frame.done.invalid_utf8;
                    end_with(frame, succeeded, pos, match == common_trie::COMPLETE_MATCH);
                    return;
                }
            }
            pos += point.bytes_consumed;
        }
        frame.result.invalid_utf8 = frame.done.invalid_utf8;
        end_with(frame, need_more, pos, false);
    }

    // Starts a result with what is final already, to be followed by what is not.
    static void start_over(Frame & frame) { frame.result = frame.done; }

    static void add(PegResult & to, const PegResult & child) {
        append(to.nodes, child.nodes);
        append(to.invalid_utf8, child.invalid_utf8);
        to.end = child.end;
    }

    void step(Frame & frame, const common_peg_sequence_parser & parser) {
        Children children{*this, frame};
        start_over(frame);
        for (size_t i = frame.n_done; i < parser.children.size(); ++i) {
            const PegResult & child = children.next(parser.children[i], frame.result.end);
            if (child.fail()) {
                frame.result.nodes.clear();
                frame.result.invalid_utf8.clear();
                end_with(frame, failed, child.end, frame.live.size() == 1 && child.is_final);
                return;
            }
            add(frame.result, child);
            if (child.need_more_input()) {
                end_with(frame, need_more, child.end, false);
                return;
            }
            if (frame.live.size() == 1 && child.is_final) {
                add(frame.done, child);
                ++frame.n_done;
                children.settle();
            }
        }
        end_with(frame, succeeded, frame.result.end, frame.live.empty());
    }

    void step(Frame & frame, const common_peg_choice_parser & parser) {
        Children     children{*this, frame};
        const size_t start = frame.done.start;
        for (size_t i = frame.n_done; i < parser.children.size(); ++i) {
            const PegResult & child = children.next(parser.children[i], start);
            if (!child.fail()) {
                const bool is_final   = frame.live.size() == 1 && child.is_final;
                frame.result          = child;
                frame.result.is_final = is_final;
                return;
            }
            if (children.settle()) {
                ++frame.n_done;
            }
        }
        frame.result = PegResult();
        end_with(frame, failed, start, frame.live.empty());
    }

    void step(Frame & frame, const common_peg_repetition_parser & parser) {
        Children children{*this, frame};
        start_over(frame);
        size_t n     = frame.n_done;
        bool   waits = false;
        while (parser.max_count == -1 || n < (size_t) parser.max_count) {
            if (at_end(frame.result.end)) {
                waits = true;
                break;
            }
            const size_t      pos   = frame.result.end;
            const PegResult & child = children.next(parser.child, pos);
            if (child.need_more_input()) {
                add(frame.result, child);
                end_with(frame, need_more, child.end, false);
                return;
            }
            if (child.fail() || child.end == pos) {
                waits = frame.live.size() > 1 || !child.is_final;
                break;
            }
            add(frame.result, child);
            ++n;
            if (frame.live.size() == 1 && child.is_final) {
                add(frame.done, child);
                frame.n_done = n;
                children.settle();
            }
        }
        waits = waits || (!frame.live.empty() && !frame.live.back()->result.is_final);
        const size_t end = frame.result.end;
        if (parser.min_count > 0 && n < (size_t) parser.min_count) {
            if (at_end(end)) {
                end_with(frame, need_more, end, false);
                return;
            }
            frame.result.nodes.clear();
            frame.result.invalid_utf8.clear();
            end_with(frame, failed, end, !waits);
            return;
        }
        end_with(frame, succeeded, end, !waits && frame.live.size() <= 1);
    }

    const PegResult & only_child(Frame & frame, common_peg_parser_id id) {
        Children children{*this, frame};
        return children.next(id, frame.done.start);
    }

    void step(Frame & frame, const common_peg_and_parser & parser) {
        const PegResult & child = only_child(frame, parser.child);
        end_with(frame, child.type, frame.done.start, child.is_final);
    }

    void step(Frame & frame, const common_peg_not_parser & parser) {
        const PegResult & child = only_child(frame, parser.child);
        const auto type = child.success() ? failed : child.fail() ? succeeded : need_more;
        end_with(frame, type, frame.done.start, child.is_final);
    }

    template <typename Parser> void pass(Frame & frame, const Parser & parser) {
        frame.result = only_child(frame, parser.child);
    }

    void step(Frame & frame, const common_peg_schema_parser & parser) { pass(frame, parser); }
    void step(Frame & frame, const common_peg_gbnf_parser & parser) { pass(frame, parser); }
    void step(Frame & frame, const common_peg_ac_parser & parser) { pass(frame, parser); }

    void step(Frame & frame, const common_peg_atomic_parser & parser) {
        pass(frame, parser);
        if (frame.result.need_more_input()) {
            frame.result.nodes.clear();
        }
    }

    void step(Frame & frame, const common_peg_ref_parser & parser) {
        frame.result = only_child(frame, peg.arena_->get_rule(parser.name));
    }

    void wrap(Frame & frame, const std::string * rule, const std::string * tag) {
        PegResult & result = frame.result;
        if (result.fail()) {
            return;
        }
        auto node = std::make_shared<PegNode>(PegNode{rule, tag, result.start, result.end,
                                                      result.need_more_input(), {},
                                                      result.invalid_utf8});
        node->children.swap(result.nodes);
        result.nodes.push_back(std::move(node));
    }

    void step(Frame & frame, const common_peg_rule_parser & parser) {
        pass(frame, parser);
        if (peg.keep_rules_) {
            wrap(frame, &parser.name, nullptr);
        }
    }

    void step(Frame & frame, const common_peg_tag_parser & parser) {
        pass(frame, parser);
        wrap(frame, nullptr, &parser.tag);
    }
};

IncrementalPeg::IncrementalPeg(std::shared_ptr<const common_peg_arena> arena, bool keep_rules)
    : arena_(std::move(arena)), keep_rules_(keep_rules),
      root_(std::make_unique<Frame>(arena_->root(), 0)) {}

IncrementalPeg::~IncrementalPeg() = default;

const PegResult & IncrementalPeg::parse(const std::string & input) {
    Runner runner{*this, input};
    return runner.run(*root_);
}

void IncrementalPeg::copy_ast(const std::string & input, common_peg_ast_arena & ast,
                              common_peg_parse_result & result) const {
    struct Copier {
        const std::string &    input;
        common_peg_ast_arena & ast;

        common_peg_ast_id copy(const PegNode & node) {
            std::vector<common_peg_ast_id> children;
            for (const PegNodePtr & child : node.children) {
                children.push_back(copy(*child));
            }
            std::string_view text;
            if (node.start < input.size()) {
                text = std::string_view(input).substr(node.start, node.end - node.start);
            }
            static const std::string none;
            return ast.add_node(node.rule ? *node.rule : none, node.tag ? *node.tag : none,
                                node.start, node.end, text, std::move(children), node.is_partial,
                                node.invalid_utf8);
        }
    };
    Copier            copier{input, ast};
    const PegResult & from = root_->result;
    result = common_peg_parse_result(from.type, from.start, from.end);
    for (const PegNodePtr & node : from.nodes) {
        result.nodes.push_back(copier.copy(*node));
    }
    result.invalid_utf8 = from.invalid_utf8;
}

}  // namespace llama_crab
