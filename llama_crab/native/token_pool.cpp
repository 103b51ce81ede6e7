#include "token_pool.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <numeric>

#include "row_kernels.h"

namespace llama_crab {

namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

}  // namespace

void TokenPool::open(LogitsRow & row) {
    row_     = &row;
    whole_   = true;
    sorted_  = false;
    removed_ = 0;
    dead_    = 0;
    scale_   = 1.0f;
    floor_   = -FLT_MAX;
    divisors_.clear();
}

void TokenPool::open_masked(LogitsRow & row, const std::vector<uint32_t> & bits) {
    open(row);
    scratch_.resize((size_t) row.n());
    kernels().masked(row.data(), bits.data(), row.n(), scratch_.data());
    scratch_row_.open(scratch_.data(), row.n());
    row_ = &scratch_row_;
}

void TokenPool::open_listed(LogitsRow & row, const std::vector<int32_t> & ids) {
    open(row);
    whole_ = false;
    list_.clear();
    for (int32_t id : ids) {
        list_.push(id, row.data()[id]);
    }
    dead_ = (size_t) row.n() - ids.size();
    drop_dead();
}

void TokenPool::open_single(int32_t id, int32_t n) {
    whole_  = false;
    sorted_ = false;
    dead_   = (size_t) n - 1;
    list_.clear();
    list_.push(id, 0.0f);
}

bool TokenPool::empty() { return whole_ ? row_->max() == minus_infinity : list_.empty(); }

size_t TokenPool::size() const {
    return whole_ ? (size_t) row_->n() - removed_ : list_.size() + dead_;
}

TokenList & TokenPool::as_list() {
    to_list();
    return list_;
}

void TokenPool::set_list(bool sorted) {
    dead_ = 0;
    drop_dead();
    sorted_ = sorted;
}

// A logit of the row as the stages so far have left it; divided one by one, as llama.cpp does.
float TokenPool::scaled(float logit) const {
    for (float t : divisors_) {
        logit /= t;
    }
    return logit;
}

// Turns a list of the row's logits into one of the pool's.
void TokenPool::scale_list() {
    if (!divisors_.empty()) {
        for (float & logit : list_.logits) {
            logit = scaled(logit);
        }
        divisors_.clear();
        scale_ = 1.0f;
    }
    whole_ = false;
    drop_dead();
}

void TokenPool::to_list() {
    if (!whole_) {
        return;
    }
    const size_t n = size();
    row_->at_least(floor_, list_);
    if (sorted_) {
        sorter_.sort(list_);
    }
    dead_ = n - list_.size();
    scale_list();
}

void TokenPool::drop_dead() { dead_ += list_.keep_at_least(-FLT_MAX); }

void TokenPool::sort() {
    if (!sorted_) {
        sorter_.sort(list_);
        sorted_ = true;
    }
}

// Keeps the first n, dead ones last.
void TokenPool::truncate(size_t n) {
    dead_ = n > list_.size() ? std::min(dead_, n - list_.size()) : 0;
    list_.resize(std::min(n, list_.size()));
}

void TokenPool::weigh_against(float max, float scale) {
    weights_.resize(list_.size());
    kernels().exps(list_.logits.data(), (int32_t) list_.size(), max, scale, weights_.data());
}

double TokenPool::weigh() {
    weigh_against(sorted_ ? list_.logits[0]
                          : kernels().max(list_.logits.data(), (int32_t) list_.size()),
                  1.0f);
    return std::accumulate(weights_.begin(), weights_.end(), 0.0);
}

// Applies pending temperatures to a copy of the row, so that single logits can be changed.
void TokenPool::use_scratch() {
    if (divisors_.empty()) {
        return;
    }
    std::vector<float> & to   = row_ == &scratch_row_ ? scores_ : scratch_;
    const int32_t        n    = row_->n();
    const float *        from = row_->data();
    to.resize((size_t) n);
    for (float t : divisors_) {
        kernels().divide(from, n, t, to.data());
        from = to.data();
    }
    if (&to == &scores_) {
        scratch_.swap(scores_);
    }
    scratch_row_.open(scratch_.data(), n);
    row_ = &scratch_row_;
    divisors_.clear();
    scale_ = 1.0f;
}

void TokenPool::keep_single(int32_t id, float logit) {
    dead_ = size() - 1;
    list_.clear();
    list_.push(id, logit);
    whole_ = false;
    divisors_.clear();
    scale_ = 1.0f;
}

