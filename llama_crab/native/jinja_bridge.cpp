#include "jinja_bridge.h"

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "jinja_checks_bridge.h"

namespace llama_crab {

struct RecordedRender::Record {
    std::time_t                now;
    bool                       repeats;
    Record *                   outer;
    std::vector<jinja::string> renders;
    std::optional<std::string> seen[2];  // the last one without and with a generation prompt
    const common_json *        tools = nullptr;
};

namespace {

thread_local RecordedRender::Record * current    = nullptr;
thread_local uintptr_t                stack_base = 0;  // of the render in progress

uintptr_t stack_position() {
    const volatile char here = 0;
    return (uintptr_t) &here;
}

// Stands for the whole body of a template.
struct RecordedBody : jinja::statement {
    RecordedBody(jinja::statements body_, std::string bos_, std::string eos_)
        : body(std::move(body_)), bos(std::move(bos_)), eos(std::move(eos_)) {
        pos = 0;
    }

    // llama-common marks all strings of a render's input as such, these two as well.
    static void unmark(jinja::context & ctx, const char * name, const std::string & text) {
        const jinja::value value = ctx.get_val(name);
        if (!value->is_undefined() && value->as_string().str() == text) {
            ctx.set_val(name, jinja::mk_val<jinja::value_string>(text));
        }
    }

    jinja::value execute_impl(jinja::context & ctx) const override {
        stack_base = stack_position();
        // Asked for more than once: as the prompt, and to see what opens the answer.
        const jinja::value flag  = ctx.get_val("add_generation_prompt");
        const bool         opens = !flag->is_undefined() && flag->as_bool();
        if (current && current->repeats && current->seen[opens]) {
            return jinja::mk_val<jinja::value_string>(*current->seen[opens]);
        }
        if (current) {
            ctx.current_time = current->now;
            unmark(ctx, "bos_token", bos);
            unmark(ctx, "eos_token", eos);
            if (current->tools && !current->tools->is_null()
                && !ctx.get_val("tools")->is_undefined()) {
                common_json shown = common_json::object();
                shown["tools"]    = *current->tools;
                jinja::global_from_json(ctx, shown, true);
            }
        }
        auto results = jinja::mk_val<jinja::value_array>();
        for (const auto & statement : body) {
            results->push_back(statement->execute(ctx));
        }
        if (current) {
            current->renders.push_back(
                jinja::runtime::gather_string_parts(results)->as_string());
            current->seen[opens] = current->renders.back().str();
        }
        return results;
    }

    jinja::statements body;
    const std::string bos;
    const std::string eos;
};

// llama-common copies the table of all builtins each time it looks up a name: most of a render.
struct QuickIdentifier : jinja::identifier {
    explicit QuickIdentifier(const jinja::identifier & other) : identifier(other.val) {
        pos = other.pos;
    }

    jinja::value execute_impl(jinja::context & ctx) const override {
        jinja::value found = ctx.get_val(val);
        if (!found->is_undefined()) {
            if (ctx.is_get_stats) {
                jinja::value_t::stats_t::mark_used(found);
            }
            return found;
        }
        const auto & builtins = jinja::global_builtins();
        const auto   builtin  = builtins.find(val);
        if (builtin != builtins.end()) {
            return jinja::mk_val<jinja::value_func>(val, builtin->second);
        }
        return jinja::mk_val<jinja::value_undefined>(val);
    }
};

// What is not called is no method: a schema of an array may lack "items".
struct KeyedMember : jinja::member_expression {
    explicit KeyedMember(member_expression & other)
        : member_expression(std::move(other.object), std::move(other.property), other.computed) {
        pos = other.pos;
    }

    jinja::value execute_impl(jinja::context & ctx) const override {
        jinja::value found = member_expression::execute_impl(ctx);
        return jinja::is_val<jinja::value_func>(found) ? jinja::mk_val<jinja::value_undefined>()
                                                       : found;
    }
};

// Stands at the beginning of a macro, which may call itself.
struct StackGuard : jinja::statement {
    StackGuard() { pos = 0; }

