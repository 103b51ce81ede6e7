#include "chat_messages_bridge.h"

#include <ctime>
#include <stdexcept>

#include "chat_schema_bridge.h"

namespace llama_crab {

namespace {

std::string date(int64_t now, const char * format) {
    const std::time_t time  = (std::time_t) now;
    std::tm           local = {};
#ifdef _WIN32
    localtime_s(&local, &time);
#else
    localtime_r(&time, &local);
#endif
    char         text[64];
    const size_t n = std::strftime(text, sizeof(text), format, &local);
    return std::string(text, n);
}

std::string joined_text(const common_json & parts) {
    std::string text;
    bool        after_media = false;
    for (const common_json & part : parts) {
        const bool is_media = part.value("type", "") == "media_marker";
        if (!is_media && !after_media && !text.empty()) {
            text += '\n';
        }
        after_media = is_media;
        text += part.value("text", "");
    }
    return text;
}

// A template reads contents as strings, as lists of parts, or both.
void fit_contents(common_json & messages, const jinja::caps & caps) {
    const bool only_string = caps.supports_string_content && !caps.supports_typed_content;
    const bool only_parts  = !caps.supports_string_content && caps.supports_typed_content;
    for (common_json & message : messages) {
        if (!message.contains("content")) {
            continue;
        }
        common_json & content = message.at("content");
        if (only_string && content.is_array()) {
            content = joined_text(content);
        } else if (only_parts && content.is_string()) {
            common_json part = common_json::object();
            part["type"]     = "text";
            part["text"]     = content.get<std::string>();
            common_json list = common_json::array();
            list.push_back(part);
            content = list;
        }
    }
}

std::string text_of(const common_json & content) {
    return content.is_array() ? joined_text(content)
                              : content.is_string() ? content.get<std::string>() : "";
}

void merge_system_message(common_json & messages) {
    if (messages.empty() || messages.front().at("role") != "system") {
        return;
    }
    if (messages.size() > 1) {
        messages[1]["content"] = text_of(messages.front().at("content")) + "\n"
                                 + text_of(messages[1].at("content"));
    }
    messages.erase(0);
}

void parse_arguments(common_json & messages) {
    for (common_json & message : messages) {
        if (!message.contains("tool_calls")) {
            continue;
        }
        for (common_json & call : message.at("tool_calls")) {
            common_json & arguments = call.at("function").at("arguments");
            if (arguments.is_string()) {
                arguments = parse_json("the arguments of a tool call", arguments);
            }
        }
    }
}

void trim(std::vector<common_chat_msg> & messages) {
    for (common_chat_msg & message : messages) {
        message.content           = string_strip(message.content);
        message.reasoning_content = string_strip(message.reasoning_content);
        for (auto & part : message.content_parts) {
            if (part.type == "text") {
                part.text = string_strip(part.text);
            }
        }
    }
}

common_chat_continuation continuation(const ChatRequest & request,
                                      const std::vector<common_chat_msg> & messages) {
    const std::string & how = request.continue_final_message;
    if (how.empty()) {
        return COMMON_CHAT_CONTINUATION_NONE;
    }
    if (messages.empty() || messages.back().role != "assistant"
        || !messages.back().tool_calls.empty()) {
        throw std::invalid_argument(
            "only a final assistant message without tool calls can be continued");
    }
    const common_chat_msg & last = messages.back();
    if (how == "reasoning_content") {
        return COMMON_CHAT_CONTINUATION_REASONING;
    }
    if (how == "auto" && !last.reasoning_content.empty() && last.content.empty()
        && last.content_parts.empty()) {
        return COMMON_CHAT_CONTINUATION_REASONING;
    }
    return COMMON_CHAT_CONTINUATION_CONTENT;
}

}  // namespace

common_json parse_json(const char * what, const std::string & text) {
    constexpr int max_depth = 100;
    int           depth     = 0;
    bool          in_string = false;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (in_string) {
            i += c == '\\' ? 1 : 0;
            in_string = c != '"';
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            if (++depth > max_depth) {
                throw std::invalid_argument(std::string(what) + ": more than "
                                            + std::to_string(max_depth) + " levels of nesting");
            }
        } else if (c == ']' || c == '}') {
            --depth;
        }
    }
    try {
        return text.empty() ? common_json() : common_json::parse(text);
    } catch (const std::exception & error) {
        throw std::invalid_argument(std::string(what) + ": not valid JSON: " + error.what());
    }
}

ChatRequest whole_conversation(const ChatRequest & request, const std::string & mark) {
    ChatRequest  whole    = request;
    common_json  messages = parse_json("messages", request.messages);
    common_json & content = messages.at(messages.size() - 1).at("content");
    if (content.is_array()) {
        common_json part = common_json::object();
        part["type"]     = "text";
        part["text"]     = mark;
        content.push_back(part);
    } else {
        content = text_of(content) + mark;
    }
    whole.messages               = messages.dump();
    whole.continue_final_message = "";
    whole.add_generation_prompt  = false;
    return whole;
}

