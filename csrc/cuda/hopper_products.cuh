// Products of four warps that attention takes (wgmma, sm_90a), beside the one of hopper.cuh; and their twins for the
// emulator. In float32, from float16 or bfloat16; asynchronous, as there.
//
//     start_product        d [64, 128] (+)= a [64, 16] b [128, 16]ᵀ    both are tiles of rows (operand())
//     start_row_product    d [64, N] += a [64, 16] b [16, N]           a in registers; b a tile of rows, 16 from the k-th
//                                                                      on (columns_operand()); N = 64 or 128
//
// Accumulators: of row 16 (warp % 4) + lane / 4 + 8 h a thread has the columns 8 j + 2 (lane % 4) + i at d[4 j + 2 h + i]:
// what mma.cuh calls C, of N / 8 products side by side. Registers of a: as A there. So accumulators of 16 columns, rounded,
// are a of the next product: what attention does with probabilities.
#pragma once

#include "hopper.cuh"

namespace attent::gpu::hopper {

#ifdef ATTENT_EMULATE

template <typename T>
void start_product(float (&d)[64], uint64_t a, uint64_t b, bool adds) {
    start({d, 128, nullptr, a, b, false, adds});
}
template <typename T, int ACCUMULATORS>
void start_row_product(float (&d)[ACCUMULATORS], const uint32_t (&a)[4], uint64_t b) {
    start({d, 2 * ACCUMULATORS, a, 0, b, true, true});
}

#else

// Lists of an instruction's registers, and of the accumulators that they are.
#define ATTENT_LIST_32                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTENT_LIST_64                                                                 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ATTENT_OUT_8(d, i)                                                                                      \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define ATTENT_OUT_32(d, i) ATTENT_OUT_8(d, i), ATTENT_OUT_8(d, i + 8), ATTENT_OUT_8(d, i + 16), ATTENT_OUT_8(d, i + 24)

#define ATTENT_PRODUCT(TYPE)                                                             \
    asm volatile(                                                                        \
        "{.reg .pred adds; setp.ne.b32 adds, %66, 0; "                                   \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" ATTENT_LIST_64 \
        "}, "                                                                            \
        "%64, %65, adds, 1, 1, 0, 0;}"                                                   \
        : ATTENT_OUT_32(d, 0), ATTENT_OUT_32(d, 32)                                      \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)))

template <typename T>
__device__ __forceinline__ void start_product(float (&d)[64], uint64_t a, uint64_t b, bool adds) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        ATTENT_PRODUCT("bf16");
    } else {
        ATTENT_PRODUCT("f16");
    }
}

// The last 1: b's rows are k, not columns.
#define ATTENT_ROW_PRODUCT_128(TYPE)                                                     \
    asm volatile(                                                                        \
        "{.reg .pred adds; setp.ne.b32 adds, 1, 0; "                                     \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " {" ATTENT_LIST_64 \
        "}, "                                                                            \
        "{%64, %65, %66, %67}, %68, adds, 1, 1, 1;}"                                     \
        : ATTENT_OUT_32(d, 0), ATTENT_OUT_32(d, 32)                                      \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define ATTENT_ROW_PRODUCT_64(TYPE)                                                     \
    asm volatile(                                                                       \
        "{.reg .pred adds; setp.ne.b32 adds, 1, 0; "                                    \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" ATTENT_LIST_32 \
        "}, "                                                                           \
        "{%32, %33, %34, %35}, %36, adds, 1, 1, 1;}"                                    \
        : ATTENT_OUT_32(d, 0)                                                           \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

template <typename T, int ACCUMULATORS>
__device__ __forceinline__ void start_row_product(float (&d)[ACCUMULATORS], const uint32_t (&a)[4], uint64_t b) {
    constexpr bool IS_BFLOAT16 = std::is_same_v<T, BFloat16>;
    static_assert(ACCUMULATORS == 32 || ACCUMULATORS == 64, "64 or 128 columns");
    if constexpr (ACCUMULATORS == 64) {
        if constexpr (IS_BFLOAT16) {
            ATTENT_ROW_PRODUCT_128("bf16");
        } else {
            ATTENT_ROW_PRODUCT_128("f16");
        }
    } else {
        if constexpr (IS_BFLOAT16) {
            ATTENT_ROW_PRODUCT_64("bf16");
        } else {
            ATTENT_ROW_PRODUCT_64("f16");
        }
    }
}

#undef ATTENT_LIST_32
#undef ATTENT_LIST_64
#undef ATTENT_OUT_8
#undef ATTENT_OUT_32
#undef ATTENT_PRODUCT
#undef ATTENT_ROW_PRODUCT_64
#undef ATTENT_ROW_PRODUCT_128

#endif

// A tile of rows as an operand whose k are its rows, 16 of them from `row` on, a multiple of 8. Its columns lie 64 side by
// side, the next 64 `leading` bytes on. (PTX ISA, "Matrix-Descriptor": of an operand that is not k-major, with 128-byte
// swizzle, the leading offset is from 64 columns to the next 64, the stride offset from 8 k to the next 8.)
__device__ __forceinline__ uint64_t columns_operand(SharedAddress tile, int row, int leading) {
    constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62;
    constexpr uint64_t ATOM = static_cast<uint64_t>(ATOM_ROWS * ROW_BYTES / 16) << 32;
    return SWIZZLE_128 | ATOM | static_cast<uint64_t>(leading / 16) << 16 | ((tile + row * ROW_BYTES) & 0x3ffff) >> 4;
}

}  // namespace attent::gpu::hopper
