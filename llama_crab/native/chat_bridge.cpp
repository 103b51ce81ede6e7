#include "chat_bridge.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>

#include "chat-auto-parser.h"
#include "chat-peg-parser.h"
#include "chat_format_bridge.h"
#include "chat_messages_bridge.h"
#include "chat_marks_bridge.h"
#include "chat_tokens.h"
#include "jinja_bridge.h"
#include "log.h"

namespace llama_crab {

namespace {

// llama-common prints through a thread of its own; its reasons come as exceptions as well.
void silence_llama_common() { common_log_set_verbosity_thold(-1); }

// llama-common's messages point at the place in the template, over many lines.
std::string reason(const std::exception & error) {
    std::string       text   = error.what();
    const std::string marker = "\nError: ";
    const size_t      at     = text.rfind(marker);
    const size_t      where  = text.find("While executing ");
    if (at == std::string::npos || where == std::string::npos) {
        return text;
    }
    const size_t line = text.find("line ", where);
    const size_t end  = text.find(" in source", where);
    std::string  result = text.substr(at + marker.size());
    if (line < end && end != std::string::npos) {
        result += " (" + text.substr(line, end - line) + " of the template)";
    }
    return result;
}

const char * name_of(common_grammar_trigger_type type) {
    switch (type) {
        case COMMON_GRAMMAR_TRIGGER_TYPE_TOKEN:   return "token";
        case COMMON_GRAMMAR_TRIGGER_TYPE_WORD:    return "word";
        case COMMON_GRAMMAR_TRIGGER_TYPE_PATTERN: return "pattern";
        default:                                  return "pattern_full";
    }
}

std::string piece(const llama_vocab * vocab, llama_token token) {
    return token == LLAMA_TOKEN_NULL ? std::string() : common_token_to_piece(vocab, token, true);
}

}  // namespace

// One template, with what llama-common finds out about it.
class AnalysedTemplate {
public:
    AnalysedTemplate(const std::string & source, const std::string & bos, const std::string & eos)
        : tmpl_(source, bos, eos) {
        instrument(tmpl_);
        // Templates with a format of their own are told by their text; the others are analysed.
        autoparser::generation_params params;
        params.messages = parse_json("messages", R"([{"role": "user", "content": "Hello"}])");
        try {
            if (common_chat_try_specialized_template(tmpl_, tmpl_.src, params)) {
                return;
            }
        } catch (const std::exception &) {
            return;  // it has one, which refuses this conversation
        }
        try {
            analysis_.analyze_template(tmpl_);
        } catch (const std::exception &) {
            analysis_.analysis_complete = false;
        }
        is_specialised_ = false;
    }

    const common_chat_template & tmpl() const { return tmpl_; }
    bool                         is_specialised() const { return is_specialised_; }

    common_chat_params apply(autoparser::generation_params params) const {
        if (is_specialised_) {
            if (auto result = common_chat_try_specialized_template(tmpl_, tmpl_.src, params)) {
                return std::move(*result);
            }
        }
        if (!analysis_.analysis_complete) {
            return apply_as_text(params);
        }
        common_chat_params result =
            autoparser::peg_generator::generate_parser(tmpl_, params, analysis_);
        result.supports_thinking = analysis_.reasoning.mode != autoparser::reasoning_mode::NONE;
        if (result.supports_thinking) {
            result.thinking_start_tag = string_strip(analysis_.reasoning.start);
            const std::string end     = string_strip(analysis_.reasoning.end);
            if (!end.empty()) {
                result.thinking_end_tags = {end};
            }
        }
        return result;
    }

private:
    // Where llama-common finds no structure, the whole output is the answer.
    common_chat_params apply_as_text(const autoparser::generation_params & params) const {
        common_chat_params result;
        result.prompt = common_chat_template_direct_apply(tmpl_, params);
        if (params.has_continuation()) {
            const std::string opened = common_chat_template_generation_prompt(tmpl_, params);
            result.generation_prompt = params.continue_msg.render_content();
            result.prompt += opened + result.generation_prompt;
        }
        return result;
    }

