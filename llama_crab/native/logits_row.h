// One row of logits under work: the maxima of its tiles from a first pass, then selections that
// look only at tiles which can matter, and edits that can be taken back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace llama_crab {

// Tokens and their logits, in an order that the owner defines.
struct TokenList {
    std::vector<int32_t> ids;
    std::vector<float>   logits;

    size_t size() const { return ids.size(); }
    bool   empty() const { return ids.empty(); }
    void   clear() { resize(0); }
    void   resize(size_t n) {
        ids.resize(n);
        logits.resize(n);
    }
    // Drops the last entries that equal `logit`.
    void drop_tail(float logit) {
        while (!empty() && logits.back() == logit) {
            resize(size() - 1);
        }
    }
    // Keeps entries of at least `bound`, in their order; returns how many went.
    size_t keep_at_least(float bound) {
        const size_t n = size();
        size_t       m = 0;
        for (size_t i = 0; i < n; ++i) {
            ids[m]    = ids[i];
            logits[m] = logits[i];
            m += logits[i] >= bound;
        }
        resize(m);
        return n - m;
    }
    void push(int32_t id, float logit) {
        ids.push_back(id);
        logits.push_back(logit);
    }
};

// Orders by descending logit, ties by smaller id.
class ListSorter {
public:
    void sort(TokenList & list);
    // Leaves the k best only, in order.
    void keep_best(TokenList & list, size_t k);

private:
    void load(const TokenList & list);
    void store(TokenList & list, size_t n) const;

    std::vector<uint64_t> keys_, spare_;
};

class LogitsRow {
public:
    // Takes `data` (n >= 1 floats, writable, alive until the next open) and scans it. False when it
    // cannot be sampled: a NaN, a +inf or no finite value.
    bool open(float * data, int32_t n);

    float *       data() { return data_; }
    const float * data() const { return data_; }
    int32_t       n() const { return n_; }
    // The maximum; -inf when edits have banned every token.
    float max() {
        refresh();
        return max_;
    }

    // Replaces one logit. `undo` puts all replaced ones back.
    void edit(int32_t id, float logit);
    void undo();

    int32_t argmax();  // the smallest id with the maximum
    // The k best, descending, ties by smaller id.
    void top(int32_t k, TokenList & out);
    // The logit of rank k (1: the maximum).
    float kth(int32_t k);
    // All of at least `bound`, by id; and how many tiles have one.
    void at_least(float bound, TokenList & out);
    int32_t n_tiles_at_least(float bound);

    // A bound such that the weights exp((logit - max) * scale) of those it lets in reach `target`.
    float bound_by_mass(double target, float scale);

    // Sum of exp((logit - max) * scale), and the first id at which the sum, taken by id, reaches
    // `target`. `find` needs the latest sum_exp with the same scale and no edit in between.
    double  sum_exp(float scale);
    int32_t find(double target, float scale) const;

    // log(sum(exp(row))) of the row as it is.
    float log_sum_exp();

private:
    void  put(int32_t id, float logit);
    void  refresh();  // tile maxima and maximum after edits
    float bound_by_tiles(int32_t k);
    float bound_by_histogram(int32_t k);
    int32_t bin_of_rank(int32_t k, int32_t & n_above);
    int32_t bin_of(float logit) const;

    float *                                data_ = nullptr;
    int32_t                                n_    = 0;
    float                                  max_  = 0.0f;
    std::vector<float>                     tiles_;
    int32_t                                capacity_ = 0;
    // Written before it is known how much counts.
    std::unique_ptr<int32_t[]>             hit_tiles_, found_ids_;
    std::unique_ptr<float[]>               found_;
    std::vector<float>                     bin_;
    std::vector<double>                    blocks_;
    std::vector<std::pair<int32_t, float>> replaced_;
    std::vector<int32_t>                   dirty_tiles_, histogram_;
    ListSorter                             sorter_;
};

}  // namespace llama_crab
