#include "draft_control.h"

#include <algorithm>

namespace llama_crab {

namespace {

// Trials of agreement that count, in a sequence and over all.
constexpr double memory_of_sequence = 32.0, memory_of_all = 256.0;
// What a sequence's own trials weigh against those of all, and all against the guess.
constexpr double weight_of_all = 6.0, weight_of_guess = 4.0;
// A draft must promise that much more than a plain batch: estimates err, and plain is certain.
constexpr double least_gain = 1.05;
// A trial of a length whose cost is not known must promise that much more than the best known one.
constexpr double least_hope = 1.1;
// Tokens of a draft that are less likely to be reached are not considered.
constexpr double least_chance = 0.02;
// The share of the decoding time that trials may lose, and how many plain batches it may add up to;
// that much is there at the beginning.
constexpr double share_of_trials = 0.01, most_allowance = 4.0;
// Batches of one size after which its cost counts as known, and batches after which it is doubted.
constexpr int64_t n_known = 3, n_stale = 2000;
// Batches after which a plain one is made, when all have drafts: what they gain is against its cost.
constexpr int64_t n_without_plain = 100;
// How fast the unit and the factors follow what is seen.
constexpr double weight_of_unit = 0.1, weight_of_factor = 0.03, weight_of_share = 0.02;
constexpr double weight_of_gain = 1.0 / 32.0;

void blend(double & value, double seen, double weight) {
    value += weight * (seen - value);
}

}  // namespace

size_t DraftAcceptance::class_of(int32_t agreed) {
    size_t k = 0;
    while (k + 1 < n_classes && agreed >= smallest_of(k + 1)) {
        ++k;
    }
    return k;
}

int32_t DraftAcceptance::smallest_of(size_t k) {
    static constexpr int32_t smallest[n_classes] = {1, 2, 3, 4, 5, 6, 7, 9, 13, 17, 25, 33};
    return smallest[k];
}

void DraftAcceptance::observe(DraftOrigin origin, int32_t agreed, bool held, double memory) {
    const size_t k = class_of(agreed);
    float & tried  = tried_[(size_t) origin][k];
    float & hits   = held_[(size_t) origin][k];
    const float keep = tried >= (float) memory ? (float) (1.0 - 1.0 / memory) : 1.0f;
    tried = tried * keep + 1.0f;
    hits  = hits * keep + (held ? 1.0f : 0.0f);
}

double DraftControl::acceptance(DraftOrigin origin, int32_t agreed,
                                const DraftAcceptance * of_sequence) const {
    const size_t k = DraftAcceptance::class_of(agreed);
    // Before anything is known: a short agreement is often chance, a long one is a copy; a model was
    // made to agree.
    const double guess = origin == DraftOrigin::model ? 0.6 : 1.0 - 0.8 / (1.0 + 0.35 * (double) k);
    const double all = (all_.held(origin, k) + weight_of_guess * guess) /
                       (all_.tried(origin, k) + weight_of_guess);
    if (of_sequence == nullptr) {
        return all;
    }
    return (of_sequence->held(origin, k) + weight_of_all * all) /
           (of_sequence->tried(origin, k) + weight_of_all);
}

void DraftControl::observe_token(DraftOrigin origin, DraftAcceptance & of_sequence, int32_t agreed,
                                 bool held) {
    of_sequence.observe(origin, agreed, held, memory_of_sequence);
    all_.observe(origin, agreed, held, memory_of_all);
}

bool DraftControl::known(int32_t n_tokens, bool hopeful) const {
    const Cost & cost = costs_[(size_t) n_tokens];
    return hopeful ? cost.n >= n_known && n_batches_ - cost.last < n_stale : cost.n > 0;
}

// Between sizes that were seen the cost is a line, beyond them it grows in proportion. Hopeful, it does
// not grow at all up to sizes that were seen too seldom, or too long ago, to be believed.
double DraftControl::factor(int32_t n_tokens, bool hopeful) const {
    n_tokens = std::min(n_tokens, n_most);
    if (known(n_tokens, hopeful)) {
        return costs_[(size_t) n_tokens].factor;
    }
    int32_t low = n_tokens - 1, high = n_tokens + 1;
    while (low > 0 && !known(low, hopeful)) {
        --low;
    }
    while (high <= largest_ && !known(high, hopeful)) {
        ++high;
    }
    const double below = low > 0 ? costs_[(size_t) low].factor : 0.0;
    const double above = high <= largest_ ? costs_[(size_t) high].factor : 0.0;
    if (hopeful && low > 0) {
        return high <= largest_ ? std::min(below, above) : below;
    }
    if (low > 0 && high <= largest_) {
        return below + (above - below) * (n_tokens - low) / (high - low);
    }
    if (low > 0) {
        return below * n_tokens / low;
    }
    return hopeful && high > largest_ ? factor(n_tokens, false) : above;
}

double DraftControl::cost_us(int32_t n_tokens) const {
    return unit_ * factor(n_tokens, false);
}

// As llama.cpp lays a batch out, see llama_batch_allocr::split_equal: neighbouring sequences, as many
// tokens of each as the shortest has left.
void DraftControl::micro_batches(const std::vector<int32_t> & layout,
                                 std::vector<int32_t> & sizes) const {
    sizes.clear();
    if (!split_) {
        int32_t n = 0;
        for (int32_t length : layout) {
            n += length;
        }
        sizes.push_back(n);
        return;
    }
    left_ = layout;
    for (size_t first = 0; first < left_.size();) {
        if (left_[first] == 0) {
            ++first;
            continue;
        }
        size_t  end = first;
        int32_t n   = left_[first];
        for (; end < left_.size() && left_[end] > 0; ++end) {
            n = std::min(n, left_[end]);
        }
        for (size_t i = first; i < end; ++i) {
            left_[i] -= n;
        }
        sizes.push_back(n * (int32_t) (end - first));
    }
}

double DraftControl::layout_cost(const std::vector<int32_t> & layout, bool hopeful) const {
    micro_batches(layout, sizes_);
    double sum = 0.0;
    for (int32_t n : sizes_) {
        sum += factor(n, hopeful);
    }
    return sum * unit_;
}

// Keeps these lengths if they promise more tokens per microsecond than the best so far; returns what
// the batch would cost.
double DraftControl::weigh(const std::vector<int32_t> & lengths, bool hopeful, Choice & best) {
    layout_ = *base_;
    double tokens = 0.0, drafting = 0.0;
    for (int32_t n : layout_) {
        tokens += n > 0;
    }
    for (size_t i = 0; i < lengths.size(); ++i) {
        const DraftOffer & offer = (*offers_)[i];
        layout_[(size_t) offer.slot] += lengths[i];
        for (int32_t k = 0; k < lengths[i]; ++k) {
            tokens += chances_[i][(size_t) k];
        }
        drafting += lengths[i] * drafting_us_[(size_t) offer.origin];
    }
    const double cost = layout_cost(layout_, hopeful) + drafting;
    if (tokens / cost > best.rate) {
        best.rate    = tokens / cost;
        best.cost    = cost;
        best.lengths = lengths;
    }
    return cost;
}

// Makes `lengths_` one step longer. One micro-batch costs by its tokens, so the likeliest goes next,
// whoever's it is; with streams unequal lengths cost a micro-batch each, so all get one more.
bool DraftControl::lengthen(int32_t n_room) {
    int32_t sum = 0;
    for (int32_t n : lengths_) {
        sum += n;
    }
    size_t likeliest = lengths_.size();
    for (size_t i = 0; i < lengths_.size(); ++i) {
        if ((size_t) lengths_[i] == chances_[i].size()) {
            continue;
        }
        if (split_) {
            likeliest = i;
            ++lengths_[i];
            ++sum;
        } else if (likeliest == lengths_.size() ||
                   chances_[i][(size_t) lengths_[i]] >
                       chances_[likeliest][(size_t) lengths_[likeliest]]) {
            likeliest = i;
        }
    }
    if (likeliest == lengths_.size()) {
        return false;
    }
    if (!split_) {
        ++lengths_[likeliest];
        ++sum;
    }
    return sum <= n_room;
}

void DraftControl::choose(const std::vector<int32_t> & base, const std::vector<DraftOffer> & offers,
                          int32_t n_room, std::vector<int32_t> & lengths) {
    lengths.assign(offers.size(), 0);
    expected_now_ = 1.0;
    trial_        = false;
    bool fixed    = false;
    for (size_t i = 0; i < offers.size(); ++i) {
        if (offers[i].fixed) {
            lengths[i] = std::max(0, std::min(offers[i].n_max, n_room));
            n_room -= lengths[i];
            fixed = true;
        }
    }
    int32_t n_plain = 0;
    for (int32_t n : base) {
        n_plain += n;
    }
    if (offers.empty() || fixed || unit_ == 0.0 ||
        n_batches_ - costs_[(size_t) std::min(n_plain, n_most)].last > n_without_plain) {
        return;
    }
    base_   = &base;
    offers_ = &offers;
    chances_.resize(offers.size());
    for (size_t i = 0; i < offers.size(); ++i) {
        chances_[i].clear();
        double chance = 1.0;
        for (int32_t k = 0; k < offers[i].n_max; ++k) {
            chance *= acceptance(offers[i].origin, offers[i].agreed + k, offers[i].acceptance);
            if (chance < least_chance) {
                break;
            }
            chances_[i].push_back(chance);
        }
    }
    Choice plain;
    weigh(lengths, false, plain);
    // What drafts lost lately they must promise on top.
    Choice best = plain, trial = plain;
    best.rate *= least_gain + 2.0 * std::max(0.0, 1.0 - measured_gain());
    lengths_ = lengths;
    while (lengthen(n_room)) {
        const double cost = weigh(lengths_, false, best);
        if (cost - plain.cost <= allowance_us_) {
            weigh(lengths_, true, trial);
        }
    }
    const bool drafts = best.lengths != lengths;
    if (trial.rate > least_hope * (drafts ? best.rate : plain.rate)) {
        best   = trial;
        trial_ = true;
    }
    if (drafts || trial_) {
        lengths       = best.lengths;
        expected_now_ = best.rate / plain.rate;
    }
}

void DraftControl::observe_batch(const std::vector<int32_t> & layout, int32_t n_drafted,
                                 int32_t n_slots, int32_t n_given, int64_t us) {
    micro_batches(layout, sizes_);
    const double seen = std::max(1.0, (double) us);
    ++n_batches_;
    saved_us_ = 0;
    if (unit_ == 0.0) {
        if (sizes_.size() == 1 && n_drafted == 0) {
            unit_ = worth_us_ = spent_us_ = seen;
            allowance_us_ = most_allowance * seen;
            largest_      = std::min(sizes_[0], n_most);
            costs_[(size_t) largest_] = {1.0, 1, n_batches_, 1.0};
        }
        return;
    }
    const double plain_us = unit_ * factor(n_slots, false);
    if (n_drafted > 0) {
        const double worth = plain_us * n_given / n_slots;
        saved_us_ = (int64_t) (worth - seen);
        blend(worth_us_, worth, weight_of_gain);
        blend(spent_us_, seen, weight_of_gain);
        blend(expected_gain_, expected_now_, weight_of_gain);
        if (trial_) {
            allowance_us_ += std::min(0.0, worth - seen);
        }
    }
    allowance_us_ = std::min(allowance_us_ + share_of_trials * seen, most_allowance * plain_us);

    double sum = 0.0;
    bool   all_known = true;
    for (int32_t n : sizes_) {
        sum += factor(n, false);
        all_known &= costs_[(size_t) std::min(n, n_most)].n >= n_known;
    }
    if (sizes_.size() == 1) {
        const int32_t n = std::min(sizes_[0], n_most);
        Cost &        cost = costs_[(size_t) n];
        largest_ = std::max(largest_, n);
        // One that is far off is more likely the machine's than its own.
        const double now = cost.n < n_known ? seen / unit_
                                            : std::clamp(seen / unit_, 0.5 * cost.factor,
                                                         2.0 * cost.factor);
        ++cost.n;
        cost.last = n_batches_;
        // Where nearly all batches have this size there is nothing to compare it with: the unit
        // alone follows.
        for (int32_t k = 1; k <= largest_; ++k) {
            blend(costs_[(size_t) k].share, k == n ? 1.0 : 0.0, weight_of_share);
        }
        blend(cost.factor, now,
              std::max(1.0 / (double) cost.n, weight_of_factor * (1.0 - cost.share)));
    }
    if (all_known) {
        blend(unit_, std::clamp(seen / sum, 0.5 * unit_, 2.0 * unit_), weight_of_unit);
    }
}

void DraftControl::observe_drafting(DraftOrigin origin, int32_t n_tokens, int64_t us) {
    double & known = drafting_us_[(size_t) origin];
    if (n_tokens > 0) {
        blend(known, (double) us / n_tokens, known == 0.0 ? 1.0 : 0.1);
    }
}

}  // namespace llama_crab