    common_chat_template   tmpl_;
    autoparser::autoparser analysis_;
    bool                   is_specialised_ = true;
};

struct ChatTemplates::Impl {
    Impl(ModelPtr model_, const std::string & given) : model(std::move(model_)) {
        const llama_vocab * vocab = llama_model_get_vocab(model->model);
        bos                       = llama_vocab_bos(vocab);
        const std::string bos_text = piece(vocab, bos);
        const std::string eos_text = piece(vocab, llama_vocab_eos(vocab));
        if (!given.empty()) {
            check_template(given);
            common_chat_template(given, bos_text, eos_text);  // names what is wrong with it
        }
        for (const char * name : {(const char *) nullptr, "tool_use"}) {
            const char * source = llama_model_chat_template(model->model, name);
            try {
                check_template(given.empty() && source != nullptr ? source : "");
            } catch (const std::runtime_error &) {
                // One that does not parse: llama-common names the reason, or does without.
            }
        }
        const auto found = common_chat_templates_init(model->model, given);
        was_explicit     = common_chat_templates_was_explicit(found.get());
        plain            = analyse(common_chat_templates_source(found.get()), bos_text, eos_text);
        const std::string tool_use = common_chat_templates_source(found.get(), "tool_use");
        if (!tool_use.empty()) {
            with_tools = analyse(tool_use, bos_text, eos_text);
        }
        specials = std::make_unique<SpecialTokens>(vocab);
    }

    static std::unique_ptr<AnalysedTemplate> analyse(const std::string & source,
                                                     const std::string & bos,
                                                     const std::string & eos) {
        check_template(source);
        return std::make_unique<AnalysedTemplate>(source, bos, eos);
    }

    const AnalysedTemplate & choose(bool has_tools) const {
        return has_tools && with_tools ? *with_tools : *plain;
    }

    void render(const ChatRequest & request, ChatPrompt & prompt) const {
        common_json              tools    = read_chat_tools(request);
        const AnalysedTemplate & analysed = choose(tools.is_array());
        // The template shows the tools as they were given.
        common_json shown = tools;
        if (!prepare_chat_tools(tools)) {
            shown = nullptr;
        }
        autoparser::generation_params params =
            read_chat_request(request, analysed.tmpl(), tools);
        if (params.extra_context.contains("tools")) {
            shown = nullptr;
        }
        RecordedRender     recorded(request.now, !analysed.is_specialised());
        recorded.show_tools(&shown);
        common_chat_params found = analysed.apply(params);
        prompt.text              = found.prompt;

        prompt.input             = recorded.input_ranges(prompt.text);

        const bool   continues = params.has_continuation();
        TokenMarks   marks(*specials, request.messages + request.tools + request.template_kwargs);
        std::string  end;  // where the message ends that is to be continued
        if (continues && params.continue_final_message == COMMON_CHAT_CONTINUATION_CONTENT) {
            // llama-common puts such a prompt together itself, not always as the template would.
            autoparser::generation_params whole = read_chat_request(
                whole_conversation(request, marks.end_mark()), analysed.tmpl(), tools);
            if (render_again(analysed, whole, marks.end_mark(), recorded, prompt)) {
                params = std::move(whole);
                end    = marks.end_mark();
            }
        }
        if (marks.replace(params, shown)) {
            // Once more, with marks where users wrote special tokens, to see where these end up.
            // A template that looks for such tokens does not find them: they are text to it too.
            render_again(analysed, params, end, recorded, prompt);
            marks.restore(prompt.text, prompt.input);
        }
        prompt.format       = common_chat_format_name(found.format);
        prompt.grammar      = found.grammar.empty() ? request.grammar : std::move(found.grammar);
        prompt.grammar_lazy = found.grammar_lazy;
        for (common_grammar_trigger & trigger : found.grammar_triggers) {
            prompt.grammar_triggers.push_back(
                {name_of(trigger.type), std::move(trigger.value), trigger.token});
        }
        prompt.preserved_tokens   = std::move(found.preserved_tokens);
        prompt.additional_stops   = std::move(found.additional_stops);
        prompt.generation_prompt  = std::move(found.generation_prompt);
        prompt.supports_thinking  = found.supports_thinking;
        prompt.thinking_start_tag = std::move(found.thinking_start_tag);
        prompt.thinking_end_tags  = std::move(found.thinking_end_tags);
        auto arena                = std::make_shared<common_peg_arena>();
        if (found.parser.empty()) {
            *arena = build_chat_peg_parser(
                [](common_chat_peg_builder & p) { return p.content(p.rest()) + p.end(); });
        } else {
            arena->load(found.parser);
        }
        prompt.parser = std::make_shared<ChatFormat>(
            ChatFormat{std::move(arena), found.format, continues});
    }

