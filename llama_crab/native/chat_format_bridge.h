// What the chat bridges share: a format's parser, in llama-common's terms.
#pragma once

#include <memory>

#include "chat.h"
#include "chat_bridge.h"

namespace llama_crab {

struct ChatFormat {
    std::shared_ptr<const common_peg_arena> arena;
    common_chat_format                      format;
    bool                                    is_continuation;  // the answer begins in the prompt
};

}  // namespace llama_crab
