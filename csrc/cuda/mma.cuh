// The tensor core product of a warp: C[16, 8] += A[16, 16] B[16, 8], float16 or bfloat16 in, float32 out (sm_80 and up).
//
// Who holds what, for lane = 4 g + t (PTX ISA, "Matrix fragments for mma.m16n8k16"); two numbers of adjacent k, or n, a
// register:
//     A: rows g, g + 8, g, g + 8; k 2t, 2t, 2t + 8, 2t + 8      a[4]
//     B: k 2t, 2t + 8; column g                                 b[2]
//     C: rows g, g, g + 8, g + 8; columns 2t, 2t + 1            c[4]
// So C, rounded, of two products side by side is the A of the next: what attention does with probabilities.

#pragma once

#include "half.cuh"

namespace attent::gpu {

#ifdef ATTENT_EMULATE

// Added up in float32, k after k; a tensor core's own order is not documented.
template <typename T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct Shown {
        float a[8], b[4];
    } mine;
    for (int i = 0; i < 4; ++i) mine.a[2 * i] = low_of<T>(a[i]), mine.a[2 * i + 1] = high_of<T>(a[i]);
    for (int i = 0; i < 2; ++i) mine.b[2 * i] = low_of<T>(b[i]), mine.b[2 * i + 1] = high_of<T>(b[i]);
    const emulate::Exchange& all = emulate::meet("mma", mine);
    const int g = emulate::here().lane / 4, t = emulate::here().lane % 4;
    const auto shown = [&](int lane) { return reinterpret_cast<const Shown*>(all.shown[lane]); };
    for (int k = 0; k < 16; ++k) {
        const int owner = k % 8 / 2, place = k / 8 * 4 + k % 2;  // place in a; the row's half adds 2
        const float low = shown(4 * g + owner)->a[place], high = shown(4 * g + owner)->a[place + 2];
        for (int n = 0; n < 2; ++n) {
            const float weight = shown(4 * (2 * t + n) + owner)->b[k / 8 * 2 + k % 2];
            c[n] += low * weight;
            c[2 + n] += high * weight;
        }
    }
}

#else

template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_16x8x16<Half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_16x8x16<BFloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace attent::gpu
