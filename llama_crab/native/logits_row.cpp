#include "logits_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

#include "row_kernels.h"

namespace llama_crab {

namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();
constexpr float bins_per_1     = 64.0f;
constexpr int32_t n_bins       = 2048;

// A larger logit gives a smaller key; equal logits, -0 and +0 too, compare by id.
uint64_t key_of(float logit, int32_t id) {
    const float plain = logit + 0.0f;
    uint32_t    bits;
    std::memcpy(&bits, &plain, sizeof(bits));
    const uint32_t ascending = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t) ~ascending << 32 | (uint32_t) id;
}

float logit_of(uint64_t key) {
    const uint32_t ascending = ~(uint32_t) (key >> 32);
    const uint32_t bits      = ascending & 0x80000000u ? ascending & 0x7fffffffu : ~ascending;
    float          logit;
    std::memcpy(&logit, &bits, sizeof(logit));
    return logit;
}

// By the logit's 32 bits, `Bits` at a time; stable, so equal logits keep their order.
template <int Bits>
void radix_sort(std::vector<uint64_t> & keys, std::vector<uint64_t> & spare) {
    spare.resize(keys.size());
    for (int shift = 32; shift < 64; shift += Bits) {
        constexpr uint32_t mask = (1u << Bits) - 1;
        uint32_t           begins[1 << Bits] = {};
        for (uint64_t key : keys) {
            ++begins[(uint32_t) (key >> shift) & mask];
        }
        uint32_t at = 0;
        for (uint32_t & begin : begins) {
            at += std::exchange(begin, at);
        }
        for (uint64_t key : keys) {
            spare[begins[(uint32_t) (key >> shift) & mask]++] = key;
        }
        keys.swap(spare);
    }
}

}  // namespace

void ListSorter::load(const TokenList & list) {
    keys_.resize(list.size());
    for (size_t i = 0; i < list.size(); ++i) {
        keys_[i] = key_of(list.logits[i], list.ids[i]);
    }
}

void ListSorter::store(TokenList & list, size_t n) const {
    list.resize(n);
    for (size_t i = 0; i < n; ++i) {
        list.ids[i]    = (int32_t) (uint32_t) keys_[i];
        list.logits[i] = logit_of(keys_[i]);
    }
}

void ListSorter::sort(TokenList & list) {
    load(list);
    // The radix sorts take equal logits as they come, which is by id from a row only.
    const size_t n = keys_.size();
    if (n < 96 || !std::is_sorted(list.ids.begin(), list.ids.end())) {
        std::sort(keys_.begin(), keys_.end());
    } else if (n < 4096) {
        radix_sort<8>(keys_, spare_);
    } else {
        radix_sort<11>(keys_, spare_);
    }
    store(list, n);
}

void ListSorter::keep_best(TokenList & list, size_t k) {
    if (k < list.size() && list.size() >= 4096 && list.size() > 2 * k) {
        load(list);
        const auto end = keys_.begin() + (std::ptrdiff_t) k;
        std::nth_element(keys_.begin(), end, keys_.end());
        std::sort(keys_.begin(), end);
        store(list, k);
    } else {
        sort(list);
        list.resize(std::min(k, list.size()));
    }
}

bool LogitsRow::open(float * data, int32_t n) {
    data_ = data;
    n_    = n;
    replaced_.clear();
    dirty_tiles_.clear();
    tiles_.resize((size_t) (n + tile_len - 1) / tile_len);
    blocks_.resize((size_t) (n + block_len - 1) / block_len);
    if (capacity_ < n) {
        // One more: the collecting loop writes an entry before it knows whether it counts.
        hit_tiles_.reset(new int32_t[tiles_.size() + 1]);
        found_ids_.reset(new int32_t[(size_t) n + 1]);
        found_.reset(new float[(size_t) n + 1]);
        capacity_ = n;
    }
    bool has_nan = false;
    max_ = kernels().tile_max(data, n, tiles_.data(), has_nan);
    return !has_nan && std::isfinite(max_);
}

void LogitsRow::put(int32_t id, float logit) {
    const float old = data_[id];
    data_[id] = logit;
    float & best = tiles_[(size_t) (id / tile_len)];
    if (logit >= best) {
        best = logit;
        max_ = std::max(max_, logit);
    } else if (old >= best) {
        // The tile's maximum has gone; others of it may follow, so it is looked up when needed.
        dirty_tiles_.push_back(id / tile_len);
    }
}

void LogitsRow::edit(int32_t id, float logit) {
    replaced_.emplace_back(id, data_[id]);
    put(id, logit);
}

void LogitsRow::undo() {
    for (; !replaced_.empty(); replaced_.pop_back()) {
        put(replaced_.back().first, replaced_.back().second);
    }
}

void LogitsRow::refresh() {
    if (dirty_tiles_.empty()) {
        return;
    }
    const RowKernels & kernel = kernels();
    for (int32_t tile : dirty_tiles_) {
        const int32_t begin = tile * tile_len;
        tiles_[(size_t) tile] = kernel.max(data_ + begin, std::min(tile_len, n_ - begin));
    }
    dirty_tiles_.clear();
    max_ = kernel.max(tiles_.data(), (int32_t) tiles_.size());
}

int32_t LogitsRow::argmax() {
    const RowKernels & kernel = kernels();
    const float        best   = max();
    const int32_t tile = kernel.first_at_least(tiles_.data(), 0, (int32_t) tiles_.size(), best);
    return kernel.first_at_least(data_, tile * tile_len, n_, best);
}