common_json read_chat_tools(const ChatRequest & request) {
    const common_json given = parse_json("tools", request.tools);
    if (given.is_null()) {
        return given;
    }
    if (!given.is_array()) {
        throw std::invalid_argument("tools: expected a list");
    }
    for (const common_json & tool : given) {
        if (!tool.is_object() || !tool.contains("function") || !tool.at("function").is_object()
            || !tool.at("function").contains("name")
            || !tool.at("function").at("name").is_string()) {
            throw std::invalid_argument(
                "tools: expected {\"type\": \"function\", \"function\": {\"name\": ...}}, got "
                + tool.dump_safe());
        }
        const common_json & function = tool.at("function");
        if (function.contains("parameters") && !function.at("parameters").is_null()
            && !function.at("parameters").is_object()) {
            throw std::invalid_argument("tools: the parameters of "
                                        + function.at("name").get<std::string>()
                                        + " are no JSON schema");
        }
    }
    return common_chat_tools_to_json_oaicompat(common_chat_tools_parse_oaicompat(given));
}

bool prepare_chat_tools(common_json & tools) {
    bool changed = false;
    if (tools.is_array()) {
        for (common_json & tool : tools) {
            common_json &     function = tool.at("function");
            const std::string name     = function.at("name");
            changed = prepare_schema("tools: the parameters of " + name, function.at("parameters"))
                      || changed;
        }
    }
    return changed;
}

autoparser::generation_params read_chat_request(const ChatRequest & request,
                                                const common_chat_template & tmpl,
                                                const common_json & tools) {
    const jinja::caps & caps   = tmpl.caps;
    const std::string & source = tmpl.src;
    const common_json   given  = parse_json("messages", request.messages);
    std::vector<common_chat_msg> messages = common_chat_msgs_parse_oaicompat(given);
    // StepFun's template: blanks around a message make the model reason in circles.
    if (source.find("You have access to the following functions in JSONSchema format")
        != std::string::npos) {
        trim(messages);
    }

    // Mistral's format takes reasoning as a block of the content, which templates without such
    // blocks leave out, the answer with it.
    if (source.find("[SYSTEM_PROMPT]") != std::string::npos
        && source.find("[THINK]") == std::string::npos) {
        for (common_chat_msg & message : messages) {
            message.reasoning_content.clear();
        }
    }

    autoparser::generation_params params;
    params.tools                  = tools;
    params.tool_choice            = common_chat_tool_choice_parse_oaicompat(request.tool_choice);
    params.reasoning_format       = common_reasoning_format_from_name(request.reasoning_format);
    params.enable_thinking        = request.enable_thinking;
    params.parallel_tool_calls    = request.parallel_tool_calls;
    params.grammar                = request.grammar;
    params.now                    = std::chrono::system_clock::from_time_t((std::time_t) request.now);
    params.add_generation_prompt  = request.add_generation_prompt;
    params.continue_final_message = continuation(request, messages);
    if (params.continue_final_message != COMMON_CHAT_CONTINUATION_NONE) {
        params.add_generation_prompt = false;
        params.continue_msg          = messages.back();
        messages.pop_back();
    }

    params.messages = common_json::array();
    for (const common_chat_msg & message : messages) {
        params.messages.push_back(message.to_json_oaicompat());
    }
    fit_contents(params.messages, caps);
    if (source.find("<|channel|>") == std::string::npos) {  // only that family knows the role
        for (common_json & message : params.messages) {
            if (message.at("role") == "developer") {
                message["role"] = "system";
            }
        }
    }
    if (!caps.supports_system_role) {
        merge_system_message(params.messages);
    }
    if (caps.supports_object_arguments) {
        parse_arguments(params.messages);
    }

    params.extra_context = common_json::object();
    // llama-common leaves it undefined instead, which some templates take for true.
    params.extra_context["add_generation_prompt"] = false;
    params.extra_context["datetime"]              = date(request.now, "%b %d %Y");
    params.extra_context["date_string"]           = date(request.now, "%d %b %Y");
    const common_json kwargs = parse_json("chat_template_kwargs", request.template_kwargs);
    if (!kwargs.is_null() && !kwargs.is_object()) {
        throw std::invalid_argument("chat_template_kwargs: expected an object");
    }
    if (kwargs.is_object()) {
        for (const auto & [key, value] : kwargs.items()) {
            params.extra_context[key] = value;
        }
    }
    params.json_schema = parse_json("json_schema", request.json_schema);
    if (!params.json_schema.is_null() && !params.json_schema.is_object()) {
        throw std::invalid_argument("json_schema: expected an object");
    }
    if (params.json_schema.is_object()) {
        prepare_schema("json_schema", params.json_schema);
    }
    if (tools.is_array() && params.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE
        && !request.grammar.empty()) {
        throw std::invalid_argument("a grammar and tools cannot be combined");
    }
    return params;
}

}  // namespace llama_crab