    // The text as far as `end`, if that is not empty; false when the template leaves it out.
    static bool render_again(const AnalysedTemplate & analysed,
                             const autoparser::generation_params & params, const std::string & end,
                             RecordedRender & recorded, ChatPrompt & prompt) {
        recorded.clear();
        std::string text = analysed.apply(params).prompt;
        TextRanges  input = recorded.input_ranges(text);
        if (!end.empty()) {
            const size_t at = text.rfind(end);
            if (at == std::string::npos) {
                return false;
            }
            text.resize(at);
            while (!input.empty() && input.back().first >= at) {
                input.pop_back();
            }
            if (!input.empty()) {
                input.back().second = std::min(input.back().second, at);
            }
        }
        prompt.text.swap(text);
        prompt.input.swap(input);
        return true;
    }

    std::map<std::string, bool> probe() const;

    ModelPtr                            model;
    llama_token                         bos          = LLAMA_TOKEN_NULL;
    bool                                was_explicit = true;
    std::unique_ptr<AnalysedTemplate>   plain;
    std::unique_ptr<AnalysedTemplate>   with_tools;
    std::unique_ptr<SpecialTokens>      specials;
    mutable std::once_flag              probed;
    mutable std::map<std::string, bool> found;
};

std::map<std::string, bool> ChatTemplates::Impl::probe() const {
    std::map<std::string, bool> result = choose(true).tmpl().caps.to_map();
    const auto try_render = [&](const char * tools, ChatPrompt & prompt) {
        ChatRequest request;
        request.messages         = R"([{"role": "user", "content": "Hello"}])";
        request.tools            = tools;
        request.tool_choice      = "required";
        request.reasoning_format = "auto";
        try {
            render(request, prompt);
            return true;
        } catch (const std::exception &) {
            return false;
        }
    };
    // Only a template whose prompt, grammar and parser all know the tool serves for tools.
    const std::string tool   = "probe_of_tools";
    const std::string output = R"([{"type": "function", "function": {"name": ")" + tool
                               + R"(", "description": "Probe.", "parameters": {"type": "object",)"
                               + R"("properties": {"text": {"type": "string"}}}}}])";
    ChatPrompt with, without;
    const bool rendered = try_render(output.c_str(), with);
    result["supports_tools"] = rendered && with.text.find(tool) != std::string::npos
                               && with.grammar.find(tool) != std::string::npos;
    result["supports_thinking"] = try_render("", without) && without.supports_thinking;
    return result;
}

ChatTemplates::ChatTemplates(ModelPtr model, const std::string & source)
    : impl_(new Impl(std::move(model), source)) {}

ChatTemplates::~ChatTemplates() = default;

void ChatTemplates::render(const ChatRequest & request, ChatPrompt & prompt,
                           Status & status) const noexcept {
    guarded(status, [&] {
        try {
            impl_->render(request, prompt);
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & error) {
            status.set(Status::failed, reason(error));
        }
    });
}

void ChatTemplates::tokenize(const ChatPrompt & prompt, std::vector<llama_token> & out,
                             Status & status) const noexcept {
    guarded(status, [&] {
        const llama_vocab * vocab = llama_model_get_vocab(impl_->model->model);
        out.clear();
        if (llama_vocab_get_add_bos(vocab) && impl_->bos != LLAMA_TOKEN_NULL) {
            out.push_back(impl_->bos);
        }
        const size_t n_before = out.size();
        impl_->specials->tokenize(prompt.text, prompt.input, out);
        if (n_before == 1 && out.size() > 1 && out[1] == impl_->bos) {
            out.erase(out.begin());
        }
    });
}

std::string ChatTemplates::source(bool tool_use) const {
    const auto & chosen = tool_use ? impl_->with_tools : impl_->plain;
    return chosen ? chosen->tmpl().src : std::string();
}

std::map<std::string, bool> ChatTemplates::capabilities() const {
    std::call_once(impl_->probed, [&] { impl_->found = impl_->probe(); });
    return impl_->found;
}

bool ChatTemplates::was_explicit() const { return impl_->was_explicit; }

ChatTemplates * new_chat_templates(ModelPtr model, const std::string & source,
                                   Status & status) noexcept {
    ChatTemplates * templates = nullptr;
    guarded(status, [&] {
        silence_llama_common();
        try {
            templates = new ChatTemplates(std::move(model), source);
        } catch (const std::bad_alloc &) {
            throw;
        } catch (const std::exception & error) {
            status.set(Status::failed, reason(error));
        }
    });
    return templates;
}

}  // namespace llama_crab
