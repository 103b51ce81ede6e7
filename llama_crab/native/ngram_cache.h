#pragma once
#include <vector>
#include "llama.h"
namespace llama_crab {
class NgramCache {
public:
    void learn(const std::vector<llama_token> &, int32_t, int32_t) {}
    int32_t draft(const std::vector<llama_token> &, int32_t, std::vector<llama_token> &) const { return 0; }
};
}  // namespace llama_crab
