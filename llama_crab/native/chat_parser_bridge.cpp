#include <stdexcept>

#include "chat-peg-parser.h"
#include "chat_format_bridge.h"
#include "peg_bridge.h"

namespace llama_crab {

namespace {

constexpr const char * not_in_format = "the output is not in the format of the chat template";

std::unique_ptr<common_chat_peg_mapper> new_mapper(common_chat_format format,
                                                   common_chat_msg & message) {
    switch (format) {
        case COMMON_CHAT_FORMAT_PEG_GEMMA4:
            return std::make_unique<common_chat_peg_gemma4_mapper>(message);
        case COMMON_CHAT_FORMAT_PEG_MINIMAX_M3:
            return std::make_unique<common_chat_peg_minimax_m3_mapper>(message);
        default:
            return std::make_unique<common_chat_peg_mapper>(message);
    }
}

// These two read the tree itself, and not only the tagged nodes of a walk.
bool reads_rules(common_chat_format format) {
    return format == COMMON_CHAT_FORMAT_PEG_GEMMA4 || format == COMMON_CHAT_FORMAT_PEG_MINIMAX_M3;
}

void copy_message(common_chat_msg & from, ChatMessage & to) {
    to.content           = std::move(from.content);
    to.reasoning_content = std::move(from.reasoning_content);
    to.tool_calls.clear();
    for (common_chat_tool_call & call : from.tool_calls) {
        to.tool_calls.push_back(
            {std::move(call.id), std::move(call.name), std::move(call.arguments)});
    }
}

bool begins_with(const std::string & text, const std::string & prefix) {
    return text.compare(0, prefix.size(), prefix) == 0;
}

bool extends(const ChatMessage & now, const ChatMessage & before) {
    if (!begins_with(now.content, before.content)
        || !begins_with(now.reasoning_content, before.reasoning_content)
        || now.tool_calls.size() < before.tool_calls.size()) {
        return false;
    }
    for (size_t i = 0; i < before.tool_calls.size(); ++i) {
        const ChatToolCall & a = now.tool_calls[i];
        const ChatToolCall & b = before.tool_calls[i];
        if (a.name != b.name || !begins_with(a.id, b.id)
            || !begins_with(a.arguments, b.arguments)) {
            return false;
        }
    }
    return true;
}

void add_deltas(const ChatMessage & before, const ChatMessage & now,
                std::vector<ChatDelta> & deltas) {
    if (now.reasoning_content.size() > before.reasoning_content.size()) {
        deltas.emplace_back();
        deltas.back().reasoning_content =
            now.reasoning_content.substr(before.reasoning_content.size());
    }
    if (now.content.size() > before.content.size()) {
        deltas.emplace_back();
        deltas.back().content = now.content.substr(before.content.size());
    }
    static const ChatToolCall none;
    for (size_t i = 0; i < now.tool_calls.size(); ++i) {
        const ChatToolCall & a = now.tool_calls[i];
        const ChatToolCall & b = i < before.tool_calls.size() ? before.tool_calls[i] : none;
        if (&b == &none || a.id.size() > b.id.size() || a.arguments.size() > b.arguments.size()) {
            ChatDelta delta;
            delta.index     = (int32_t) i;
            delta.id        = a.id.substr(b.id.size());
            delta.name      = &b == &none ? a.name : std::string();
            delta.arguments = a.arguments.substr(b.arguments.size());
            deltas.push_back(std::move(delta));
        }
    }
}

}  // namespace

struct ChatParser::Impl {
    Impl(const ChatPrompt & prompt)
        : format(prompt.parser), peg(format->arena, reads_rules(format->format)),
          input(prompt.generation_prompt) {
        if (format->is_continuation) {
            update();
            bool holds_back;
            told = read(false, holds_back);
            plan_next_look();
        }
    }

    // False where the input is not in the format, so far or for good (`broken`).
    bool update() {
        if (broken) {
            return false;
        }
        try {
            const PegResult & result = peg.parse(input);
            broken                   = result.fail() && result.is_final;
            return !result.fail();
        } catch (...) {
            broken = true;
            throw;
        }
    }

