// Sums and extremes over the threads of a block, in a fixed order.
#pragma once

#include "portable.h"

namespace attent::gpu {

// values [count] become their running sums: values[i] = values[0] + ... + values[i]. spare: another [count].
// In groups of 32: a value adds those before it in its group, then the groups before its own. Threads of a warp read the
// same address at a time, which shared memory answers at once: some 64 reads each, and two barriers.
ATTENT_HD void running_sums(const Block& block, int* values, int* spare, int count) {
    block.phase([&](int thread) {
        for (int i = thread; i < count; i += block.threads) {
            int sum = 0;
            for (int j = i & ~31; j <= i; ++j) sum += values[j];
            spare[i] = sum;
        }
    });
    block.phase([&](int thread) {
        for (int i = thread; i < count; i += block.threads) {
            int sum = spare[i];
            for (int last = 31; last < (i & ~31); last += 32) sum += spare[last];
            values[i] = sum;
        }
    });
}

// The smallest (LEAST) or the largest of values [count], count > 0, which are overwritten. On all threads.
template <bool LEAST, typename T>
ATTENT_HD T extreme(const Block& block, T* values, int count) {
    block.phase([&](int thread) {
        if (thread >= 32) return;
        for (int i = thread + 32; i < count; i += 32) {
            values[thread] = LEAST ? smaller(values[thread], values[i]) : larger(values[thread], values[i]);
        }
    });
    T result = values[0];
    for (int i = 1; i < smaller(count, 32); ++i)
        result = LEAST ? smaller(result, values[i]) : larger(result, values[i]);
    block.phase([](int) {});  // all have read the values before a later phase overwrites them
    return result;
}

}  // namespace attent::gpu
