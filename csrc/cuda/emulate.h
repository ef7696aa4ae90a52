// CUDA C++ on a CPU, for tests: a kernel's own source, compiled by a C++17 compiler with -DATTENT_EMULATE, runs one block
// after another, its threads as coroutines that switch where threads wait for each other.
//
// What it proves: values, and that threads wait where they must. Threads run in an order drawn from a seed, each as far
// as it can, so that what another thread has not stored yet is read as what lay there before: shared memory starts as
// NaN. An asynchronous copy (cp.async) happens at some time between its start and the wait for it, drawn as well. Blocks
// run in a drawn order. Lanes of a warp that meet in different instructions, threads that wait for ever, and accesses
// outside of the dynamic shared memory that the launch asked for are errors. What it does not prove: speed, the order of
// memory accesses between blocks that run at the same time, and the last bit of a GPU's exp2 and products.
//
// Tensor core and copy instructions have their twins in mma.cuh and tile.cuh.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

// Headers shared with the host take their device branches.
#define __CUDA_ARCH__ 800

#define __device__
#define __host__
#define __global__
#define __constant__
#define __shared__ static  // blocks run one after another
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#include "emulate_types.h"

namespace attent::emulate {

// What differs from one run to the next, and must not change any result.
struct Schedule {
    uint64_t seed = 0;
};
inline Schedule& schedule() {
    static Schedule chosen;
    return chosen;
}

inline int& launches() {
    static int count = 0;
    return count;
}

constexpr int WARP = 32;
constexpr size_t STACK = 256 << 10;  // of a thread; far more than any kernel's frames
// Rounds of all threads without a move, after which there is none: a copy under way lands in each with 1 chance in 4.
constexpr int IDLE_ROUNDS = 1000;

// All that arrive wait for the last of them.
struct Barrier {
    int arrived = 0;
    uint64_t generation = 0;
};

// What lanes show each other in an instruction of the warp. Two, in turn: a lane may arrive at the next instruction
// while others still read what was shown in this one.
struct Exchange {
    const char* instruction[WARP];
    alignas(16) unsigned char shown[WARP][64];
};

struct Warp {
    Barrier barrier;
    Exchange exchange[2];
};

struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool is_done;
};

struct Thread {
    dim3 index;
    int lane = 0;
    Warp* warp = nullptr;
    uint64_t instructions = 0;  // of the warp, so far
    Barrier* waits_for = nullptr;
    uint64_t waits_since = 0;
    bool has_started = false, has_ended = false;
    std::vector<std::vector<Copy>> copies;  // by group; the last is still open
    std::shared_ptr<void> products;         // under way (emulate_hopper.h)
    jmp_buf here;
    ucontext_t start;
};

// The block that is running; there is one at a time.
struct Block {
    dim3 index, size, grid;
    std::vector<unsigned char> shared;
    size_t shared_bytes = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barrier, some[16];  // of all threads, and of those that name one
    Thread* current = nullptr;
    bool has_moved = false;  // somebody did more than look at a barrier of hopper.cuh again
    std::map<uint32_t, const Thread*>
        unpublished;  // 16 bytes of dynamic shared memory: who stored them (emulate_hopper.h)
    std::mt19937_64 random;
    jmp_buf scheduler;
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
    std::exception_ptr failure;
};
inline Block& block() {
    static Block running;
    return running;
}
inline Thread& here() {
    return *block().current;
}

inline void back_to_scheduler() {
    if (_setjmp(here().here) == 0) _longjmp(block().scheduler, 1);
}

inline void wait_at(Barrier& barrier, int expected) {
    if (++barrier.arrived == expected) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    here().waits_for = &barrier;
    here().waits_since = barrier.generation;
    back_to_scheduler();
}

// An instruction of the warp: show `mine` to the other lanes; returns what all of them show.
template <typename T>
const Exchange& meet(const char* instruction, const T& mine) {
    static_assert(sizeof(T) <= 64, "a larger exchange is needed");
    Thread& me = here();
    Exchange& exchange = me.warp->exchange[me.instructions++ % 2];
    exchange.instruction[me.lane] = instruction;
    std::memcpy(exchange.shown[me.lane], &mine, sizeof(T));
    wait_at(me.warp->barrier, WARP);
    for (const char* other : exchange.instruction) {
        if (std::strcmp(other, instruction) != 0) {
            throw std::logic_error(std::string("lanes of a warp meet in ") + instruction + " and " + other);
        }
    }
    return exchange;
}

