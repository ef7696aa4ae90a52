// The online softmax of a warp's accumulators, and folding runs over different keys into one.
//
// Base-2 logarithms: s' = s log2(e), so that exp(s - m) is one exp2. Of each row are kept m, the largest s' so far, l,
// the sum of exp2(s' - m), and the sum of exp2(s' - m) v. A new maximum scales the two sums. A row that has seen no key
// has m = -inf and l = 0; -inf - -inf would be NaN, so what is subtracted there is 0.

#pragma once

#include "half.cuh"

#ifdef ATTENT_EMULATE
#include <cmath>
#endif

namespace attent::gpu {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

__host__ __device__ __forceinline__ float minus_infinity() {
    return -__builtin_huge_valf();
}

// Lanes 4 g .. 4 g + 3 hold one row of an accumulator (mma.cuh).
__device__ __forceinline__ float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// What is subtracted from logits with maximum m.
__host__ __device__ __forceinline__ float pivot_of(float m) {
    return m == minus_infinity() ? 0.0f : m;
}

// c tanh(s / c), off by a few units of c 2^-24, from e = exp(-2 |s| / c).
__device__ __forceinline__ float cap(float s, float softcap, float minus_two_over_cap_log2) {
    const float e = fast_exp2(fabsf(s) * minus_two_over_cap_log2);
    const float size = softcap * __fdividef(1.0f - e, 1.0f + e);
    return s < 0.0f ? -size : size;
}

// Natural logarithm of a row's sum of exponentials; -inf of a row without a key. A sum that is NaN comes from keys.
__device__ __forceinline__ float logsumexp_of(float m, float l) {
    return l != 0.0f ? (m + log2f(l)) * LN_2 : minus_infinity();
}
__device__ __forceinline__ float reciprocal_of_sum(float l) {
    return l != 0.0f ? 1.0f / l : 1.0f;
}

// Factors that bring two runs, with maxima m and other, to their common maximum, which becomes m.
struct Fold {
    float scale, other_scale;
};
__device__ __forceinline__ Fold fold(float& m, float other) {
    const float both = fmaxf(m, other), pivot = pivot_of(both);
    const Fold factors{fast_exp2(m - pivot), fast_exp2(other - pivot)};
    m = both;
    return factors;
}

}  // namespace attent::gpu