    // Names at the end of the input may still grow, "get" to "get_weather".
    bool name_may_grow(const common_peg_ast_arena & ast) const {
        for (size_t id = ast.size(); id-- > 0;) {
            const common_peg_ast_node & node = ast.get(id);
            if (node.tag == common_chat_peg_builder::TOOL_NAME) {
                return node.end == input.size();
            }
        }
        return false;
    }

    ChatMessage read(bool is_whole, bool & holds_back) {
        common_peg_ast_arena    ast;
        common_peg_parse_result result;
        common_chat_msg         parsed;
        ChatMessage             message;
        peg.copy_ast(input, ast, result);
        if (!result.fail()) {
            new_mapper(format->format, parsed)->from_ast(ast, result);
        }
        copy_message(parsed, message);
        if (!is_whole && message.tool_calls.size() > told.tool_calls.size()
            && name_may_grow(ast)) {
            message.tool_calls.pop_back();
            holds_back = true;
        }
        return message;
    }

    // A message is built as a whole each time, so long ones are read at growing intervals: 16 bytes
    // where 8 KiB of arguments are told, and 128 where they are built from a tree of values. Text
    // costs less, and is read to people: 16 bytes at 32 KiB, where this begins.
    void plan_next_look() {
        constexpr size_t long_text = 32 * 1024;
        const size_t     text      = told.content.size() + told.reasoning_content.size();
        const size_t     share     = reads_rules(format->format) ? 64 : 512;
        size_t           arguments = 0;
        for (const ChatToolCall & call : told.tool_calls) {
            arguments += call.arguments.size() + (&call == &told.tool_calls[0] ? 0 : 64);
        }
        next_look = input.size() + arguments / share + (text < long_text ? 0 : text / 2048);
    }

    bool is_due() const { return input.size() > next_look; }

    // What a later piece may take back is not told yet.
    bool tell(std::vector<ChatDelta> & deltas, bool is_whole) {
        bool        holds_back = false;
        ChatMessage now        = read(is_whole, holds_back);
        const bool  fits       = extends(now, told);
        if (fits) {
            add_deltas(told, now, deltas);
            told = std::move(now);
        }
        is_told = fits && !holds_back;
        plan_next_look();
        return fits;
    }

    std::shared_ptr<const ChatFormat> format;
    IncrementalPeg                    peg;
    std::string                       input;
    ChatMessage                       told;
    size_t                            next_look = 0;  // the size of `input` behind which it is due
    bool                              is_told   = false;  // all that `input` says
    bool                              broken    = false;
};

ChatParser::ChatParser(const ChatPrompt & prompt) : impl_(new Impl(prompt)) {}

ChatParser::~ChatParser() = default;

void ChatParser::push(const char * data, size_t size, std::vector<ChatDelta> & deltas,
                      Status & status) noexcept {
    guarded(status, [&] {
        impl_->input.append(data, size);
        impl_->is_told = impl_->is_told && size == 0;
        if (impl_->is_due()) {
            impl_->update();
            if (!impl_->broken) {
                impl_->tell(deltas, false);
            }
        }
    });
}

void ChatParser::finish(std::vector<ChatDelta> & deltas, Status & status) noexcept {
    guarded(status, [&] {
        if (!impl_->update() || !(impl_->is_told || impl_->tell(deltas, true))) {
            status.set(Status::failed, not_in_format);
        }
    });
}

const ChatMessage & ChatParser::message() const { return impl_->told; }

ChatParser * new_chat_parser(const ChatPrompt & prompt, Status & status) noexcept {
    ChatParser * parser = nullptr;
    guarded(status, [&] { parser = new ChatParser(prompt); });
    return parser;
}

void parse_chat_output(const ChatPrompt & prompt, const std::string & output, bool is_partial,
                       ChatMessage & message, Status & status) noexcept {
    guarded(status, [&] {
        // Refuses what nests too deep for the stack; llama-common's parser would follow it down.
        IncrementalPeg(prompt.parser->arena, false).parse(prompt.generation_prompt + output);
        common_chat_parser_params params;
        params.format            = prompt.parser->format;
        params.generation_prompt = prompt.generation_prompt;
        params.parser            = *prompt.parser->arena;
        common_chat_msg parsed;
        try {
            parsed = common_chat_parse(output, is_partial, params);
        } catch (const std::exception &) {
            status.set(Status::failed, not_in_format);
        }
        copy_message(parsed, message);
    });
}

}  // namespace llama_crab
