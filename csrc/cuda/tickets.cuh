// Tickets: how the block that comes last, of those that work on one thing, knows that it is the last.
//
// Every block stores its part, then takes a ticket. Whoever draws the highest finds all the others' parts in memory,
// folds them in a fixed order and resets the counter, so that a launch can be repeated or replayed in a CUDA graph.
// Nobody waits for anybody: blocks need not run at the same time. Other blocks' parts are read with load_of_others,
// never through __ldg or a `const __restrict__` pointer, which the L1 cache may answer with older bytes.
#pragma once

#include "portable.h"

namespace attent::gpu {

// Whether this block is the last of `count` to come here; all that they stored before is then visible to all its
// threads. Called by all threads of the block, the first being number 0, or by those of `block` if it has a barrier of
// its own. `delayed`: a stress test's switch, each block first waits for up to some 65 microseconds, so that any order of
// arrival happens.
//
// On the host blocks run one after another: a counter.
ATTENT_HD bool take_ticket(int* ticket, int count, bool delayed = false, const Block& block = {0}) {
#if defined(__CUDA_ARCH__)
    if (delayed) __nanosleep(static_cast<unsigned>(clock()) & 0xFFFF);
    // Without this barrier thread 0 could take the ticket before the other threads have stored their parts.
    block.wait();
    __shared__ bool is_last;
    if (threadIdx.x == 0) {
        // Releases, at the GPU's scope, what the barrier has put before it: the whole block's stores.
        __threadfence();
        is_last = atomicAdd(ticket, 1) == count - 1;
        if (is_last) *ticket = 0;  // nobody else comes: for the next launch
        __threadfence();           // acquires the others' stores, for whoever the next barrier puts behind it
    }
    // All have is_last, and no thread reads another block's part before thread 0 has acquired it.
    block.wait();
    const bool result = is_last;
    // Nobody overwrites is_last with a later ticket before all have read it.
    block.wait();
    return result;
#else
    (void)delayed, (void)block;
    const bool result = ++*ticket == count;
    if (result) *ticket = 0;
    return result;
#endif
}

}  // namespace attent::gpu
