// A short vector of floats or ints for compilers without vector extensions; they may vectorise the
// loops. Only what row_kernels.inc uses; comparisons give 0 or -1 in each lane.
#pragma once

#include <cstdint>
#include <cstring>

namespace llama_crab {

template <typename T, int N> struct Lanes {
    T lane[N] = {};

    T   operator[](int j) const { return lane[j]; }
    T & operator[](int j) { return lane[j]; }

    template <typename Result = T, typename Op>
    static Lanes<Result, N> each(Lanes a, Lanes b, Op op) {
        Lanes<Result, N> result;
        for (int j = 0; j < N; ++j) {
            result.lane[j] = op(a.lane[j], b.lane[j]);
        }
        return result;
    }
    static Lanes splat(T x) {
        Lanes result;
        for (T & value : result.lane) {
            value = x;
        }
        return result;
    }
    template <typename Other> Lanes<Other, N> reinterpret() const {
        Lanes<Other, N> result;
        std::memcpy(result.lane, lane, sizeof(lane));
        return result;
    }
    Lanes<float, N> choose(Lanes<float, N> a, Lanes<float, N> b) const {
        for (int j = 0; j < N; ++j) {
            a.lane[j] = lane[j] != 0 ? a.lane[j] : b.lane[j];
        }
        return a;
    }

    friend Lanes operator-(Lanes a) { return each(a, a, [](T x, T) { return -x; }); }
    friend Lanes operator<<(Lanes a, int n) {
        return each(a, splat((T) n), [](T x, T y) { return (T) ((uint32_t) x << y); });
    }
    Lanes & operator+=(Lanes b) { return *this = *this + b; }
    Lanes & operator-=(Lanes b) { return *this = *this - b; }
    Lanes & operator|=(Lanes b) { return *this = *this | b; }

#define LANES_OPERATOR(op, Result)                                                             \
    friend Lanes<Result, N> operator op(Lanes a, Lanes b) {                                    \
        return each<Result>(a, b, [](T x, T y) { return (Result) (x op y); });                 \
    }                                                                                          \
    friend Lanes<Result, N> operator op(Lanes a, T b) { return a op splat(b); }                \
    friend Lanes<Result, N> operator op(T a, Lanes b) { return splat(a) op b; }
    LANES_OPERATOR(+, T)
    LANES_OPERATOR(-, T)
    LANES_OPERATOR(*, T)
    LANES_OPERATOR(/, T)
    LANES_OPERATOR(&, T)
    LANES_OPERATOR(|, T)
#undef LANES_OPERATOR
#define LANES_COMPARISON(op)                                                                   \
    friend Lanes<int32_t, N> operator op(Lanes a, Lanes b) {                                   \
        return each<int32_t>(a, b, [](T x, T y) { return x op y ? -1 : 0; });                  \
    }                                                                                          \
    friend Lanes<int32_t, N> operator op(Lanes a, T b) { return a op splat(b); }
    LANES_COMPARISON(<)
    LANES_COMPARISON(>)
    LANES_COMPARISON(>=)
    LANES_COMPARISON(!=)
#undef LANES_COMPARISON
};

}  // namespace llama_crab
