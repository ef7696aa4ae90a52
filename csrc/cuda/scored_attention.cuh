// The kernel of scored_attention.h. Who comes last goes on (tickets.cuh):
//
//     a part of a tile's keys    -> the last one folds the tile's parts, in order
//     a tile of an example       -> the last one folds the example's tiles, in order: loss and score, or the pooled output
//     an example of its group    -> the last one reads the group out: logits, losses, scores (readout only)
//     an example, or a group     -> the last one chooses
//
// Nobody waits for another block. Every part has its own slot and is added in a fixed order, so results are the same to
// the bit whatever order blocks finish in. Each last one resets its counter: the launch can be repeated, and replayed in
// a CUDA graph.

#pragma once

#ifdef ATTENT_EMULATE
#include "emulate_launch.h"
#else
#include "check.h"
#endif

#include "attention_end.cuh"
#include "attention_parts.cuh"
#include "readout.cuh"
#include "select.cuh"
#include "tickets.cuh"

namespace attent::gpu {

constexpr int SELECT_KEYS = 1024;  // that are sorted in shared memory at a time: 16 KB with the rest of SelectShared

// A tile's end, and its example's, its group's, by whoever is the last of each. All threads that hold the tile. Whether
// they are to choose: all scores are there then.
template <typename C>
__device__ __forceinline__ bool end_of_unit(Found<C>& found, const ScoredAttention& a, const Unit& unit, bool owns_rows,
                                            const Lane& at) {
    end_of_tile<C>(found, a, unit, owns_rows, at);
    if (unit.own_tile >= unit.own_tiles) return false;  // padding
    // Tickets: of all, of groups, of examples, of tiles.
    int* tickets = a.workspace.tickets;
    const int groups = num_groups(a.sizes);
    if (!take_ticket(tickets + 1 + groups + unit.example, a.sizes.heads * unit.own_tiles, a.workspace.delayed,
                     C::block())) {
        return false;
    }
    unsigned char* shared = dynamic_shared();
    static_assert(sizeof(ReadoutShared) <= C::END_BYTES);
    if (at.thread == 0) a.results.valid[unit.example] = unit.queries.rows > 0;
    int to_come = a.sizes.examples;
    if (a.target.data != nullptr) {
        const float square =
            add_slots(a.workspace.slots, unit, a.sizes.heads, C::block(), reinterpret_cast<float*>(shared), at);
        if (at.thread == 0) store_loss_and_score(a, unit.example, square, unit.queries.rows);
    } else {
        if (a.classifier.pool == Pool::mean) pool_mean<C>(a, unit, at.thread);
        const int group = unit.example / GROUP;
        if (!take_ticket(tickets + 1 + group, min(GROUP, a.sizes.examples - group * GROUP), a.workspace.delayed,
                         C::block())) {
            return false;
        }
        read_out<C>(a, group, *reinterpret_cast<ReadoutShared*>(shared), at);
        to_come = groups;
    }
    if (a.choice.index == nullptr) {
        // A persistent block's next target does not overwrite what is still read of sums or statistics. (A ticket has
        // such a barrier.)
        C::block().wait();
        return false;
    }
    return take_ticket(tickets, to_come, a.workspace.delayed, C::block());
}

template <typename C>
__device__ __forceinline__ void choose(const ScoredAttention& a) {
    static_assert(sizeof(SelectShared<SELECT_KEYS>) <= C::END_BYTES);
    const SelectArgs<float> choice{a.results.scores, a.results.valid,      a.sizes.examples, a.choice.k,
                                   a.choice.k_floor, a.choice.temperature, a.choice.seed,    a.choice.index,
                                   a.choice.score,   a.choice.inclusion,   a.choice.scratch};
    select_in_block(C::block(), choice, *reinterpret_cast<SelectShared<SELECT_KEYS>*>(dynamic_shared()));
}

// One block a processor is asked for, so that registers may be 255: left alone, the compiler spills to fit more blocks.
template <typename C>
__global__ void __launch_bounds__(C::THREADS, 1)
    scored_attention_kernel(const __grid_constant__ ScoredAttention a, int tiles, int splits) {
    const Lane at = this_lane();
    __shared__ Unit unit;
    __shared__ KeySource<typename C::T> source;
    if (at.warp == 0) {
        const Unit found = find_unit(a, blockIdx.x, tiles, splits, C::BLOCK_M, at.lane);
        if (at.lane == 0) {
            unit = found;
            source = key_source<C>(a, found, splits);
        }
    }
    __syncthreads();  // both are there; they do not change any more
    const bool is_nobodys = a.sizes.is_packed && unit.own_tile >= unit.own_tiles;
    if (is_nobodys) return;
    Found<C> found;
    attend<C>(found, a, unit, source, at);
    if constexpr (C::KEY_WARPS > 1) {
        int* tile_tickets = a.workspace.tickets + 1 + num_groups(a.sizes) + a.sizes.examples;
        if (!fold_keys<C>(found, a, unit, splits, tile_tickets, at)) return;
    }
    if (end_of_unit<C>(found, a, unit, at.warp < C::ROW_WARPS, at)) choose<C>(a);
}

template <typename T, int WIDTH, bool FEW>
Status launch_tile(const ScoredAttention& a, const AttentionPlan& plan, cudaStream_t stream) {
    using C = TileOf<T, WIDTH, FEW>;
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(plan.blocks));
    shape.block = dim3(C::THREADS);
    shape.shared = C::SHAPE.shared_bytes();
    return launch("scored_attention", scored_attention_kernel<C>, shape, stream, a, plan.tiles, plan.splits);
}

}  // namespace attent::gpu