    jinja::value execute_impl(jinja::context &) const override {
        constexpr uintptr_t room = 320 * 1024;  // the smallest stack of a thread is 512 KiB
        const uintptr_t     here = stack_position();
        if (std::max(here, stack_base) - std::min(here, stack_base) > room) {
            last_refusal() = "the template nests too deep";
            throw std::runtime_error(last_refusal());
        }
        return jinja::mk_val<jinja::value_undefined>();
    }
};

// Puts our nodes in the place of llama-common's, everywhere below `slot`.
void rewrite(jinja::statement_ptr & slot);

void rewrite(jinja::statements & slots) {
    for (jinja::statement_ptr & slot : slots) {
        rewrite(slot);
    }
}

template <typename... Slots> void rewrite_all(Slots &... slots) { (rewrite(slots), ...); }

// Without brackets the property is a name and no variable.
void rewrite_parts(jinja::member_expression & member) {
    rewrite(member.object);
    if (member.computed) {
        rewrite(member.property);
    }
}

void guard(jinja::statements & body) { body.insert(body.begin(), std::make_unique<StackGuard>()); }

void rewrite(jinja::statement_ptr & slot) {
    using namespace jinja;
    statement * node = slot.get();
    if (const auto * name = dynamic_cast<identifier *>(node)) {
        slot = std::make_unique<QuickIdentifier>(*name);
    } else if (auto * n = dynamic_cast<if_statement *>(node)) {
        rewrite_all(n->test, n->body, n->alternate);
    } else if (auto * n = dynamic_cast<for_statement *>(node)) {
        rewrite_all(n->iterable, n->body, n->default_block);
    } else if (auto * n = dynamic_cast<set_statement *>(node)) {
        rewrite_all(n->assignee, n->val, n->body);
        slot = checked(*n);
    } else if (auto * n = dynamic_cast<macro_statement *>(node)) {
        rewrite_all(n->args, n->body);
        guard(n->body);
    } else if (auto * n = dynamic_cast<call_statement *>(node)) {
        rewrite_all(n->call, n->caller_args, n->body);
        guard(n->body);
    } else if (auto * n = dynamic_cast<member_expression *>(node)) {
        rewrite_parts(*n);
        slot = std::make_unique<KeyedMember>(*n);
    } else if (auto * n = dynamic_cast<call_expression *>(node)) {
        rewrite(n->args);
        if (auto * method = dynamic_cast<member_expression *>(n->callee.get())) {
            rewrite_parts(*method);
        } else {
            rewrite(n->callee);
        }
        slot = checked(*n);
    } else if (auto * n = dynamic_cast<array_literal *>(node)) {
        rewrite(n->val);
    } else if (auto * n = dynamic_cast<tuple_literal *>(node)) {
        rewrite(n->val);
    } else if (auto * n = dynamic_cast<object_literal *>(node)) {
        for (auto & [key, value] : n->val) {
            rewrite_all(key, value);
        }
    } else if (auto * n = dynamic_cast<binary_expression *>(node)) {
        rewrite_all(n->left, n->right);
    } else if (auto * n = dynamic_cast<filter_expression *>(node)) {
        rewrite_all(n->operand, n->filter);
        check_padding(n->filter);
    } else if (auto * n = dynamic_cast<filter_statement *>(node)) {
        rewrite_all(n->filter, n->body);
        check_padding(n->filter);
    } else if (auto * n = dynamic_cast<select_expression *>(node)) {
        rewrite_all(n->lhs, n->test);
    } else if (auto * n = dynamic_cast<test_expression *>(node)) {
        rewrite(n->operand);
    } else if (auto * n = dynamic_cast<unary_expression *>(node)) {
        rewrite(n->argument);
    } else if (auto * n = dynamic_cast<slice_expression *>(node)) {
        rewrite_all(n->start_expr, n->stop_expr, n->step_expr);
    } else if (auto * n = dynamic_cast<keyword_argument_expression *>(node)) {
        rewrite(n->val);
    } else if (auto * n = dynamic_cast<spread_expression *>(node)) {
        rewrite(n->argument);
    } else if (auto * n = dynamic_cast<ternary_expression *>(node)) {
        rewrite_all(n->condition, n->true_expr, n->false_expr);
    }
}

}  // namespace

namespace {

void instrument(jinja::program & program, const std::string & bos, const std::string & eos) {
    rewrite(program.body);
    auto body = std::make_unique<RecordedBody>(std::move(program.body), bos, eos);
    program.body.clear();
    program.body.push_back(std::move(body));
}

}  // namespace

void instrument(common_chat_template & tmpl) {
    instrument(tmpl.prog, tmpl.bos_tok, tmpl.eos_tok);
}

void check_template(const std::string & source) {
    constexpr size_t max_size  = 1 << 20;
    constexpr int    max_depth = 100;
    constexpr int    max_items = 2000;  // of one tag: chains of operators nest as well
    if (source.size() > max_size) {
        throw std::invalid_argument("the template is larger than 1 MiB");
    }
    jinja::lexer     lexer;
    std::vector<int> blocks;  // open ones; an elif nests in the if before it
    int              n_blocks = 0;
    int              depth    = 0;
    int              items    = 0;
    bool             opened   = false;
    bool             is_set   = false;  // a set without "=" opens a block
    const auto       open     = [&] {
        blocks.push_back(1);
        ++n_blocks;
    };
    const jinja::lexer_result read = lexer.tokenize(source);
    for (const jinja::token & token : read.tokens) {
        const std::string & word = token.value;
        switch (token.t) {
            case jinja::token::open_statement:
            case jinja::token::open_expression:
                depth = items = 0;
                is_set        = false;
                opened        = token.t == jinja::token::open_statement;
                continue;
            case jinja::token::close_statement:
                if (is_set) {
                    open();
                }
                break;
            case jinja::token::equals:
                is_set = is_set && depth > 0;
                break;
            case jinja::token::open_paren:
            case jinja::token::open_square_bracket:
            case jinja::token::open_curly_bracket:
                ++depth;
                break;
            case jinja::token::close_paren:
            case jinja::token::close_square_bracket:
            case jinja::token::close_curly_bracket:
                --depth;
                break;
            default:
                break;
        }
        if (opened) {
            opened = false;
            if (word == "if" || word == "for" || word == "macro" || word == "call"
                || word == "filter") {
                open();
            } else if (word == "elif" && !blocks.empty()) {
                ++blocks.back();
                ++n_blocks;
            } else if (word.compare(0, 3, "end") == 0 && !blocks.empty()) {
                n_blocks -= blocks.back();
                blocks.pop_back();
            }
            is_set = word == "set";
        }
        if (depth > max_depth || n_blocks > max_depth || ++items > max_items) {
            throw std::invalid_argument("the template nests too deep");
        }
    }
    // llama-common tries a template out while it makes one, and does not look at its stack.
    jinja::program program = jinja::parse_from_tokens(read);
    instrument(program, "", "");
    last_refusal().clear();
    jinja::caps_get(program);
    if (!last_refusal().empty()) {
        throw std::invalid_argument(last_refusal());
    }
}

RecordedRender::RecordedRender(int64_t now, bool repeats)
    : record_(new Record{(std::time_t) now, repeats, current, {}, {}, nullptr}) {
    current = record_;
}

RecordedRender::~RecordedRender() {
    current = record_->outer;
    delete record_;
}

void RecordedRender::show_tools(const common_json * tools) { record_->tools = tools; }

void RecordedRender::clear() {
    record_->renders.clear();
    record_->seen[0].reset();
    record_->seen[1].reset();
}

std::vector<std::pair<size_t, size_t>> RecordedRender::input_ranges(
    const std::string & prompt) const {
    std::vector<std::pair<size_t, size_t>> ranges;
    const jinja::string *                  best   = nullptr;
    size_t                                 length = 0;
    for (const jinja::string & render : record_->renders) {
        const std::string text = render.str();
        if (text.size() > length && prompt.compare(0, text.size(), text) == 0) {
            best   = &render;
            length = text.size();
        }
    }
    size_t pos = 0;
    for (size_t i = 0; best && i < best->parts.size(); ++i) {
        const size_t end = pos + best->parts[i].val.size();
        if (best->parts[i].is_input && end > pos) {
            ranges.emplace_back(pos, end);
        }
        pos = end;
    }
    return ranges;
}

}  // namespace llama_crab
