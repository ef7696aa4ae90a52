// From float32 to float16 and bfloat16 (to nearest, ties to even), and two of them in a register.
//
// Kernels only move these and multiply them on tensor cores; all other arithmetic is in float32.

#pragma once

#ifdef ATTENT_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "dtype.h"

namespace attent::gpu {

#ifdef ATTENT_EMULATE

template <typename T>
T from_float(float x);

template <>
inline BFloat16 from_float<BFloat16>(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    bits += 0x7fff + (bits >> 16 & 1);
    return {static_cast<uint16_t>(bits >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
    const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000u);
    const float size = std::fabs(x);
    if (x != x) return {0x7fff};
    if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
    if (size < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)))};
    uint32_t bits = __float_as_uint(size);
    bits += 0xfff + (bits >> 13 & 1);
    return {static_cast<uint16_t>(sign | ((bits >> 13) - (112u << 10)))};
}

template <typename T>
uint32_t pack(float low, float high) {
    return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}

#else

template <typename T>
__device__ __forceinline__ T from_float(float x);

template <>
__device__ __forceinline__ BFloat16 from_float<BFloat16>(float x) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
    return {__half_as_ushort(__float2half_rn(x))};
}

// One conversion instruction for the two.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<BFloat16>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <>
__device__ __forceinline__ uint32_t pack<Half>(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

#endif

// The two numbers of a 32-bit register, the one at the lower address first.
template <typename T>
__device__ __forceinline__ float low_of(uint32_t both) {
    return to_float32(T{static_cast<uint16_t>(both & 0xffffu)});
}
template <typename T>
__device__ __forceinline__ float high_of(uint32_t both) {
    return to_float32(T{static_cast<uint16_t>(both >> 16)});
}

// 2^x. On a GPU one instruction, off by 2 units of 2^-24 of the result; results below 2^-126 are 0.
__device__ __forceinline__ float fast_exp2(float x) {
#ifdef ATTENT_EMULATE
    return std::exp2(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

}  // namespace attent::gpu
