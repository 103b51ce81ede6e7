// What we add to llama-common's Jinja runtime, without changing it: where the text of a render
// comes from, the time it sees, and limits.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "chat.h"

namespace llama_crab {

// Throws std::invalid_argument for a template that would exhaust the stack of the parser.
void check_template(const std::string & source);

// Makes renders of a template visible to the RecordedRender of their thread, quick, and bounded.
void instrument(common_chat_template & tmpl);

// While one lives, renders on this thread see `now` and are recorded.
class RecordedRender {
public:
    // `repeats`: the renders differ in their generation prompt only.
    RecordedRender(int64_t now, bool repeats);
    ~RecordedRender();
    RecordedRender(const RecordedRender &) = delete;

    void clear();
    // What the template sees as its tools, unless that is null; borrowed.
    void show_tools(const common_json * tools);
    // The ranges of a prompt that came from the input of the render it begins with.
    std::vector<std::pair<size_t, size_t>> input_ranges(const std::string & prompt) const;

    struct Record;

private:
    Record * record_;
};

}  // namespace llama_crab
