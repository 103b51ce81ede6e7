#include "row_sampler.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>

#include "logits_row.h"

namespace llama_crab {

llama_token RowSampler::sample(llama_sampler * chain, const float * row, int32_t n_vocab,
                               Status & status) {
    const RowMax best = row_max(row, n_vocab);
    if (best.index < 0) {
        status.set(Status::failed, "the logits hold NaN or no finite value");
        return LLAMA_TOKEN_NULL;
    }
    if (chain == nullptr) {
        return best.index;
    }
    llama_token token = LLAMA_TOKEN_NULL;
    guarded(status, [&] {
        candidates_.resize((size_t) n_vocab);
        for (llama_token id = 0; id < n_vocab; ++id) {
            candidates_[(size_t) id] = {id, row[id], 0.0f};
        }
        llama_token_data_array array = {candidates_.data(), candidates_.size(), -1, false};
        llama_sampler_apply(chain, &array);
        if (array.selected < 0 || (size_t) array.selected >= array.size) {
            status.set(Status::failed, "the sampler selected no token: it needs a final stage "
                                       "such as dist or greedy, and a candidate to select");
            return;
        }
        const llama_token_data & chosen = array.data[array.selected];
        if (!(chosen.logit > -std::numeric_limits<float>::infinity())) {
            status.set(Status::failed, "no candidate is left: the sampler's stages, the grammar or "
                                       "the banned tokens exclude every one");
            return;
        }
        token = chosen.id;
        llama_sampler_accept(chain, token);
    });
    return status.kind == Status::ok ? token : LLAMA_TOKEN_NULL;
}

void accept_prompt(llama_sampler * chain, const llama_token * tokens, size_t n, Status & status) {
    guarded(status, [&] {
        const int32_t n_stages = llama_sampler_chain_n(chain);
        for (int32_t i = 0; i < n_stages; ++i) {
            llama_sampler * stage = llama_sampler_chain_get(chain, i);
            const char * name = llama_sampler_name(stage);
            if (std::strcmp(name, "penalties") != 0 && std::strcmp(name, "dry") != 0) {
                continue;
            }
            for (size_t j = 0; j < n; ++j) {
                llama_sampler_accept(stage, tokens[j]);
            }
        }
    });
}

void accept_token(llama_sampler * sampler, llama_token token, Status & status) noexcept {
    guarded(status, [&] { llama_sampler_accept(sampler, token); });
}

void apply_sampler(llama_sampler * sampler, llama_token_data_array & candidates,
                   Status & status) noexcept {
    guarded(status, [&] { llama_sampler_apply(sampler, &candidates); });
}

namespace {

// llama.cpp's parser recurses at "(", and takes {5,1} for 2^64 repetitions. Throws on both.
void check_grammar(const std::string & text) {
    constexpr int max_depth = 256;
    int           depth     = 0;
    for (size_t i = 0; i < text.size(); ++i) {
        const char c = text[i];
        if (c == '#') {
            i = std::min(text.find('\n', i), text.size());
        } else if (c == '"' || c == '[') {
            const char end = c == '"' ? '"' : ']';
            for (++i; i < text.size() && text[i] != end; ++i) {
                i += text[i] == '\\';
            }
        } else if (c == '(' && ++depth > max_depth) {
            throw std::runtime_error("more than " + std::to_string(max_depth) + " nested groups");
        } else if (c == ')') {
            --depth;
        } else if (c == '{') {
            unsigned long long least = 0, most = 0;
            if (std::sscanf(text.c_str() + i, "{ %llu , %llu", &least, &most) == 2 && most < least) {
                throw std::runtime_error("a repetition has a maximum below its minimum");
            }
        }
    }
}

}  // namespace

llama_sampler * new_grammar(const llama_vocab * vocab, const std::string & grammar,
                            const std::string & root, bool lazy,
                            const std::vector<std::string> & trigger_patterns,
                            const std::vector<llama_token> & trigger_tokens,
                            Status & status) noexcept {
    llama_sampler * sampler = nullptr;
    guarded(status, [&] {
        check_grammar(grammar);
        if (lazy) {
            std::vector<const char *> patterns;
            for (const std::string & pattern : trigger_patterns) {
                patterns.push_back(pattern.c_str());
            }
            sampler = llama_sampler_init_grammar_lazy_patterns(
                vocab, grammar.c_str(), root.c_str(), patterns.data(), patterns.size(),
                trigger_tokens.data(), trigger_tokens.size());
        } else {
            sampler = llama_sampler_init_grammar(vocab, grammar.c_str(), root.c_str());
        }
        if (sampler == nullptr) {
            status.set(Status::failed, "the grammar does not parse");
        }
    });
    return sampler;
}

}  // namespace llama_crab