void LogitsRow::at_least(float bound, TokenList & out) {
    refresh();
    const RowKernels & kernel = kernels();
    const int32_t n_hit = kernel.collect(tiles_.data(), 0, (int32_t) tiles_.size(), bound,
                                         hit_tiles_.get(), found_.get());
    int32_t m = 0;
    for (int32_t hit = 0; hit < n_hit; ++hit) {
        const int32_t begin = hit_tiles_[(size_t) hit] * tile_len;
        m += kernel.collect(data_, begin, std::min(n_, begin + tile_len), bound,
                            found_ids_.get() + m, found_.get() + m);
    }
    out.ids.assign(found_ids_.get(), found_ids_.get() + m);
    out.logits.assign(found_.get(), found_.get() + m);
}

int32_t LogitsRow::n_tiles_at_least(float bound) {
    refresh();
    return kernels().count_at_least(tiles_.data(), (int32_t) tiles_.size(), bound);
}

void LogitsRow::top(int32_t k, TokenList & out) {
    refresh();
    k = std::min(k, n_);
    if (k < (int32_t) tiles_.size()) {
        at_least(bound_by_tiles(k), out);
    } else if (k < n_) {
        at_least(bound_by_histogram(k), out);
    } else {
        at_least(minus_infinity, out);
    }
    sorter_.keep_best(out, (size_t) k);
}

// A bound that at least k tile maxima reach, so k logits too, and few more: found by counting,
// which has no branch to mispredict.
float LogitsRow::bound_by_tiles(int32_t k) {
    float   above = max_, bound = max_;
    int32_t n     = 0;
    for (float step = 4.0f; n < k; step *= 4.0f) {
        above = bound;
        bound = max_ - step;
        if (!std::isfinite(bound)) {
            return minus_infinity;
        }
        n = n_tiles_at_least(bound);
    }
    for (int32_t i = 0; i < 16 && n > k + k / 4; ++i) {
        const float   middle   = bound + (above - bound) / 2.0f;
        const int32_t n_middle = n_tiles_at_least(middle);
        if (n_middle >= k) {
            bound = middle;
            n     = n_middle;
        } else {
            above = middle;
        }
    }
    return bound;
}

// Bins of width 1/64 below the maximum; the last one takes the rest.
int32_t LogitsRow::bin_of_rank(int32_t k, int32_t & n_above) {
    histogram_.assign(n_bins, 0);
    for (int32_t id = 0; id < n_; ++id) {
        ++histogram_[(size_t) bin_of(data_[id])];
    }
    n_above = 0;
    int32_t bin = 0;
    while (bin < n_bins - 1 && n_above + histogram_[(size_t) bin] < k) {
        n_above += histogram_[(size_t) bin++];
    }
    return bin;
}

int32_t LogitsRow::bin_of(float logit) const {
    const float below = (max_ - logit) * bins_per_1;
    return below < (float) (n_bins - 1) ? (int32_t) below : n_bins - 1;
}

// A bound that at least k logits reach, and few more.
float LogitsRow::bound_by_histogram(int32_t k) {
    int32_t       n_above = 0;
    const int32_t bin     = bin_of_rank(k, n_above);
    // One bin lower than needed: the subtraction rounds.
    return bin == n_bins - 1 ? minus_infinity : max_ - (float) (bin + 2) / bins_per_1;
}

float LogitsRow::kth(int32_t k) {
    refresh();
    int32_t       n_above = 0;
    const int32_t bin     = bin_of_rank(k, n_above);
    bin_.clear();
    for (int32_t id = 0; id < n_; ++id) {
        if (bin_of(data_[id]) == bin) {
            bin_.push_back(data_[id]);
        }
    }
    const auto at = bin_.begin() + (k - n_above - 1);
    std::nth_element(bin_.begin(), at, bin_.end(), std::greater<float>());
    return *at;
}

// As bound_by_histogram, for a sum of weights instead of a number of logits.
float LogitsRow::bound_by_mass(double target, float scale) {
    const float       bins_scaled = bins_per_1 * scale;
    double            mass[n_bins] = {};
    float             weight[block_len];
    for (int32_t begin = 0; begin < n_; begin += block_len) {
        const int32_t count = std::min(block_len, n_ - begin);
        kernels().exps(data_ + begin, count, max(), scale, weight);
        for (int32_t j = 0; j < count; ++j) {
            const float below = (max_ - data_[begin + j]) * bins_scaled;
            mass[below < n_bins - 1 ? (size_t) below : n_bins - 1] += weight[j];
        }
    }
    double have = 0.0;
    for (int32_t bin = 0; bin < n_bins - 1; ++bin) {
        have += mass[bin];
        if (have >= target) {
            return max_ - (float) (bin + 2) / bins_scaled;
        }
    }
    return minus_infinity;
}

double LogitsRow::sum_exp(float scale) {
    return kernels().sum_exp(data_, n_, max(), scale, blocks_.data());
}

int32_t LogitsRow::find(double target, float scale) const {
    double  run   = 0.0;
    size_t  block = 0;
    int32_t last  = -1;  // with a weight: rounding may leave the target beyond all of them
    float   weight[block_len];
    for (; block < blocks_.size(); ++block) {
        const bool is_last = block + 1 == blocks_.size();
        if (run + blocks_[block] < target && !is_last) {
            run += blocks_[block];
            continue;
        }
        const int32_t begin = (int32_t) block * block_len;
        const int32_t count = std::min(block_len, n_ - begin);
        kernels().exps(data_ + begin, count, max_, scale, weight);
        for (int32_t j = 0; j < count; ++j) {
            run += weight[j];
            if (weight[j] > 0.0f) {
                last = begin + j;
                if (run >= target) {
                    return last;
                }
            }
        }
    }
    return last;
}

float LogitsRow::log_sum_exp() {
    return max() + (float) std::log(sum_exp(1.0f));
}

}  // namespace llama_crab
