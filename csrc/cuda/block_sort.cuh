// Sorting unique int64 keys within one block: a bitonic network, up to three of its steps for one pass over memory.
//
// count keys, padded to a power of two P with kLastRank, take L = log2(P) stages, stage s with s steps. A step of
// distance d compares the keys i and i + d for all i without bit log2(d). Three steps of distances d, d/2, d/4 concern
// 8 keys that no other thread touches, so a thread does them in registers: 2 accesses a key instead of 6. The last steps
// of a stage, of distances below the width of the shared buffer, run in shared memory.
//
// Cost: 1,024 keys take 55 steps in 22 passes, 16 KB through shared memory each: about 128 cycles at 128 bytes a cycle
// and a barrier. 8,192 keys: 91 steps; those of distances from the buffer's width on go through the L2 cache.
#pragma once

#include "portable.h"
#include "ranks.cuh"

namespace attent::gpu {

// Where key i of a shared buffer lies. Threads that each take 8 adjacent keys would meet in the same banks of shared
// memory; with the bits 3 to 6 of i added to the bits 0 to 3, sixteen of them meet in none, and neither do those that
// take keys 8 apart or one each. A one-to-one map of every power of two from 0.
ATTENT_HD int shared_place(int i) {
    return i ^ ((i >> 3) & 15);
}

// Steps of distances distance, distance / 2, ... (STEPS of them) of the stage that sorts runs of `run` keys, upwards
// where the position's bit `run` is 0. keys [count], a power of two; `offset` is the position of keys[0].
template <int STEPS, bool IN_SHARED>
ATTENT_HD void bitonic_steps(const Block& block, int64_t* keys, int count, int run, int distance, int offset) {
    constexpr int N = 1 << STEPS;
    const int low = distance >> (STEPS - 1);  // the last step's distance: the group's keys lie that far apart
    block.phase([&](int thread) {
        for (int group = thread; group < count / N; group += block.threads) {
            const int start = (group & (low - 1)) + (group & ~(low - 1)) * N;
            const bool upwards = ((offset + start) & run) == 0;
            int64_t key[N];
            for (int i = 0; i < N; ++i) key[i] = keys[IN_SHARED ? shared_place(start + i * low) : start + i * low];
            for (int half = N / 2; half > 0; half /= 2) {
                for (int i = 0; i < N; ++i) {
                    if (i & half) continue;
                    const int64_t a = key[i], b = key[i + half];
                    key[i] = upwards ? smaller(a, b) : larger(a, b);
                    key[i + half] = upwards ? larger(a, b) : smaller(a, b);
                }
            }
            for (int i = 0; i < N; ++i) keys[IN_SHARED ? shared_place(start + i * low) : start + i * low] = key[i];
        }
    });
}

// The steps of a stage from `distance` down to `last`, both powers of two.
template <bool IN_SHARED>
ATTENT_HD void bitonic_stage(const Block& block, int64_t* keys, int count, int run, int distance, int last,
                             int offset) {
    while (distance >= last) {
        if (distance >= 4 * last) {
            bitonic_steps<3, IN_SHARED>(block, keys, count, run, distance, offset);
            distance /= 8;
        } else if (distance >= 2 * last) {
            bitonic_steps<2, IN_SHARED>(block, keys, count, run, distance, offset);
            distance /= 4;
        } else {
            bitonic_steps<1, IN_SHARED>(block, keys, count, run, distance, offset);
            distance /= 2;
        }
    }
}

// Sorts keys [count] in place, count > 0; the memory behind them up to a power of two is written, too. They may be other blocks'. shared: `width`
// keys, a power of two.
ATTENT_HD void sort_in_block(const Block& block, int64_t* keys, int count, int64_t* shared, int width) {
    const int padded = static_cast<int>(power_of_two(count));
    const int part = smaller(padded, width);
    for (int first = 2, stage = part; stage <= padded; stage *= 2, first = stage) {
        if (stage > width) bitonic_stage<false>(block, keys, padded, stage, stage / 2, width, 0);
        for (int start = 0; start < padded; start += part) {
            block.phase([&](int thread) {
                for (int i = thread; i < part; i += block.threads) {
                    const bool is_there = first > 2 || start + i < count;  // the first stages see no padding yet
                    shared[shared_place(i)] = is_there ? load_of_others(keys + start + i) : kLastRank;
                }
            });
            for (int run = first; run <= stage; run *= 2) {
                bitonic_stage<true>(block, shared, part, run, smaller(run, part) / 2, 1, start);
            }
            block.phase([&](int thread) {
                for (int i = thread; i < part; i += block.threads) keys[start + i] = shared[shared_place(i)];
            });
        }
    }
}

}  // namespace attent::gpu
