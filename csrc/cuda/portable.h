// What lets one piece of code run as a block of a CUDA kernel and, for tests, on the host: compiled by nvcc or by any
// C++17 compiler, no CUDA header needed.
//
// A block's work is written as phases. In a phase every thread does its part; between phases lies a barrier. On the
// device `phase` runs the part of this thread and waits for the others; on the host it runs all threads' parts one
// after another, in either order. Two rules make the two the same:
//
// * A phase writes to memory, shared or global, never to a variable from outside of it: on the host such a variable is
//   one for all threads, on the device it is each thread's own. What a block agreed on is read from shared memory after
//   the phase that wrote it, by every thread.
// * What is read between two phases is not written in the second of them: a thread may be in it while another one has
//   not read yet.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define ATTENT_HD __host__ __device__ __forceinline__
#else
#define ATTENT_HD inline
#endif

namespace attent::gpu {

struct Block {
    int threads;
    bool backwards = false;  // on the host, for tests: the last thread first; what depends on the order shows
    int barrier = 0;         // on the device, where others of the launch go other ways: a barrier of these threads only

    // Runs part(thread) for every thread of the block, then waits until all are done.
    template <typename Part>
    ATTENT_HD void phase(Part part) const {
#if defined(__CUDA_ARCH__)
        part(static_cast<int>(threadIdx.x));
        wait();  // what this phase wrote is visible to the block, and all have read what the next overwrites
#else
        for (int i = 0; i < threads; ++i) part(backwards ? threads - 1 - i : i);
#endif
    }

    ATTENT_HD void wait() const {
#if defined(__CUDA_ARCH__) && defined(ATTENT_EMULATE)
        barrier == 0 ? __syncthreads() : emulate::sync_some(barrier, threads);
#elif defined(__CUDA_ARCH__)
        if (barrier == 0) {
            __syncthreads();
        } else {
            asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
        }
#endif
    }
};

template <typename T>
ATTENT_HD T smaller(T a, T b) {
    return b < a ? b : a;
}

template <typename T>
ATTENT_HD T larger(T a, T b) {
    return a < b ? b : a;
}

ATTENT_HD int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// The smallest power of two that is `count` or more; count at least 1, at most 2^62.
ATTENT_HD int64_t power_of_two(int64_t count) {
    int64_t power = 1;
    while (power < count) power *= 2;
    return power;
}

template <typename To, typename From>
ATTENT_HD To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "a cast keeps all bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Returns what was there. Integers only: their sums do not depend on the order.
ATTENT_HD int atomic_add(int* place, int value) {
#if defined(__CUDA_ARCH__)
    return atomicAdd(place, value);
#else
    const int before = *place;
    *place = before + value;
    return before;
#endif
}

// A value that another block stored before its ticket: read past this processor's L1 cache, which may hold an older one.
template <typename T>
ATTENT_HD T load_of_others(const T* place) {
#if defined(__CUDA_ARCH__)
    return __ldcg(place);
#else
    return *place;
#endif
}

// Two adjacent int64 at once: 16 bytes, aligned to 16.
struct alignas(16) Pair {
    int64_t first, second;
};

}  // namespace attent::gpu
