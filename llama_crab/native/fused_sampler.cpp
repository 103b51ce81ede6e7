#include "fused_sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vocab_cache.h"

namespace llama_crab {

namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

[[noreturn]] void fail_without_candidates() { throw std::runtime_error(no_candidate_left); }

// A dist draws once per token, even for a single candidate.
double draw_uniform(std::mt19937 & rng) {
    return std::uniform_real_distribution<double>(0.0, 1.0)(rng);
}

}  // namespace

void FusedSampler::Stage::reset() {
    rng.seed(spec.seed);
    mu           = 2.0f * spec.tau;
    weighted_sum = spec.target / (1.0f - spec.decay);
    total_weight = 1.0f / (1.0f - spec.decay);
    chosen_p     = 0.0f;
    if (counts) {
        counts->clear();
    }
    if (dry) {
        dry->clear();
    }
}

FusedSampler::FusedSampler(ModelPtr model, const std::vector<StageSpec> & stages,
                           std::unique_ptr<GrammarConstraint> constraint)
    : model_(std::move(model)), constraint_(std::move(constraint)),
      needs_vocab_(constraint_ != nullptr) {
    const llama_vocab * vocab = llama_model_get_vocab(model_->model);
    n_vocab_ = llama_vocab_n_tokens(vocab);
    for (const StageSpec & spec : stages) {
        Stage stage;
        stage.spec = spec;
        if (spec.kind == StageKind::penalties) {
            stage.counts = std::make_shared<TokenCounts>((size_t) spec.last_n);
        } else if (spec.kind == StageKind::dry) {
            stage.dry = std::make_shared<DryHistory>(
                spec.dry_multiplier, spec.dry_base, spec.dry_allowed_length, spec.last_n,
                model_->vocab_cache->dry_breakers(spec.seq_breakers));
        } else if (spec.kind == StageKind::infill) {
            stage.infill.reset(llama_sampler_init_infill(vocab), llama_sampler_free);
            needs_vocab_ = true;
        }
        stage.reset();
        stages_.push_back(std::move(stage));
    }
    ++live.samplers;
}

FusedSampler::~FusedSampler() { --live.samplers; }

std::unique_ptr<FusedSampler> FusedSampler::clone() const {
    std::unique_ptr<GrammarConstraint> constraint;
    if (constraint_) {
        constraint = std::make_unique<GrammarConstraint>(*constraint_);
    }
    auto copy = std::make_unique<FusedSampler>(model_, std::vector<StageSpec>{},
                                               std::move(constraint));
    copy->stages_      = stages_;
    copy->pending_     = pending_;
    copy->needs_vocab_ = needs_vocab_;
    for (Stage & stage : copy->stages_) {
        if (stage.counts) {
            stage.counts = std::make_shared<TokenCounts>(*stage.counts);
        }
        if (stage.dry) {
            stage.dry = std::make_shared<DryHistory>(*stage.dry);
        }
        if (stage.infill) {
            stage.infill.reset(llama_sampler_clone(stage.infill.get()), llama_sampler_free);
        }
    }
    return copy;
}

void FusedSampler::reset(Status & status) noexcept {
    guarded(status, [&] {
        pending_ = LLAMA_TOKEN_NULL;
        for (Stage & stage : stages_) {
            stage.reset();
        }
        if (constraint_) {
            constraint_->reset();
        }
    });
}

llama_token FusedSampler::sample(LogitsRow & row, Status & status) noexcept {
    llama_token token = LLAMA_TOKEN_NULL;
    guarded(status, [&] {
        start(row);
        token = choose(nullptr);
    });
    return status.kind == Status::ok ? token : LLAMA_TOKEN_NULL;
}

void FusedSampler::explain(LogitsRow & row, Candidates & candidates, Status & status) noexcept {
    guarded(status, [&] {
        start(row);
        candidates.selected = choose(&candidates);
    });
}

llama_token FusedSampler::forced(Status & status) noexcept {
    llama_token token = LLAMA_TOKEN_NULL;
    if (!constraint_) {
        return token;
    }
    guarded(status, [&] {
        const llama_token only = constraint_->forced();
        if (only != LLAMA_TOKEN_NULL) {
            // The stages run all the same: their random streams and targets move on.
            pool_.open_single(only, n_vocab_);
            token = choose(nullptr);
        }
    });
    return status.kind == Status::ok ? token : LLAMA_TOKEN_NULL;
}

