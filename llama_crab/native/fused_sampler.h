// The fused executor of a sampler chain: vectorised passes over the raw row instead of a candidate
// array of the whole vocabulary, no full sort, the same meaning and random streams as llama.cpp's
// chain.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "grammar.h"
#include "handles.h"
#include "row_sampler.h"
#include "token_history.h"
#include "token_pool.h"

namespace llama_crab {

enum class StageKind : int32_t {
    greedy, dist, top_k, top_p, min_p, typical, temp, temp_ext, xtc, top_n_sigma, mirostat,
    mirostat_v2, penalties, dry, adaptive_p, logit_bias, infill,
};

// A grammar of llama_sampler_init_grammar or, when lazy, of ..._grammar_lazy_patterns; none when the
// text is empty.
struct GrammarSpec {
    std::string              gbnf, root;
    bool                     lazy = false;
    std::vector<std::string> trigger_patterns;
    std::vector<llama_token> trigger_tokens;
    GrammarOpening           opening;
};

// A stage and its parameters under llama.h's names; what a kind does not have is not read.
struct StageSpec {
    StageKind kind = StageKind::greedy;
    float     p = 0, t = 0, delta = 0, exponent = 0, n = 0, tau = 0, eta = 0, target = 0, decay = 0;
    float     penalty_repeat = 0, penalty_freq = 0, penalty_present = 0;
    float     dry_multiplier = 0, dry_base = 0;
    int32_t   k = 0, m = 0, min_keep = 0, last_n = 0, dry_allowed_length = 0;
    uint32_t  seed = 0;
    std::vector<std::string>                   seq_breakers;
    std::vector<std::pair<llama_token, float>> logit_bias;
};

class FusedSampler : public RowSampler {
public:
    // The last stage must be a selector. `constraint` may be null.
    FusedSampler(ModelPtr model, const std::vector<StageSpec> & stages,
                 std::unique_ptr<GrammarConstraint> constraint);
    ~FusedSampler() override;

    llama_token sample(LogitsRow & row, Status & status) noexcept override;
    llama_token forced(Status & status) noexcept override;
    void accept(llama_token token, Status & status) noexcept override;
    void accept_prompt(const llama_token * tokens, size_t n, Status & status) noexcept override;
    void reset(Status & status) noexcept override;
    void explain(LogitsRow & row, Candidates & candidates, Status & status) noexcept override;

    std::unique_ptr<FusedSampler> clone() const;

private:
    // A stage with what it remembers.
    struct Stage {
        StageSpec                    spec;
        std::mt19937                 rng;
        float                        mu = 0.0f;                      // mirostat
        float                        weighted_sum = 0.0f, total_weight = 0.0f, chosen_p = 0.0f;
        std::shared_ptr<TokenCounts> counts;                         // penalties
        std::shared_ptr<DryHistory>  dry;
        std::shared_ptr<llama_sampler> infill;

        void reset();
    };

    void        start(LogitsRow & row);
    llama_token choose(Candidates * candidates);
    void        truncate(Stage & stage);
    llama_token select(Stage & stage, Candidates * candidates);
    void        penalise(Stage & stage);
    void        fill_in(Stage & stage);
    double      draw_discrete(Stage & stage);

    ModelPtr                           model_;  // keeps the vocabulary alive
    std::vector<Stage>                 stages_;
    std::unique_ptr<GrammarConstraint> constraint_;
    int32_t                            n_vocab_ = 0;
    bool                               needs_vocab_;  // a row must be as long as the vocabulary
    TokenPool                          pool_;
    std::vector<std::pair<int32_t, float>> amounts_;
    std::vector<llama_token_data>      candidates_;
    llama_token                        pending_ = LLAMA_TOKEN_NULL;  // chosen, not yet accepted
};

// Null with `status` set on failure: a grammar that does not parse, no memory.
FusedSampler * new_fused_sampler(ModelPtr model, const std::vector<StageSpec> & stages,
                                 const GrammarSpec & grammar, Status & status) noexcept;
FusedSampler * clone_fused_sampler(const FusedSampler & sampler, Status & status) noexcept;

}  // namespace llama_crab
