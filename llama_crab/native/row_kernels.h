// Vectorised passes over a row of logits, one build per instruction set, chosen at run time.
//
// Rows hold finite values and -inf: NaN and +inf are refused by the first pass, `tile_max`.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace llama_crab {

constexpr int32_t tile_len  = 64;    // logits per entry of a row's tile maxima
constexpr int32_t block_len = 1024;  // logits per partial sum

struct RowKernels {
    const char * name;

    // Writes the maximum of every tile, returns that of the row.
    float (*tile_max)(const float * row, int32_t n, float * tiles, bool & has_nan);
    float (*max)(const float * row, int32_t n);
    int32_t (*count_at_least)(const float * row, int32_t n, float bound);
    // First index >= begin whose value is >= bound; n when there is none.
    int32_t (*first_at_least)(const float * row, int32_t begin, int32_t n, float bound);

    // Writes index and value of every entry in [begin, end) that is >= bound; returns how many. The
    // outputs need room for all of them.
    int32_t (*collect)(const float * row, int32_t begin, int32_t end, float bound, int32_t * ids,
                       float * values);

    // With x = (row - max) * scale <= 0: sums of exp(x), per block and in all.
    double (*sum_exp)(const float * row, int32_t n, float max, float scale, double * blocks);
    // The sum over the values >= bound.
    double (*sum_exp_above)(const float * row, int32_t n, float max, float scale, float bound);
    // exp(x), 0 where x is below the range of normal floats.
    void (*exps)(const float * row, int32_t n, float max, float scale, float * out);
    // Sums of exp(x) and of exp(x) * x.
    void (*entropy_sums)(const float * row, int32_t n, float max, float scale, double & sum,
                         double & dot);

    // Sums of (row - max) and of its square over the finite values, and their number.
    void (*deviations)(const float * row, int32_t n, float max, double & sum, double & squares,
                       int32_t & count);
    // -|row - centre| * scale; -inf stays.
    void (*closeness)(const float * row, int32_t n, float centre, float scale, float * out);
    // The logits of adaptive_p for probabilities exp(x) / sum; -inf stays.
    void (*adaptive)(const float * row, int32_t n, float max, float scale, float inverse_sum,
                     float target, float * out);
    void (*divide)(const float * row, int32_t n, float divisor, float * out);
    // The row with -inf where the bit (id % 32 of word id / 32) is not set.
    void (*masked)(const float * row, const uint32_t * bits, int32_t n, float * out);
};

// The best set this processor runs, unless a test chose another one.
const RowKernels & kernels();

// Names of the sets that this processor runs, best first.
std::vector<std::string> kernel_names();
// Chooses a set by name for the whole process; false when it cannot run here.
bool use_kernels(const std::string & name);

}  // namespace llama_crab
