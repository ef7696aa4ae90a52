// What Hopper (sm_90a) moves and multiplies with: tensor maps and bulk copies (TMA), barriers in shared memory that count
// bytes (mbarrier), products of four warps with both operands in shared memory (wgmma); and their twins for the emulator.
//
// Operands are tiles of rows of 64 numbers of 16 bits: 128 bytes, adjacent, the tile at a multiple of 1024 bytes. The
// copy and the product both permute the eight 16-byte chunks of row r by r % 8 (128-byte swizzle), so no bank is hit
// twice by the eight rows that a product reads at a time.
#pragma once

#include "half.cuh"
#include "tile.cuh"

#ifndef ATTENT_EMULATE
#include <cuda.h>
#else
#include "emulate_hopper.h"
#endif

namespace attent::gpu::hopper {

constexpr int ROW_BYTES = 128, ATOM_ROWS = 8;
constexpr int ACCUMULATORS = 128;  // of each of 128 threads: [64, 256]

#ifdef ATTENT_EMULATE

template <typename T>
void start_product(float (&d)[ACCUMULATORS], uint64_t a, uint64_t b, bool adds) {
    start({d, 256, nullptr, a, b, false, adds});
}

#else

using TensorMap = CUtensorMap;

__device__ __forceinline__ void init_barrier(SharedAddress barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Before the block's barrier that lets others use them: bulk copies see the barriers as they were set.
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(SharedAddress barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One arrival; the phase also waits for so many bytes of copies.
__device__ __forceinline__ void arrive_and_expect(SharedAddress barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is complete. A barrier starts in phase 0, so that waiting for parity 1 passes.
__device__ __forceinline__ void wait(SharedAddress barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// Start to copy a box from (row, column) on; what lies outside of the matrix is 0. Its bytes arrive at the barrier.
__device__ __forceinline__ void load_box(const TensorMap& map, SharedAddress to, SharedAddress barrier, int column,
                                         int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row)
        : "memory");
}

// The same of one head of one example of [examples, heads, rows, width].
__device__ __forceinline__ void load_box(const TensorMap& map, SharedAddress to, SharedAddress barrier, int column,
                                         int row, int head, int example) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2];" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(example)
        : "memory");
}
// What this thread stored to shared memory is there for products and bulk copies, once a barrier lies behind this.
__device__ __forceinline__ void publish_stores() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The compiler moves no use of these across.
template <int N>
__device__ __forceinline__ void fence_registers(float (&values)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int N>
__device__ __forceinline__ void fence_registers(uint32_t (&values)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(values[i][j])::"memory");
    }
}
// Before a group of products: all its accumulators, and its operands in registers, are as other instructions wrote them.
// All are named here: the compiler may write those that are not behind the fence.
template <typename... Registers>
__device__ __forceinline__ void fence_products(Registers&... registers) {
    (fence_registers(registers), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// At most so many groups are under way; of the others the accumulators are whole and the operands read.
template <typename T, int IN_FLIGHT>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(IN_FLIGHT) : "memory");
}

#define ATTENT_PRODUCT(TYPE)                                                                                           \
    asm volatile(                                                                                                      \
        "{.reg .pred adds; setp.ne.b32 adds, %130, 0; "                                                                \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                                                   \
        " {"                                                                                                           \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                       \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                             \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                             \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                             \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                             \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                             \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "                 \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "            \
        "%128, %129, adds, 1, 1, 0, 0;}"                                                                               \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),  \
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),       \
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),      \
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),      \
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),      \
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),      \
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),      \
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), "+f"(d[64]),      \
          "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), "+f"(d[72]),      \
          "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), "+f"(d[80]),      \
          "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), "+f"(d[88]),      \
          "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), "+f"(d[96]),      \
          "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), "+f"(d[104]), \
          "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]),            \
          "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]),            \
          "+f"(d[119]), "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]),            \
          "+f"(d[126]), "+f"(d[127])                                                                                   \
        : "l"(a), "l"(b), "r"(static_cast<int>(adds)))

// d [64, 256] += a [64, 16] b [256, 16]ᵀ (= unless it adds) by four warps, operands by descriptor, in float32. Of row
// 16 (warp % 4) + lane / 4 + 8 h a thread has the columns 8 j + 2 (lane % 4) + i at d[4 j + 2 h + i].
template <typename T>
__device__ __forceinline__ void start_product(float (&d)[ACCUMULATORS], uint64_t a, uint64_t b, bool adds);

template <>
__device__ __forceinline__ void start_product<BFloat16>(float (&d)[ACCUMULATORS], uint64_t a, uint64_t b, bool adds) {
    ATTENT_PRODUCT("bf16");
}
template <>
__device__ __forceinline__ void start_product<Half>(float (&d)[ACCUMULATORS], uint64_t a, uint64_t b, bool adds) {
    ATTENT_PRODUCT("f16");
}
#undef ATTENT_PRODUCT

// Registers of each thread of four warps, to and from the multiprocessor's pool.
template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

#endif

// Which slot of a ring comes next, and in which of its rounds.
template <int SLOTS>
struct Ring {
    int slot = 0;
    uint32_t round = 0;  // its parity

    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) slot = 0, round ^= 1;
    }
};

// A tile of rows as an operand of a product, from a row that 8 divides on, and from column 16 `step` on.
__device__ __forceinline__ uint64_t operand(SharedAddress tile, int row, int step) {
    constexpr uint64_t SWIZZLE_128 = uint64_t{1} << 62;
    constexpr uint64_t ATOM = static_cast<uint64_t>(ATOM_ROWS * ROW_BYTES / 16) << 32;  // from 8 rows to the next 8
    constexpr uint64_t UNUSED = uint64_t{1} << 16;                                      // leading offset, if swizzled
    return SWIZZLE_128 | ATOM | UNUSED | ((tile + row * ROW_BYTES + step * 32) & 0x3ffff) >> 4;
}

}  // namespace attent::gpu::hopper