template <typename T>
T shown(const Exchange& exchange, int lane) {
    T value;
    std::memcpy(&value, exchange.shown[lane], sizeof(T));
    return value;
}

inline void thread_body() {
    Block& b = block();
    try {
        b.body(b.arguments);
    } catch (...) {
        if (!b.failure) b.failure = std::current_exception();
    }
    here().has_ended = true;
    _longjmp(b.scheduler, 1);
}

// Go on with a thread, until it waits or ends. Not inlined: setjmp may clobber what its function keeps in registers.
__attribute__((noinline)) inline void run(Thread& thread, unsigned char* stack) {
    Block& b = block();
    b.current = &thread;
    thread.waits_for = nullptr;
    if (_setjmp(b.scheduler) != 0) return;
    if (thread.has_started) _longjmp(thread.here, 1);
    thread.has_started = true;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stack;
    thread.start.uc_stack.ss_size = STACK;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, thread_body, 0);
    setcontext(&thread.start);
}

inline void run_threads(const std::vector<std::unique_ptr<unsigned char[]>>& stacks) {
    Block& b = block();
    std::vector<int> order(b.threads.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    int idle = 0;
    for (;;) {
        std::shuffle(order.begin(), order.end(), b.random);
        bool has_run = false, has_ended = true;
        b.has_moved = false;
        for (int i : order) {
            Thread& thread = b.threads[i];
            if (thread.has_ended) continue;
            has_ended = false;
            if (thread.waits_for != nullptr && thread.waits_for->generation == thread.waits_since) continue;
            has_run = true;
            run(thread, stacks[i].get());
            if (thread.has_ended || thread.waits_for != nullptr) b.has_moved = true;
            if (b.failure) std::rethrow_exception(b.failure);
        }
        if (has_ended) return;
        idle = b.has_moved ? 0 : idle + 1;
        if (!has_run || idle == IDLE_ROUNDS) throw std::logic_error("threads wait for others that never come");
    }
}

// Run `kernel(arguments...)` on a grid; throws what a thread throws.
template <typename... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 size, size_t shared_bytes, Parameters... arguments) {
    ++launches();
    auto call = [&] { kernel(arguments...); };
    Block& b = block();
    const int threads = static_cast<int>(size.x);
    static std::vector<std::unique_ptr<unsigned char[]>> stacks;
    while (static_cast<int>(stacks.size()) < threads) stacks.emplace_back(new unsigned char[STACK]);
    b.body = [](void* what) { (*static_cast<decltype(call)*>(what))(); };
    b.arguments = &call;
    b.size = size;
    b.grid = grid;
    b.shared_bytes = shared_bytes;
    b.shared.resize(shared_bytes + 1024);
    b.random.seed(schedule().seed);

    std::vector<unsigned> blocks(grid.x);
    for (unsigned i = 0; i < grid.x; ++i) blocks[i] = i;
    if (schedule().seed != 0) std::shuffle(blocks.begin(), blocks.end(), b.random);
    for (unsigned x : blocks) {
        b.index = dim3(x);
        b.failure = nullptr;
        b.barrier = Barrier();
        std::fill(std::begin(b.some), std::end(b.some), Barrier());
        b.unpublished.clear();
        std::fill(b.shared.begin(), b.shared.end(), 0xFF);
        b.warps.assign((threads + WARP - 1) / WARP, Warp());
        b.threads.assign(threads, Thread());
        for (int i = 0; i < threads; ++i) {
            b.threads[i].index = dim3(i, 0, 0);
            b.threads[i].lane = i % WARP;
            b.threads[i].warp = &b.warps[i / WARP];
            b.threads[i].copies.emplace_back();
        }
        run_threads(stacks);
    }
}

// ---------------------------------------------------------------------------------------------------- shared memory

