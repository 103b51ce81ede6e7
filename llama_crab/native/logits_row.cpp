#include "logits_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

// One clone per ISA level, picked at load by CPUID. Other platforms compile the loops once; their
// baseline (NEON on arm64) already has the vectors.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#    define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#    define MULTIVERSION
#endif

namespace llama_crab {

namespace {

// Independent partial results per lane let the compiler vectorise without reassociating floats.
constexpr int32_t lanes = 32;

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

MULTIVERSION
float max_of(const float * row, int32_t n, bool & has_nan) {
    float   best[lanes];
    int32_t nan[lanes];
    for (int32_t j = 0; j < lanes; ++j) {
        best[j] = minus_infinity;
        nan[j]  = 0;
    }
    int32_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int32_t j = 0; j < lanes; ++j) {
            const float v = row[i + j];
            best[j] = v > best[j] ? v : best[j];
            nan[j] |= v != v;
        }
    }
    for (; i < n; ++i) {
        const float v = row[i];
        best[0] = v > best[0] ? v : best[0];
        nan[0] |= v != v;
    }
    float   max     = best[0];
    int32_t any_nan = nan[0];
    for (int32_t j = 1; j < lanes; ++j) {
        max = best[j] > max ? best[j] : max;
        any_nan |= nan[j];
    }
    has_nan = any_nan != 0;
    return max;
}

// First index whose value is >= bound, from `begin`; n when there is none.
MULTIVERSION
int32_t first_at_least(const float * row, int32_t begin, int32_t n, float bound) {
    int32_t i = begin;
    for (; i + lanes <= n; i += lanes) {
        int32_t hit = 0;
        for (int32_t j = 0; j < lanes; ++j) {
            hit |= row[i + j] >= bound;
        }
        if (hit != 0) {
            break;
        }
    }
    for (; i < n; ++i) {
        if (row[i] >= bound) {
            return i;
        }
    }
    return n;
}

// exp(x) for x <= 0 to about 2 ulp: 2^k from the exponent bits, 2^f from a polynomial (Cephes'
// expf coefficients). Below the range of normal floats the result is 0.
inline float exp_nonpositive(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float t = clamped * 1.44269504088896341f + 12582912.0f;
    const float k = t - 12582912.0f;
    const float f = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    int32_t bits;
    std::memcpy(&bits, &t, sizeof(bits));
    bits = (bits + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return x < -87.0f ? 0.0f : p * scale;
}

MULTIVERSION
double sum_exp(const float * row, int32_t n, float max) {
    // Blocks keep the float partial sums short; their totals are added in double.
    constexpr int32_t block = 4096;
    double total = 0.0;
    for (int32_t start = 0; start < n; start += block) {
        const int32_t end = std::min(n, start + block);
        float sum[lanes] = {};
        int32_t i = start;
        for (; i + lanes <= end; i += lanes) {
            for (int32_t j = 0; j < lanes; ++j) {
                sum[j] += exp_nonpositive(row[i + j] - max);
            }
        }
        for (; i < end; ++i) {
            sum[0] += exp_nonpositive(row[i] - max);
        }
        for (int32_t j = 0; j < lanes; ++j) {
            total += sum[j];
        }
    }
    return total;
}

}  // namespace

RowMax row_max(const float * row, int32_t n) {
    bool has_nan = false;
    const float max = max_of(row, n, has_nan);
    if (has_nan || max == minus_infinity || max == -minus_infinity) {
        return {max, -1};
    }
    return {max, first_at_least(row, 0, n, max)};
}

float row_log_sum_exp(const float * row, int32_t n, float max) {
    return max + (float) std::log(sum_exp(row, n, max));
}

void row_top_k(const float * row, int32_t n, int32_t k,
               std::vector<std::pair<int32_t, float>> & out) {
    out.clear();
    k = std::min(k, n);
    if (k <= 0) {
        return;
    }
    const auto better = [](const std::pair<int32_t, float> & a, const std::pair<int32_t, float> & b) {
        return a.second > b.second || (a.second == b.second && a.first < b.first);
    };
    // A heap of the k best so far with the worst on top; beyond a short start almost no entry
    // passes the vectorised test against that worst one.
    int32_t i = 0;
    for (; i < k; ++i) {
        out.emplace_back(i, row[i]);
    }
    std::make_heap(out.begin(), out.end(), better);
    while ((i = first_at_least(row, i, n, out.front().second)) < n) {
        const std::pair<int32_t, float> entry(i, row[i]);
        if (better(entry, out.front())) {
            std::pop_heap(out.begin(), out.end(), better);
            out.back() = entry;
            std::push_heap(out.begin(), out.end(), better);
        }
        ++i;
    }
    std::sort_heap(out.begin(), out.end(), better);
}

}  // namespace llama_crab
