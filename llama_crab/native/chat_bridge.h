// What we use of llama-common's chat support: Jinja templates, and the grammars and parsers it
// derives from them. Its own entry points analyse a template at every call; here that happens once.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "handles.h"

namespace llama_crab {

struct ChatRequest {
    std::string messages;                // JSON array in OpenAI's form
    std::string tools;                   // JSON array, or empty
    std::string tool_choice;             // auto, none, required
    std::string json_schema;             // of the answer; or empty
    std::string grammar;                 // GBNF of the answer; or empty
    std::string continue_final_message;  // empty, auto, content, reasoning_content
    std::string reasoning_format;        // none, auto, deepseek, deepseek-legacy
    std::string template_kwargs;         // JSON object, or empty
    bool        parallel_tool_calls   = false;
    bool        add_generation_prompt = true;
    bool        enable_thinking       = true;
    int64_t     now                   = 0;  // seconds since 1970
};

struct ChatTrigger {
    std::string kind;  // token, word, pattern, pattern_full
    std::string value;
    int32_t     token;
};

// A compiled parser, shared by a prompt and the parsers of its answers.
struct ChatFormat;

struct ChatPrompt {
    std::string                            text;
    std::vector<std::pair<size_t, size_t>> input;  // ranges of `text` that a user wrote, in order
    std::string                            format;
    std::string                            grammar;
    bool                                   grammar_lazy = false;
    std::vector<ChatTrigger>               grammar_triggers;
    std::vector<std::string>               preserved_tokens;
    std::vector<std::string>               additional_stops;
    std::string                            generation_prompt;
    bool                                   supports_thinking = false;
    std::string                            thinking_start_tag;
    std::vector<std::string>               thinking_end_tags;
    std::shared_ptr<const ChatFormat>      parser;
};

// Immutable after construction, so any thread may render.
class ChatTemplates {
public:
    // Takes the templates of the model, or `source` if it is not empty. Throws on a syntax error.
    ChatTemplates(ModelPtr model, const std::string & source);
    ~ChatTemplates();
    ChatTemplates(const ChatTemplates &) = delete;

    void render(const ChatRequest & request, ChatPrompt & prompt, Status & status) const noexcept;

    // Special tokens count only where the template wrote them, and BOS comes once.
    void tokenize(const ChatPrompt & prompt, std::vector<llama_token> & out,
                  Status & status) const noexcept;

    std::string                 source(bool tool_use) const;
    std::map<std::string, bool> capabilities() const;  // probes on first use
    bool                        was_explicit() const;  // else the default, ChatML, stands in

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

ChatTemplates * new_chat_templates(ModelPtr model, const std::string & source,
                                   Status & status) noexcept;

struct ChatToolCall {
    std::string id;
    std::string name;
    std::string arguments;
};

struct ChatMessage {
    std::string               content;
    std::string               reasoning_content;
    std::vector<ChatToolCall> tool_calls;
};

// What a piece of output added to a message. `index` is that of a tool call, or -1.
struct ChatDelta {
    int32_t     index = -1;
    std::string content;
    std::string reasoning_content;
    std::string id;
    std::string name;
    std::string arguments;
};

// The message that llama-common's own parser makes of a whole output.
void parse_chat_output(const ChatPrompt & prompt, const std::string & output, bool is_partial,
                       ChatMessage & message, Status & status) noexcept;

// Parses an output while it grows, without starting again at each piece.
class ChatParser {
public:
    ChatParser(const ChatPrompt & prompt);
    ~ChatParser();
    ChatParser(const ChatParser &) = delete;

    void push(const char * data, size_t size, std::vector<ChatDelta> & deltas,
              Status & status) noexcept;
    // Fails when the output is not in the format.
    void finish(std::vector<ChatDelta> & deltas, Status & status) noexcept;
    const ChatMessage & message() const;  // everything told so far

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

ChatParser * new_chat_parser(const ChatPrompt & prompt, Status & status) noexcept;

}  // namespace llama_crab
