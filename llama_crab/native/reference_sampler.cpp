#include "reference_sampler.h"

#include <cstring>
#include <limits>

#include "grammar_bridge.h"

namespace llama_crab {

void ReferenceSampler::apply(const LogitsRow & row, llama_token_data_array & array) {
    candidates_.resize((size_t) row.n());
    for (llama_token id = 0; id < row.n(); ++id) {
        candidates_[(size_t) id] = {id, row.data()[id], 0.0f};
    }
    array = {candidates_.data(), candidates_.size(), -1, false};
    llama_sampler_apply(chain, &array);
}

llama_token ReferenceSampler::sample(LogitsRow & row, Status & status) noexcept {
    llama_token token = LLAMA_TOKEN_NULL;
    guarded(status, [&] {
        llama_token_data_array array;
        apply(row, array);
        // What llama_sampler_sample asserts.
        if (array.selected < 0 || (size_t) array.selected >= array.size) {
            status.set(Status::failed, "the sampler selected no token: it needs a final stage "
                                       "such as dist or greedy, and a candidate to select");
            return;
        }
        const llama_token_data & chosen = array.data[array.selected];
        if (!(chosen.logit > -std::numeric_limits<float>::infinity())) {
            status.set(Status::failed, no_candidate_left);
            return;
        }
        token = chosen.id;
    });
    return status.kind == Status::ok ? token : LLAMA_TOKEN_NULL;
}

llama_token ReferenceSampler::forced(Status &) noexcept { return LLAMA_TOKEN_NULL; }

void ReferenceSampler::accept(llama_token token, Status & status) noexcept {
    guarded(status, [&] { llama_sampler_accept(chain, token); });
}

void ReferenceSampler::accept_prompt(const llama_token * tokens, size_t n,
                                     Status & status) noexcept {
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

void ReferenceSampler::reset(Status & status) noexcept {
    guarded(status, [&] { llama_sampler_reset(chain); });
}

void ReferenceSampler::explain(LogitsRow & row, Candidates & candidates,
                               Status & status) noexcept {
    guarded(status, [&] {
        llama_token_data_array array;
        apply(row, array);
        for (size_t i = 0; i < array.size; ++i) {
            candidates.ids.push_back(array.data[i].id);
            candidates.logits.push_back(array.data[i].logit);
            candidates.p.push_back(array.data[i].p);
        }
        if (array.selected >= 0 && (size_t) array.selected < array.size) {
            candidates.selected = array.data[array.selected].id;
        }
    });
}

llama_sampler * new_grammar(const llama_vocab * vocab, const std::string & grammar,
                            const std::string & root, bool lazy,
                            const std::vector<std::string> & trigger_patterns,
                            const std::vector<llama_token> & trigger_tokens,
                            Status & status) noexcept {
    llama_sampler * sampler = nullptr;
    guarded(status, [&] {
        // Its own parser is asked last: it prints its reason, and hostile text exhausts it.
        parse_gbnf(vocab, grammar, root);
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
