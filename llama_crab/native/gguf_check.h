// What llama.cpp takes on trust from a GGUF, and would assert or crash on later, in a worker thread.
#pragma once

#include <string>
#include <vector>

#include "llama.h"

namespace llama_crab {

// Checks metadata, overrides and tensor types of `paths` (one file, whose further splits are found,
// or all splits in order). Throws std::runtime_error that says what is wrong.
void check_gguf(const std::vector<std::string> & paths, const llama_model_kv_override * overrides);

}  // namespace llama_crab