void FusedSampler::accept(llama_token token, Status & status) noexcept {
    guarded(status, [&] {
        if (constraint_) {
            if (token >= n_vocab_) {
                throw std::runtime_error("the token is outside the vocabulary");
            }
            constraint_->accept(token);
        }
        for (Stage & stage : stages_) {
            if (stage.counts) {
                stage.counts->push(token);
            } else if (stage.dry) {
                stage.dry->push(token);
            } else if (stage.spec.kind == StageKind::adaptive_p && pending_ == token &&
                       stage.spec.target >= 0.0f) {
                stage.weighted_sum = stage.chosen_p + stage.spec.decay * stage.weighted_sum;
                stage.total_weight = 1.0f + stage.spec.decay * stage.total_weight;
            }
        }
        pending_ = LLAMA_TOKEN_NULL;
    });
}

void FusedSampler::accept_prompt(const llama_token * tokens, size_t n, Status & status) noexcept {
    guarded(status, [&] {
        for (Stage & stage : stages_) {
            const size_t skip = n - std::min(n, (size_t) std::max(0, stage.spec.last_n));
            for (size_t i = skip; i < n; ++i) {
                if (stage.counts) {
                    stage.counts->push(tokens[i]);
                } else if (stage.dry) {
                    stage.dry->push(tokens[i]);
                }
            }
        }
    });
}

void FusedSampler::start(LogitsRow & row) {
    if (needs_vocab_ && row.n() != n_vocab_) {
        throw std::runtime_error("the row has " + std::to_string(row.n()) +
                                 " logits, the vocabulary " + std::to_string(n_vocab_));
    }
    if (!constraint_ || !constraint_->active()) {
        pool_.open(row);
        return;
    }
    const std::shared_ptr<const TokenMask> mask = constraint_->mask();
    if (mask->n_allowed == 0) {
        fail_without_candidates();
    }
    if (mask->ids.empty()) {
        pool_.open_masked(row, mask->bits);
    } else {
        pool_.open_listed(row, mask->ids);
    }
}

llama_token FusedSampler::choose(Candidates * candidates) {
    for (size_t i = 0; i < stages_.size(); ++i) {
        if (pool_.empty()) {
            fail_without_candidates();
        }
        const StageSpec & spec = stages_[i].spec;
        if (i + 1 == stages_.size()) {
            pending_ = select(stages_[i], candidates);
        } else if (spec.kind == StageKind::top_p && spec.min_keep <= 1 &&
                   stages_[i + 1].spec.kind == StageKind::min_p &&
                   stages_[i + 1].spec.min_keep <= 1) {
            pool_.top_p_min_p(spec.p, stages_[++i].spec.p);
        } else {
            truncate(stages_[i]);
        }
    }
    return pending_;
}

void FusedSampler::truncate(Stage & stage) {
    const StageSpec & spec     = stage.spec;
    const size_t      min_keep = (size_t) spec.min_keep;
    switch (spec.kind) {
        case StageKind::top_k:       pool_.top_k(spec.k); break;
        case StageKind::top_p:       pool_.top_p(spec.p, min_keep); break;
        case StageKind::min_p:       pool_.min_p(spec.p, min_keep); break;
        case StageKind::typical:     pool_.typical(spec.p, min_keep); break;
        case StageKind::temp:        pool_.temp(spec.t); break;
        case StageKind::temp_ext:    pool_.temp_ext(spec.t, spec.delta, spec.exponent); break;
        case StageKind::top_n_sigma: pool_.top_n_sigma(spec.n); break;
        case StageKind::penalties:
        case StageKind::dry:
        case StageKind::logit_bias:  penalise(stage); break;
        case StageKind::infill:      fill_in(stage); break;
        case StageKind::xtc:
            if (spec.p > 0.0f && spec.t <= 0.5f && pool_.size() >= 2 &&
                std::uniform_real_distribution<float>(0.0f, 1.0f)(stage.rng) <= spec.p) {
                pool_.exclude_top(spec.t, min_keep);
            }
            break;
        default: throw std::logic_error("a selector must be the last stage");
    }
}

