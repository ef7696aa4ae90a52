// The keys that a choice is made by: scores, noise and indices as unique 64-bit integers.
//
// A rank is an int64 that is smaller for who comes first: from the top, 1 bit for invalid, 32 for the code of a value
// (smaller for a larger value), 31 for the index. No two are equal, so nothing ever ties and every way to select and to
// sort gives the same result. A key is a rank without its index, as 33 bits from 0 up.
//
// The same integers, and up to rounding the same numbers, as attent_kernels/ranks.py; error bounds are in units of
// 2^-24 and are derived there, of exp and log within one unit each.
#pragma once

#include <math.h>

#include "philox.cuh"
#include "portable.h"

namespace attent::gpu {

constexpr int kIndexBits = 31;
constexpr int64_t kIndexMask = (int64_t{1} << kIndexBits) - 1;
constexpr int64_t kHalfRange = int64_t{1} << 31;  // from int32 to unsigned

// No rank: before and after all of them.
constexpr int64_t kFirstRank = INT64_MIN;
constexpr int64_t kLastRank = INT64_MAX;

constexpr float kTiny = 0x1p-126f;  // the smallest normal number
constexpr float kLargest = 0x1.fffffep127f;
constexpr float kLargestBelow1 = 0x1.fffffep-1f;

// Rises where `value` falls: NaN lowest, then +inf; equal for all NaNs, and for -0 and +0. On bits alone: a compiler
// may think that it knows what x + 0.0 or x != x is.
ATTENT_HD int32_t descending_code(float value) {
    uint32_t bits = bit_cast<uint32_t>(value);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) bits = 0x7FC00000;
    if (bits == 0x80000000) bits = 0;
    return static_cast<int32_t>((bits & 0x80000000) ? bits ^ 0x80000000 : ~bits);
}

// The float32 that descending_code made `code` of.
ATTENT_HD float value_of_code(int32_t code) {
    const uint32_t bits = static_cast<uint32_t>(code);
    return bit_cast<float>(code < 0 ? ~bits : bits ^ 0x80000000);
}

// Rises with the unsigned bits: the floor draws who has the smallest.
ATTENT_HD int32_t floor_code(uint32_t bits) {
    return static_cast<int32_t>(bits ^ 0x80000000);
}

ATTENT_HD int64_t key_of(int32_t code, bool valid) {
    return code + kHalfRange + (valid ? 0 : int64_t{1} << 32);
}

ATTENT_HD float value_of_key(int64_t key) {
    return value_of_code(static_cast<int32_t>(key - kHalfRange));
}

ATTENT_HD int64_t rank_of(int32_t code, bool valid, int64_t index) {
    const uint64_t class_and_code = static_cast<uint64_t>(key_of(code, valid) - 2 * kHalfRange);
    return static_cast<int64_t>(class_and_code << kIndexBits | static_cast<uint64_t>(index));
}

ATTENT_HD int64_t index_of_rank(int64_t rank) {
    return rank & kIndexMask;
}

ATTENT_HD int32_t code_of_rank(int64_t rank) {
    return static_cast<int32_t>((rank >> kIndexBits) + kHalfRange);
}

// log(score) / temperature, finite: NaN and +inf count as the largest number, what is below normal as the smallest
// normal one, temperatures below 1e-30 as that.
ATTENT_HD float log_weight(float score, float temperature) {
    const bool is_nan = (bit_cast<uint32_t>(score) & 0x7FFFFFFF) > 0x7F800000;
    const float positive = smaller(larger(is_nan ? kLargest : score, kTiny), kLargest);
    return logf(positive) / larger(temperature, 1e-30f);
}

// A standard Gumbel number: -log E, E = -log(1 - u) exponential, u = (bits + 1/2) 2^-32. The largest decide. They come
// from the smallest E, and those from u near 0, where 1 - u would round u away: there E = 2 artanh(u / (2 - u)), a
// series of positive terms; 4 units in E and in log E.
ATTENT_HD float gumbel(uint32_t bits) {
    const float u = smaller((static_cast<float>(bits) + 0.5f) * 0x1p-32f, kLargestBelow1);
    float exponential;
    if (u < 0.5f) {
        const float s = u / (2.0f - u), s2 = s * s;
        float series = 1.0f / 13 + s2 * (1.0f / 15);
        series = 1.0f / 11 + s2 * series;
        series = 1.0f / 9 + s2 * series;
        series = 1.0f / 7 + s2 * series;
        series = 1.0f / 5 + s2 * series;
        series = 1.0f / 3 + s2 * series;
        exponential = 2.0f * s + 2.0f * s * (s2 * series);
    } else {
        exponential = -logf(1.0f - u);
    }
    return -logf(exponential);
}

// P(phi + G > threshold) = 1 - exp(-y), y = exp(phi - threshold), accurate for small y as well: below 1/2 by Taylor's
// series, from there on the difference is above 0.39.
ATTENT_HD float probability_above(float phi, float threshold) {
    const float y = expf(smaller(phi - threshold, 8.0f));  // beyond, exp(-y) is 0 next to 1
    if (y >= 0.5f) return 1.0f - expf(-y);
    float series = 1.0f / 40320 - y * (1.0f / 362880);
    series = 1.0f / 5040 - y * series;
    series = 1.0f / 720 - y * series;
    series = 1.0f / 120 - y * series;
    series = 1.0f / 24 - y * series;
    series = 1.0f / 6 - y * series;
    series = 0.5f - y * series;
    return y - y * (y * series);
}

}  // namespace attent::gpu