void TokenPool::temp(float t) {
    if (t <= 0.0f) {
        if (whole_) {
            const int32_t id = row_->argmax();
            keep_single(id, scaled(row_->data()[id]));
        } else {
            const auto at = std::max_element(list_.logits.begin(), list_.logits.end());
            keep_single(list_.ids[(size_t) (at - list_.logits.begin())], *at);
        }
        return;
    }
    if (t == 1.0f) {
        return;
    }
    if (whole_ && std::isfinite(scaled(row_->max()) / t) && std::isfinite(scale_ / t)) {
        divisors_.push_back(t);
        scale_ /= t;
        return;
    }
    to_list();
    const float max = kernels().max(list_.logits.data(), (int32_t) list_.size());
    // Where the quotient overflows, the distance to the best token is what counts.
    const float base = std::isfinite(max / t) ? 0.0f : max;
    for (float & logit : list_.logits) {
        logit = (logit - base) / t;
    }
    drop_dead();
}

void TokenPool::temp_ext(float t, float delta, float exponent) {
    if (delta <= 0.0f) {
        temp(t);
        return;
    }
    const size_t n = size();
    if (n <= 1) {
        return;
    }
    double sum = 0.0, dot = 0.0;
    if (whole_) {
        kernels().entropy_sums(row_->data(), row_->n(), row_->max(), scale_, sum, dot);
    } else {
        const int32_t m = (int32_t) list_.size();
        kernels().entropy_sums(list_.logits.data(), m, kernels().max(list_.logits.data(), m), 1.0f,
                               sum, dot);
        sort();
    }
    sorted_ = true;
    const double entropy = std::max(0.0, std::log(sum) - dot / sum);
    const double low = std::max(0.0f, t - delta), high = t + delta;
    const double share = std::pow(entropy / std::log((double) n), (double) exponent);
    temp((float) (low + (high - low) * share));
}

std::vector<float> TokenPool::probabilities() const {
    const double       sum = std::accumulate(weights_.begin(), weights_.end(), 0.0);
    std::vector<float> p(weights_.size());
    std::transform(weights_.begin(), weights_.end(), p.begin(),
                   [&](float weight) { return (float) (weight / sum); });
    return p;
}

TokenPool::Choice TokenPool::best() {
    if (whole_) {
        return {row_->argmax(), 1.0};
    }
    const auto at = std::max_element(list_.logits.begin(), list_.logits.end());
    return {list_.ids[(size_t) (at - list_.logits.begin())], 1.0};
}

TokenPool::Choice TokenPool::draw(double u) {
    if (whole_ && !sorted_) {
        const double  sum = row_->sum_exp(scale_);
        const int32_t at  = row_->find(u * sum, scale_);
        const int32_t id  = at < 0 ? row_->argmax() : at;
        return {id, std::exp((double) ((row_->data()[id] - row_->max()) * scale_)) / sum};
    }
    double sum = 0.0;
    size_t n   = 0;  // tokens up to the drawn one
    if (whole_) {
        sum = floor_ > -FLT_MAX ? floor_sum_ : row_->sum_exp(scale_);
        take_mass(u * sum, [&] { return (n = count_to(u * sum, 1, false)) > 0; });
    } else {
        sum = weigh();
        n   = count_to(u * sum, 1, false);
    }
    // Rounding may leave u beyond all of them.
    const size_t at = (n > 0 ? n : list_.size()) - 1;
    return {list_.ids[at], weights_[at] / sum};
}

TokenPool::Choice TokenPool::draw_adaptive(double u, float target) {
    if (whole_ && sorted_) {
        to_list();
    }
    const bool    whole = whole_;
    const float * from  = whole ? row_->data() : list_.logits.data();
    const int32_t n     = whole ? row_->n() : (int32_t) list_.size();
    const float   max   = whole ? row_->max() : kernels().max(from, n);
    const double  sum   = whole ? row_->sum_exp(scale_) : weigh();
    scores_.resize((size_t) n);
    kernels().adaptive(from, n, max, scale_, (float) (1.0 / sum), target, scores_.data());
    score_row_.open(scores_.data(), n);
    const double  total = score_row_.sum_exp(1.0f);
    const int32_t found = score_row_.find(u * total, 1.0f);
    const int32_t at    = found < 0 ? score_row_.argmax() : found;
    if (!whole) {
        kernels().exps(scores_.data(), n, score_row_.max(), 1.0f, weights_.data());
    }
    return {whole ? at : list_.ids[(size_t) at],
            std::exp((double) ((from[at] - max) * scale_)) / sum};
}

}  // namespace llama_crab
