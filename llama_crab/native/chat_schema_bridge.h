// JSON schemas on their way to llama-common's converter, which follows references without a bound and
// prints what it cannot convert.
#pragma once

#include <string>

#include "chat-auto-parser.h"

namespace llama_crab {

// Makes a schema one that llama-common converts: an allOf of one member becomes that member, and a
// pattern that it would take for any string is dropped. Both mean the same to its grammars. Returns
// whether anything changed. Throws std::invalid_argument, which names `what`, for a schema whose
// conversion would not end, or would exhaust stack or memory.
bool prepare_schema(const std::string & what, common_json & schema);

}  // namespace llama_crab
