#include "token_pool.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>

#include "row_kernels.h"

namespace llama_crab {

namespace {

constexpr float   minus_infinity = -std::numeric_limits<float>::infinity();
constexpr int32_t most_to_sort   = 512;

}  // namespace

void TokenPool::top_k(int32_t k) {
    if (k <= 0) {
        return;
    }
    const size_t kept = std::min((size_t) k, size());
    if (whole_ && kept == size()) {
        sorted_ = true;
    } else if (whole_) {
        row_->top((int32_t) kept, list_);
        dead_ = 0;
        scale_list();
        sorted_ = true;
    } else {
        sort();
        truncate(kept);
    }
}

// How many of the list's first tokens it takes for their weights to reach `target`, or to exceed it
// when `beyond`; at least `min_keep`, 0 when there are too few.
size_t TokenPool::count_to(double target, size_t min_keep, bool beyond) const {
    double run = 0.0;
    for (size_t i = 0; i < weights_.size(); ++i) {
        run += weights_[i];
        if ((beyond ? run > target : run >= target) && i + 1 >= min_keep) {
            return i + 1;
        }
    }
    return 0;
}

void TokenPool::top_p(float p, size_t min_keep) {
    if (p >= 1.0f) {
        return;
    }
    size_t kept = 0;
    const size_t n = size();
    if (whole_) {
        const double target = p * row_->sum_exp(scale_);
        take_mass(target, [&] { return (kept = count_to(target, min_keep, false)) > 0; });
        dead_ = n - list_.size();
        scale_list();
        sorted_ = true;
    } else {
        sort();
        kept = count_to(p * weigh(), min_keep, false);
    }
    truncate(kept > 0 ? kept : std::max(list_.size(), std::min(min_keep, n)));
}

// Both keep the beginning of the descending order, so only what min_p keeps needs an order.
void TokenPool::top_p_min_p(float top, float min) {
    if (!whole_ || top >= 1.0f || min <= 0.0f) {
        top_p(top, 1);
        min_p(min, 1);
        return;
    }
    const double target = top * row_->sum_exp(scale_);
    min_p(min, 1);
    sort();
    weigh();
    const size_t kept = count_to(target, 1, false);
    if (kept > 0) {
        truncate(kept);
    }
}

void TokenPool::min_p(float p, size_t min_keep) {
    if (p <= 0.0f) {
        return;
    }
    const float  log_p = std::log(p);
    const size_t n     = size();
    const size_t least = std::max<size_t>(1, min_keep);
    const float  max   = whole_ ? row_->max() : kernels().max(list_.logits.data(),
                                                              (int32_t) list_.size());
    const float  bound = scaled(max) + log_p;
    spare_.clear();
    if (whole_) {
        // A little lower than the bound divided back, then exactly.
        const float reach = -log_p / scale_;
        row_->at_least(max - reach - 1e-5f * (std::fabs(max) + reach), spare_);
        for (float & logit : spare_.logits) {
            logit = scaled(logit);
        }
    } else {
        spare_ = list_;
    }
    spare_.keep_at_least(bound);
    if (spare_.size() < least) {
        top_k((int32_t) std::min(least, n));
        return;
    }
    std::swap(list_, spare_);
    const bool was_whole = whole_;
    whole_ = false;
    dead_  = 0;
    divisors_.clear();
    scale_ = 1.0f;
    if (was_whole && sorted_) {
        sorted_ = false;
        sort();
    }
}

void TokenPool::typical(float p, size_t min_keep) {
    if (p >= 1.0f) {
        return;
    }
    const size_t n = size();
    double sum = 0.0, dot = 0.0;
    // x = (logit - max) * scale; a token's surprise equals the entropy where x is dot / sum.
    if (!whole_) {
        sort();
        const float max = list_.logits[0];
        kernels().entropy_sums(list_.logits.data(), (int32_t) list_.size(), max, 1.0f, sum, dot);
        keep_nearest(max, dot / sum, p * sum, min_keep);
        return;
    }
    const float max = row_->max(), max_scaled = scaled(max);
    kernels().entropy_sums(row_->data(), row_->n(), max, scale_, sum, dot);
    scores_.resize((size_t) row_->n());
    kernels().closeness(row_->data(), row_->n(), (float) (max + dot / sum / scale_), scale_,
                        scores_.data());
    score_row_.open(scores_.data(), row_->n());
    // The nearest by a rounded score, some more than enough; then exactly.
    for (int32_t k : {64, 512, 4096, score_row_.n()}) {
        score_row_.top(k, list_);
        list_.drop_tail(minus_infinity);
        for (size_t i = 0; i < list_.size(); ++i) {
            list_.logits[i] = row_->data()[list_.ids[i]];
        }
        weigh_against(max, scale_);
        const size_t kept = count_to(p * sum, min_keep, true);
        if (kept > 0) {
            list_.resize(std::min(list_.size(), kept + 64));
            break;
        }
    }
    dead_ = n - list_.size();
    scale_list();
    sorter_.sort(list_);
    keep_nearest(max_scaled, dot / sum, p * sum, min_keep);
}

// Of a sorted list, keeps those whose logit - max is nearest `centre`, nearest first, until their
// weights exceed `target`.
void TokenPool::keep_nearest(float max, double centre, double target, size_t min_keep) {
    const auto distance = [&](int32_t i) {
        return std::fabs((double) (list_.logits[(size_t) i] - max) - centre);
    };
    const size_t n = list_.size();
    spare_.resize(n);
    for (size_t i = 0; i < n; ++i) {
        spare_.ids[i]    = (int32_t) i;
        spare_.logits[i] = (float) -distance((int32_t) i);
    }
    sorter_.sort(spare_);
    // Rounded distances put neighbours in the wrong order at times.
    for (size_t i = 1; i < n; ++i) {
        for (size_t j = i; j > 0; --j) {
            const int32_t a = spare_.ids[j - 1], b = spare_.ids[j];
            const double  da = distance(a), db = distance(b);
            if (da < db || (da == db && a < b)) {
                break;
            }
            std::swap(spare_.ids[j - 1], spare_.ids[j]);
        }
    }
    for (size_t i = 0; i < n; ++i) {
        const size_t from = (size_t) spare_.ids[i];
        spare_.ids[i]    = list_.ids[from];
        spare_.logits[i] = list_.logits[from];
    }
    std::swap(list_, spare_);
    weigh_against(max, 1.0f);
    const size_t kept = count_to(target, min_keep, true);
    sorted_ = false;
    truncate(kept > 0 ? kept : std::max(n, min_keep));
}

void TokenPool::top_n_sigma(float n) {
    if (n <= 0.0f || size() <= 1) {
        return;
    }
    double  sum = 0.0, squares = 0.0;
    int32_t count = 0;
    const size_t n_all = size();
    if (whole_) {
        kernels().deviations(row_->data(), row_->n(), row_->max(), sum, squares, count);
    } else {
        const int32_t m = (int32_t) list_.size();
        kernels().deviations(list_.logits.data(), m, kernels().max(list_.logits.data(), m), sum,
                             squares, count);
    }
    const double mean  = sum / count;
    const double sigma = std::sqrt(std::max(0.0, squares / count - mean * mean));
    if (whole_) {
        const float max   = row_->max();
        const float bound = scaled(max) - (float) (n * sigma * scale_);
        const double reach = n * sigma;
        row_->at_least((float) (max - reach - 1e-5 * (std::fabs(max) + reach)), list_);
        dead_ = n_all - list_.size();
        scale_list();
        for (float & logit : list_.logits) {
            logit = logit < bound ? minus_infinity : logit;
        }
        if (sorted_) {
            sorter_.sort(list_);
        }
    } else {
        const float bound =
            kernels().max(list_.logits.data(), (int32_t) list_.size()) - (float) (n * sigma);
        for (float & logit : list_.logits) {
            logit = logit < bound ? minus_infinity : logit;
        }
    }
    drop_dead();
}

void TokenPool::exclude_top(float t, size_t min_keep) {
    const size_t n = size();
    // How many have probability >= t is known from the best ones, unless t lets everything in.
    size_t n_above = 0;
    const auto count_above = [&](double sum) {
        n_above = 0;
        while (n_above < weights_.size() && (float) (weights_[n_above] / sum) >= t) {
            ++n_above;
        }
        return n_above < weights_.size();
    };
    if (whole_ && t > 0.0f) {
        const double sum = row_->sum_exp(scale_);
        take_mass(sum, [&] { return count_above(sum); });
        sorted_ = true;
        if (n_above > 1 && n - (n_above - 1) >= min_keep) {
            for (size_t i = 0; i + 1 < n_above; ++i) {
                row_->edit(list_.ids[i], minus_infinity);
            }
            removed_ += n_above - 1;
        }
        return;
    }
    to_list();
    sort();
    if (!count_above(weigh()) && t <= 0.0f) {
        n_above = n;  // the dead are at least as probable as 0
    }
    if (n_above > 1 && n - (n_above - 1) >= min_keep) {
        const size_t dropped = n_above - 1;
        const size_t live    = std::min(dropped, list_.size());
        list_.ids.erase(list_.ids.begin(), list_.ids.begin() + (std::ptrdiff_t) live);
        list_.logits.erase(list_.logits.begin(), list_.logits.begin() + (std::ptrdiff_t) live);
        dead_ -= dropped - live;
    }
}

// Keeps what is at least `bound` without making a list of it: mu grows while the text surprises less
// than wanted, and lets nearly all in, but a draw needs the best ones only.
void TokenPool::keep_from(float bound, double sum) {
    floor_     = std::max(bound, -FLT_MAX);
    floor_sum_ = sum;
    sorted_    = true;
}

void TokenPool::mirostat(float mu, int32_t n_vocab, int32_t m) {
    const size_t n = size();
    if (whole_) {
        row_->top((int32_t) std::min<size_t>((size_t) m, n), spare_);
        for (float & logit : spare_.logits) {
            logit = scaled(logit);
        }
    } else {
        sort();
        spare_ = list_;
    }
    // In floats and through probabilities, as llama.cpp: a small difference here changes k.
    const auto weight = [&](size_t i) {
        return i < spare_.size() ? std::exp(spare_.logits[i] - spare_.logits[0]) : 0.0f;
    };
    float sum_tb = 0.0f, sum_tt = 0.0f;
    for (size_t i = 0; i + 1 < (size_t) m && i + 1 < n; ++i) {
        const float t = std::log((float) (i + 2) / (float) (i + 1));
        const float b = std::log(weight(i) / weight(i + 1));
        sum_tb += t * b;
        sum_tt += t * t;
    }
    const float s       = sum_tb / sum_tt;
    const float epsilon = s - 1.0f;
    const float k = std::pow(epsilon * std::pow(2.0f, mu) /
                                 (1.0f - std::pow((float) n_vocab, -epsilon)),
                             1.0f / s);
    // What does not fit an int becomes INT_MIN on x86, and so 1.
    const int32_t kept = k >= 1.0f && k < 2147483648.0f ? (int32_t) k : 1;
    if (whole_ && kept > most_to_sort && (size_t) kept < n) {
        const float bound = row_->kth(kept);
        keep_from(bound, kernels().sum_exp_above(row_->data(), row_->n(), row_->max(), scale_,
                                                 bound));
        return;
    }
    top_k(kept);
}

void TokenPool::mirostat_v2(float mu) {
    const auto cut = [&](double sum) {
        size_t kept = 0;
        while (kept < weights_.size() && !(-std::log2((float) (weights_[kept] / sum)) > mu)) {
            ++kept;
        }
        return kept;
    };
    size_t kept = 0;
    if (whole_) {
        const float  max   = row_->max();
        const double sum   = row_->sum_exp(scale_);
        const double reach = (mu * 0.6931471805599453 - std::log(sum)) / scale_;
        const float  bound = (float) (max - std::max(0.0, reach));
        // What is cut weighs less than n * 2^-mu: where that is nothing, the sum is known.
        const bool    cuts_nothing = row_->n() * std::exp2(-mu) < 1e-6f;
        const int32_t n_tiles      = row_->n_tiles_at_least(bound);
        if (n_tiles > most_to_sort || (cuts_nothing && n_tiles > 1)) {
            keep_from(bound, cuts_nothing ? sum
                                          : kernels().sum_exp_above(row_->data(), row_->n(), max,
                                                                    scale_, bound));
            return;
        }
        // A little more, then exactly.
        row_->at_least((float) (bound - 1e-5 * (std::fabs(max) + std::fabs(reach))), list_);
        sorter_.sort(list_);
        weigh_against(max, scale_);
        kept = cut(sum);
        dead_ = 0;
        scale_list();
        sorted_ = true;
    } else {
        sort();
        kept = cut(weigh());
    }
    truncate(std::max<size_t>(1, kept));
}

}  // namespace llama_crab
