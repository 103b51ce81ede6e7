// The tokens that a sampler chain has still in play.
//
// A pool starts as the whole row and becomes a list at the first stage that truncates; until then
// a temperature is a pending factor and selections use the row's tile maxima. Tokens with a logit
// of -inf are out ("dead"), but llama.cpp's stages still count them, so their number is kept.
//
// Order matters to whoever draws: by id until a stage sorts, as in llama.cpp's candidate array.
// Sums are taken in double; ties fall to the smaller id.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "logits_row.h"
#include "row_kernels.h"

namespace llama_crab {

class TokenPool {
public:
    // Starts over with every token of `row`, with those of a mask, or with a single one of n that
    // needs no row. The row is edited, and must be undone by its owner.
    void open(LogitsRow & row);
    void open_masked(LogitsRow & row, const std::vector<uint32_t> & bits);
    void open_listed(LogitsRow & row, const std::vector<int32_t> & ids);
    void open_single(int32_t id, int32_t n);

    // No token can be chosen any more.
    bool   empty();
    // Tokens in play, the dead included.
    size_t size() const;

    // Stages, as in llama.h. Values out of their useful range do nothing.
    void temp(float t);
    void temp_ext(float t, float delta, float exponent);
    void top_k(int32_t k);
    void top_p(float p, size_t min_keep);
    void top_p_min_p(float top, float min);  // one after the other, both with min_keep <= 1
    void min_p(float p, size_t min_keep);
    void typical(float p, size_t min_keep);
    void top_n_sigma(float n);
    // Drops all tokens of probability >= t but the least probable of them.
    void exclude_top(float t, size_t min_keep);
    void mirostat(float mu, int32_t n_vocab, int32_t m);
    void mirostat_v2(float mu);

    // Replaces logits: `change(logit, amount)` for each (token, amount) in play.
    template <typename Change>
    void adjust(const std::vector<std::pair<int32_t, float>> & amounts, bool keeps_sorted,
                Change change);

    struct Choice {
        int32_t id;
        double  p;
    };
    // The best token, and one drawn at `u` in [0, 1): the first at which the sum of probabilities,
    // taken in the pool's order, reaches u.
    Choice best();
    Choice draw(double u);
    // The same after the transform of adaptive_p; `p` is the probability before it.
    Choice draw_adaptive(double u, float target);

    // As a list, to be looked at or changed by somebody else.
    TokenList &                as_list();
    void                       set_list(bool sorted);  // after it was changed; it has the dead too
    bool                       sorted() const { return sorted_; }
    size_t                     n_dead() const { return dead_; }
    // Of a list: its weights exp(logit - max), whose sum is returned.
    double weigh();
    // Of a list that was weighed or drawn from.
    std::vector<float> probabilities() const;

private:
    float  scaled(float logit) const;
    void   scale_list();
    void   to_list();
    void   drop_dead();
    void   sort();
    void   truncate(size_t n);
    void   weigh_against(float max, float scale);
    void   keep_nearest(float max, double centre, double target, size_t min_keep);
    void   keep_single(int32_t id, float logit);
    template <typename Enough> void take_mass(double target, Enough enough);
    void   keep_from(float bound, double sum);
    size_t count_to(double target, size_t min_keep, bool beyond) const;
    void   use_scratch();

    LogitsRow *           row_   = nullptr;
    bool                  whole_ = true;
    bool                  sorted_ = false;
    size_t                removed_ = 0;  // from a whole row, by exclude_top
    size_t                dead_ = 0;     // of a list
    std::vector<float>    divisors_;     // pending temperatures of a whole row
    float                 scale_ = 1.0f;
    float                 floor_ = 0.0f;  // of a whole row: what is below was cut by mirostat,
    double                floor_sum_ = 0.0;  // the sum of the weights that were not
    TokenList             list_;
    std::vector<float>    weights_;
    std::vector<float>    scratch_, scores_;
    TokenList             spare_;
    LogitsRow             scratch_row_, score_row_;
    std::vector<std::pair<int32_t, float>> amounts_;
    ListSorter            sorter_;
};

template <typename Change>
void TokenPool::adjust(const std::vector<std::pair<int32_t, float>> & amounts, bool keeps_sorted,
                       Change change) {
    if (whole_ && sorted_ && !keeps_sorted) {
        to_list();  // the order stays, though it will no longer be that of the logits
    }
    if (whole_) {
        use_scratch();
        for (const auto & [id, amount] : amounts) {
            if (id < row_->n()) {
                row_->edit(id, change(row_->data()[id], amount));
            }
        }
        return;
    }
    amounts_ = amounts;
    std::sort(amounts_.begin(), amounts_.end());
    for (size_t i = 0; i < list_.size(); ++i) {
        const auto at = std::lower_bound(
            amounts_.begin(), amounts_.end(), list_.ids[i],
            [](const std::pair<int32_t, float> & entry, int32_t id) { return entry.first < id; });
        if (at != amounts_.end() && at->first == list_.ids[i]) {
            list_.logits[i] = change(list_.logits[i], at->second);
        }
    }
    drop_dead();
    if (sorted_ && keeps_sorted) {
        sorted_ = false;
        sort();
    } else {
        sorted_ = false;
    }
}

// Fills the list with the row's best tokens, weighed, until their weights reach `target`.
// Logits are the row's.
template <typename Enough> void TokenPool::take_mass(double target, Enough enough) {
    const auto weigh_row = [&] {
        weigh_against(row_->max(), scale_);
        return enough();
    };
    for (int32_t k : {64, 512}) {
        row_->top(k, list_);
        list_.drop_tail(-std::numeric_limits<float>::infinity());
        if (weigh_row() || (int32_t) list_.size() < k) {
            return;
        }
    }
    for (float bound : {row_->bound_by_mass(target, scale_), -std::numeric_limits<float>::max()}) {
        row_->at_least(std::max(bound, -std::numeric_limits<float>::max()), list_);
        sorter_.sort(list_);
        if (weigh_row()) {
            return;
        }
    }
}

}  // namespace llama_crab
