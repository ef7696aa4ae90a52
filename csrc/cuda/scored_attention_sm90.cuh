// Scored attention for Hopper (sm_90a): what scored_attention.h describes, for head dimensions up to 64 and from 97 to 128.
// Not yet run on a GPU.
//
//     S [64, 128] = Q Kᵀ,  P = softmax(S),  O [64, D] += P V      of each of two warpgroups, 128 keys at a time
//
// A block of threads is persistent: it takes one unit, a tile of 128 rows of a head, after the other, by a ticket. One
// warp copies (TMA): it finds the units, describes them to the others, and loads queries, keys and values through two
// rings of slots without a stop between units. Two warpgroups multiply (wgmma): scores are accumulated in registers,
// where they become probabilities, and, rounded, the left operand of the product with the values. That product runs
// while the next tile's softmax is computed. What waits for what is in scored_attention_sm90_copies.cuh (HopperMemory).
// The end of a unit is the portable kernel's (scored_attention.cuh): accumulators lie in registers as its own do.
//
// FLOPs and bytes: scored_attention.h; K and V are read again for every 128 rows. Counted, not measured, of 128 keys for
// a warpgroup of 64 rows, D = 128:
// * products: 2 × 8 wgmma of m64n128k16, 64 clocks each: 1024 clocks; both warpgroups 2048 a tile of the one tensor core
//   each of whose four parts both share.
// * exponentials: 64 × 128 at 16 a clock: 512 clocks, which the other products have to hide, or 1/3 is lost.
// * shared memory read by wgmma: S takes 6 KB a step (Q and K), P V takes 4 KB: 80 KB a tile and warpgroup, 80 bytes a
//   clock of 128. Copies: 64 KB a tile, for both.
// * registers of a multiplying thread: 64 of O, 64 of S, 32 of P, of 224; 56 of a copying one: 256 × 224 + 128 × 56 is
//   what 384 threads of 168 have.
#pragma once

#include "scored_attention.cuh"
#include "scored_attention_sm90_products.cuh"

namespace attent::gpu {

template <typename C>
__global__ void __launch_bounds__(HopperShape::THREADS, 1)
    hopper_attention_kernel(const __grid_constant__ ScoredAttention a, const __grid_constant__ TensorMaps maps,
                            int tiles_a_head, int units) {
    __shared__ HopperUnit described[2];
    const Lane at = this_lane();
    const HopperMemory<C> memory{shared_address(dynamic_shared())};
    if (at.thread == 0) {
        init_barriers(memory);
        hopper::prefetch_map(maps.query);
        hopper::prefetch_map(maps.key);
        hopper::prefetch_map(maps.value);
    }
    __syncthreads();  // barriers are set before anybody waits at them

    if (at.thread >= C::THREADS) {
        hopper::give_registers<56>();
        if (at.thread < C::THREADS + 32) copy_units<C>(a, maps, memory, described, tiles_a_head, units);
        return;
    }
    hopper::take_registers<224>();

    hopper::Ring<C::SLOTS> keys, values;
    bool chooses = false;
#pragma unroll 1
    for (uint32_t number = 0;; ++number) {
        hopper::wait(memory.unit_is_there(), number & 1);
        const HopperUnit& current = described[number & 1];
        if (current.is_end) break;
        const Unit& unit = current.unit;
        // Where the target goes nothing of the unit before is read any more: its rows only by this warp, which is past
        // them, and what an example's end had there is behind that end's last barrier.
        if (unit.own_tile < unit.own_tiles) copy_target<C>(a, unit, at.warp * C::WARP_ROWS, at.lane);
        Found<C> found;
        attend<C>(found, a, memory, current, keys, values, at);
        chooses = end_of_unit<C>(found, a, unit, true, at) || chooses;
    }
    // Whoever has ended the launch chooses when it is out of units: padding may still have been among them.
    if (chooses) {
        C::block().wait();  // all warps have stored that padding, which is staged where the choice's memory is
        choose<C>(a);
    }
}

}  // namespace attent::gpu