inline unsigned char* dynamic_shared() {
    auto address = reinterpret_cast<uintptr_t>(block().shared.data());
    return reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
}
inline unsigned char* at_shared(uint32_t offset, int bytes) {
    if (offset + bytes > block().shared_bytes) throw std::out_of_range("outside of the shared memory asked for");
    if (offset % bytes != 0) throw std::logic_error("a misaligned access to shared memory");
    return dynamic_shared() + offset;
}

// ------------------------------------------------------------------------------------------------ asynchronous copies

inline void perform(Copy& copy, int size) {
    if (copy.is_done) return;
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(static_cast<unsigned char*>(copy.to) + copy.bytes, 0, size - copy.bytes);
    copy.is_done = true;
}
inline void start_copy(uint32_t to, const void* from, int bytes) {
    if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0) throw std::logic_error("a misaligned cp.async");
    Copy copy{at_shared(to, 16), from, bytes, false};
    if (block().random() % 2 == 0) perform(copy, 16);
    here().copies.back().push_back(copy);
}
inline void commit_copies() {
    here().copies.emplace_back();
}
inline void wait_for_copies(int groups_in_flight) {
    auto& groups = here().copies;
    while (static_cast<int>(groups.size()) - 1 > groups_in_flight) {
        for (Copy& copy : groups.front()) perform(copy, 16);
        groups.erase(groups.begin());
    }
}

}  // namespace attent::emulate

// --------------------------------------------------------------------------------- CUDA's names, as kernels use them

#define threadIdx (::attent::emulate::here().index)
#define blockIdx (::attent::emulate::block().index)
#define blockDim (::attent::emulate::block().size)
#define gridDim (::attent::emulate::block().grid)

inline void __syncthreads() {
    attent::emulate::wait_at(attent::emulate::block().barrier, static_cast<int>(blockDim.x));
}
namespace attent::emulate {
// bar.sync: a barrier of some threads of the block.
inline void sync_some(int id, int threads) {
    wait_at(block().some[id], threads);
}
}  // namespace attent::emulate
inline void __syncwarp(unsigned = 0xffffffffu) {
    attent::emulate::meet("__syncwarp", 0);
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) {}

template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
    const auto& all = attent::emulate::meet("__shfl_sync", value);
    const int first = attent::emulate::here().lane / width * width;
    return attent::emulate::shown<T>(all, first + lane % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int width = 32) {
    const auto& all = attent::emulate::meet("__shfl_xor_sync", value);
    const int lane = attent::emulate::here().lane, other = lane ^ mask;
    return attent::emulate::shown<T>(all, other / width == lane / width ? other : lane);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int width = 32) {
    const auto& all = attent::emulate::meet("__shfl_up_sync", value);
    const int lane = attent::emulate::here().lane;
    return attent::emulate::shown<T>(all,
                                     lane % width >= static_cast<int>(delta) ? lane - static_cast<int>(delta) : lane);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned delta, int width = 32) {
    const auto& all = attent::emulate::meet("__shfl_down_sync", value);
    const int lane = attent::emulate::here().lane;
    return attent::emulate::shown<T>(
        all, lane % width + static_cast<int>(delta) < width ? lane + static_cast<int>(delta) : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    const auto& all = attent::emulate::meet("__ballot_sync", predicate != 0);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane) votes |= attent::emulate::shown<bool>(all, lane) ? 1u << lane : 0u;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return __ballot_sync(mask, predicate) == 0xffffffffu;
}

template <typename T, typename V>
T atomicAdd(T* address, V value) {
    const T old = *address;
    *address = static_cast<T>(old + value);
    return old;
}
template <typename T, typename V>
T atomicOr(T* address, V value) {
    const T old = *address;
    *address = static_cast<T>(old | value);
    return old;
}
template <typename T, typename V>
T atomicMin(T* address, V value) {
    const T old = *address;
    *address = std::min(old, static_cast<T>(value));
    return old;
}
template <typename T, typename V>
T atomicMax(T* address, V value) {
    const T old = *address;
    *address = std::max(old, static_cast<T>(value));
    return old;
}
template <typename T, typename V>
T atomicExch(T* address, V value) {
    const T old = *address;
    *address = static_cast<T>(value);
    return old;
}

template <typename T>
T __ldcg(const T* address) {
    return *address;
}
template <typename T>
void __stcg(T* address, T value) {
    *address = value;
}
