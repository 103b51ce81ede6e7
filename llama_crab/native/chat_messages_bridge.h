// From a request to what llama-common's formats expect of one.
#pragma once

#include "chat-auto-parser.h"
#include "chat_bridge.h"

namespace llama_crab {

// Throws std::invalid_argument on JSON that is not of OpenAI's form.
autoparser::generation_params read_chat_request(const ChatRequest & request,
                                                const common_chat_template & tmpl,
                                                const common_json & tools);

// The tools of a request; null when it has none.
common_json read_chat_tools(const ChatRequest & request);

// Makes their schemas ones that llama-common can convert; false when nothing had to change. Throws
// std::invalid_argument, naming the tool.
bool prepare_chat_tools(common_json & tools);

// The same conversation, its last message not continued but ended by a mark.
ChatRequest whole_conversation(const ChatRequest & request, const std::string & mark);

// JSON of a bounded depth, since llama-common walks it by recursion; null for an empty text.
common_json parse_json(const char * what, const std::string & text);

}  // namespace llama_crab
