#include "row_kernels.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#if !defined(__GNUC__)
#    define PORTABLE_LANES
#endif
#ifdef PORTABLE_LANES
#    include "portable_lanes.h"
#endif

// Vectors are passed between inlined functions only, so their calling convention does not matter.
#if defined(__GNUC__) && !defined(__clang__)
#    pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace llama_crab {

namespace {

constexpr float minus_infinity = -std::numeric_limits<float>::infinity();

// What every processor of this platform runs: SSE2 on x86-64, NEON on arm64.
namespace baseline {
#define LANES 4
#define KERNELS_NAME "baseline"
#include "row_kernels.inc"
#undef LANES
#undef KERNELS_NAME
}  // namespace baseline

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#    define HAVE_X86_LEVELS

namespace v2 {
#    pragma GCC push_options
#    pragma GCC target("arch=x86-64-v2")
#    define LANES 4
#    define KERNELS_NAME "x86-64-v2"
#    include "row_kernels.inc"
#    undef LANES
#    undef KERNELS_NAME
#    pragma GCC pop_options
}  // namespace v2

namespace v3 {
#    pragma GCC push_options
#    pragma GCC target("arch=x86-64-v3")
#    define LANES 8
#    define KERNELS_NAME "x86-64-v3"
#    include "row_kernels.inc"
#    undef LANES
#    undef KERNELS_NAME
#    pragma GCC pop_options
}  // namespace v3

namespace v4 {
#    pragma GCC push_options
#    pragma GCC target("arch=x86-64-v4")
#    define LANES 16
#    define KERNELS_NAME "x86-64-v4"
#    include "row_kernels.inc"
#    undef LANES
#    undef KERNELS_NAME
#    pragma GCC pop_options
}  // namespace v4
#endif

std::vector<const RowKernels *> runnable() {
    std::vector<const RowKernels *> found;
#ifdef HAVE_X86_LEVELS
    // By feature: __builtin_cpu_supports("x86-64-v3") needs a newer compiler than we do.
    __builtin_cpu_init();
    const bool has_v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2");
    if (has_v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512cd")) {
        found.push_back(&v4::table);
    }
    if (has_v3) {
        found.push_back(&v3::table);
    }
    if (__builtin_cpu_supports("sse4.2")) {
        found.push_back(&v2::table);
    }
#endif
    found.push_back(&baseline::table);
    return found;
}

std::atomic<const RowKernels *> chosen{nullptr};

}  // namespace

const RowKernels & kernels() {
    const RowKernels * current = chosen.load(std::memory_order_relaxed);
    if (current == nullptr) {
        current = runnable().front();
        chosen.store(current, std::memory_order_relaxed);
    }
    return *current;
}

std::vector<std::string> kernel_names() {
    std::vector<std::string> names;
    for (const RowKernels * set : runnable()) {
        names.push_back(set->name);
    }
    return names;
}

bool use_kernels(const std::string & name) {
    for (const RowKernels * set : runnable()) {
        if (name == set->name) {
            chosen.store(set, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace llama_crab