void FusedSampler::penalise(Stage & stage) {
    const StageSpec & spec = stage.spec;
    if (spec.kind == StageKind::logit_bias) {
        pool_.adjust(spec.logit_bias, true, [](float logit, float bias) { return logit + bias; });
        return;
    }
    if (spec.kind == StageKind::dry) {
        pool_.adjust(stage.dry->penalties(), false,
                     [](float logit, float penalty) { return logit - penalty; });
        return;
    }
    amounts_.clear();
    for (const auto & [token, count] : stage.counts->counts()) {
        amounts_.emplace_back(token, (float) count);
    }
    pool_.adjust(amounts_, false, [&](float logit, float count) {
        logit = logit <= 0.0f ? logit * spec.penalty_repeat : logit / spec.penalty_repeat;
        return logit - (count * spec.penalty_freq + spec.penalty_present);
    });
}

// llama.cpp's own: what is in play goes through its candidate array.
void FusedSampler::fill_in(Stage & stage) {
    TokenList & list = pool_.as_list();
    candidates_.clear();
    for (size_t i = 0; i < list.size(); ++i) {
        candidates_.push_back({list.ids[i], list.logits[i], 0.0f});
    }
    candidates_.resize(list.size() + pool_.n_dead(), {0, minus_infinity, 0.0f});
    llama_token_data_array array = {candidates_.data(), candidates_.size(), -1, pool_.sorted()};
    llama_sampler_apply(stage.infill.get(), &array);
    list.clear();
    for (size_t i = 0; i < array.size; ++i) {
        list.push(array.data[i].id, array.data[i].logit);
    }
    pool_.set_list(array.sorted);
}

// std::discrete_distribution draws like a dist, but nothing for a single candidate.
double FusedSampler::draw_discrete(Stage & stage) {
    return pool_.size() < 2 ? 0.0
                            : std::generate_canonical<double, 53>(stage.rng);
}

llama_token FusedSampler::select(Stage & stage, Candidates * candidates) {
    const StageSpec & spec = stage.spec;
    if (spec.kind == StageKind::mirostat) {
        pool_.mirostat(stage.mu, n_vocab_, spec.m);
    } else if (spec.kind == StageKind::mirostat_v2) {
        pool_.mirostat_v2(stage.mu);
    }
    if (candidates != nullptr) {
        const TokenList & list = pool_.as_list();
        candidates->ids    = list.ids;
        candidates->logits = list.logits;
    }
    TokenPool::Choice choice{};
    switch (spec.kind) {
        case StageKind::greedy:
            choice = pool_.best();
            if (candidates != nullptr) {
                pool_.weigh();
            }
            break;
        case StageKind::dist:   choice = pool_.draw(draw_uniform(stage.rng)); break;
        case StageKind::mirostat:
        case StageKind::mirostat_v2: {
            choice = pool_.draw(draw_discrete(stage));
            const float surprise = -std::log2((float) choice.p);
            stage.mu -= spec.eta * (surprise - spec.tau);
            break;
        }
        case StageKind::adaptive_p: {
            if (spec.target < 0.0f) {
                choice = pool_.draw(draw_discrete(stage));
                break;
            }
            const float target = std::min(spec.target, 1.0f);
            const float adapted =
                stage.total_weight == 0.0f
                    ? target
                    : 2.0f * target - stage.weighted_sum / stage.total_weight;
            choice = pool_.draw_adaptive(draw_discrete(stage), std::clamp(adapted, 0.0f, 1.0f));
            stage.chosen_p = (float) choice.p;
            break;
        }
        default: throw std::logic_error("the last stage must be a selector");
    }
    if (candidates != nullptr) {
        candidates->p = pool_.probabilities();
    }
    return choice.id;
}

FusedSampler * new_fused_sampler(ModelPtr model, const std::vector<StageSpec> & stages,
                                 const GrammarSpec & grammar, Status & status) noexcept {
    FusedSampler * sampler = nullptr;
    guarded(status, [&] {
        std::unique_ptr<GrammarConstraint> constraint;
        if (!grammar.gbnf.empty()) {
            constraint = std::make_unique<GrammarConstraint>(
                model->vocab_cache->grammar(grammar.gbnf, grammar.root), grammar.lazy,
                grammar.trigger_patterns, grammar.trigger_tokens, grammar.opening);
        }
        sampler = new FusedSampler(std::move(model), stages, std::move(constraint));
    });
    return sampler;
}

FusedSampler * clone_fused_sampler(const FusedSampler & sampler, Status & status) noexcept {
    FusedSampler * copy = nullptr;
    guarded(status, [&] { copy = sampler.clone().release(); });
    return copy;
}

}  // namespace llama_crab
