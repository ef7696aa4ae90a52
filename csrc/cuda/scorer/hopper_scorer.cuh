// The scorer for Hopper (sm_90a): a persistent GEMM whose epilogue is what online.cuh keeps, and which ends by finish.cuh.
//
//     z [BM, BN] = hidden [BM, D] weight [BN, D]ᵀ (+ bias),  then sums over BN, tile after tile
//
// A block of threads takes one item, a tile of BM tokens and a group of vocabulary tiles, after the other. One warp
// produces: it copies operands (TMA) into a ring of stages, through all tiles and items without a stop. Two warpgroups
// consume: each multiplies its 64 tokens with all BN classes of a stage (wgmma), sums the logits up where they are, in
// its accumulators, and folds what its item ends with. What waits for what:
//
//     full[stage]    the stage's bytes are there                     producer → both consumers
//     empty[stage]   all eight consuming warps have multiplied it    consumers → producer
//
// FLOPs: 2 N V D. Bytes: of L2 each tile takes (BM + BN) D 2, in all 2 N V D (1/BM + 1/BN) (103 GB at N = 8192, V =
// 131072, D = 4096: 8.4 TB/s at cuBLAS's 12.25 ms). Slots: 4 κ G N written and read once, κ = 3, 7 with smoothing.
//
// Why these sizes (counted, not measured):
// * wgmma m64n256k16 reads its operands from shared memory: 10 KB for 128 clocks of products, 80 bytes a clock of 128;
//   the copies write 48. Narrower tiles of classes read more: 96 at n = 128.
// * A consumer thread holds 128 accumulators in 240 registers: 256 × 240 + 128 × 24 is what 384 threads of 168 have.
// * 4 stages of 48 KB. Consumers drift apart by up to 4 stages, 2048 clocks of products: while one sums its logits up,
//   64 × 256 exponentials at 16 a clock = 1024 clocks, the other multiplies. So the sums are hidden behind products
//   from D = 256 on without a schedule for it.
//
// Tokens beyond the last are zeros (tensor maps fill them in) and are computed for nothing; so are classes beyond the
// last, which no sum counts. A tile none of whose tokens is computed skips its products.
#pragma once

#include "../hopper.cuh"
#include "columns.cuh"
#include "finish.cuh"
#include "tiles.h"

namespace attent::gpu::scorer {

/// The two consuming warpgroups, the block's first 256 threads. Barrier 1 is theirs.
struct Consumers {
    __device__ int thread() const { return static_cast<int>(threadIdx.x); }
    __device__ static constexpr int threads() { return Hopper::CONSUMERS; }
    __device__ static constexpr Block block() { return {Hopper::CONSUMERS, false, 1}; }
    __device__ void sync() const { block().wait(); }
};

using Ring = hopper::Ring<Hopper::STAGES>;

struct HopperShared {
    SharedAddress base;

    __device__ SharedAddress hidden(int stage) const { return base + stage * Hopper::STAGE_BYTES; }
    __device__ SharedAddress weight(int stage) const { return hidden(stage) + Hopper::HIDDEN_BYTES; }
    __device__ SharedAddress full(int stage) const { return base + Hopper::BARRIERS_AT + 8 * stage; }
    __device__ SharedAddress empty(int stage) const { return full(Hopper::STAGES + stage); }
};

/// How many vocabulary tiles an item has, and how many steps of BK a tile.
__device__ __forceinline__ int tiles_of_item(const ScorerArgs& args, const Item& item) {
    const int all = (args.classes + Hopper::BN - 1) / Hopper::BN;
    return smaller(args.group_tiles, all - item.group * args.group_tiles);
}
__device__ __forceinline__ int steps_of_tile(const ScorerArgs& args) {
    return (args.width + Hopper::BK - 1) / Hopper::BK;
}

/// One warp: all operands of all items of this block, in the order in which they are multiplied.
__device__ __forceinline__ void produce(const ScorerArgs& args, const hopper::TensorMap& hidden,
                                        const hopper::TensorMap& weight, const HopperShared& shared, int items) {
    const int lane = static_cast<int>(threadIdx.x) % 32, steps = steps_of_tile(args);
    Ring ring;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x); i < items; i += static_cast<int>(gridDim.x)) {
        const Item item = item_at(args, i);
        bool is_computed = false;
#pragma unroll 1
        for (int r = lane; r < Hopper::BM; r += 32) {
            is_computed = is_computed || read_token(args, item.tile * Hopper::BM + r).computed;
        }
        if (!__any_sync(0xffffffffu, is_computed)) continue;  // the consumers find the same
        const int tiles = tiles_of_item(args, item);
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile) {
            const int column = (item.group * args.group_tiles + tile) * Hopper::BN;
#pragma unroll 1
            for (int step = 0; step < steps; ++step, ring.next()) {
                if (lane == 0) {
                    hopper::wait(shared.empty(ring.slot), ring.round ^ 1);  // the stage's last round is multiplied
                    hopper::arrive_and_expect(shared.full(ring.slot), Hopper::STAGE_BYTES);
                    hopper::load_box(hidden, shared.hidden(ring.slot), shared.full(ring.slot), step * Hopper::BK,
                                     item.tile * Hopper::BM);
                    hopper::load_box(weight, shared.weight(ring.slot), shared.full(ring.slot), step * Hopper::BK,
                                     column);
                }
                __syncwarp();
            }
        }
    }
}

/// A warpgroup's part of an item's products and sums: what its two rows keep of the group's classes.
template <typename T, Sums SUMS>
__device__ __forceinline__ void consume(const ScorerArgs& args, const HopperShared& shared, Ring& ring,
                                        const Item& item, int tiles, const int* labels, All (&all)[2]) {
    // Logits of a row summed up at a time; those that come with a slope and a mass take more registers.
    constexpr int AT_A_TIME = 16;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int group_row = thread / 128 * 64, warp_row = thread / 32 * 16 + lane / 4;  // in the tile
    const int steps = steps_of_tile(args);
    const float inverse_softcap = args.softcap > 0 ? 1.0f / args.softcap : 0.0f;
    const bool has_bias = args.bias != nullptr;
    float z[hopper::ACCUMULATORS];

#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        const int first = (item.group * args.group_tiles + tile) * Hopper::BN + 2 * (lane % 4);
        int last_stage = 0;
        for (int step = 0; step < steps; ++step, ring.next()) {
            hopper::wait(shared.full(ring.slot), ring.round);  // the operands are there
            hopper::fence_products(z);
#pragma unroll
            for (int k = 0; k < Hopper::BK / 16; ++k) {
                hopper::start_product<T>(z, hopper::operand(shared.hidden(ring.slot), group_row, k),
                                         hopper::operand(shared.weight(ring.slot), 0, k), step > 0 || k > 0);
            }
            hopper::commit_products();
            hopper::fence_registers(z);
            if (step > 0) {
                hopper::wait_for_products<T, 1>();  // the step before is done: its stage may be overwritten
                if (lane == 0) hopper::arrive(shared.empty(last_stage));
            }
            last_stage = ring.slot;
        }
        hopper::wait_for_products<T, 0>();
        hopper::fence_registers(z);
        if (lane == 0) hopper::arrive(shared.empty(last_stage));

#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = warp_row + 8 * h, label = labels[row];
            float* own = args.own + static_cast<int64_t>(item.tile) * Hopper::BM + row;
#pragma unroll
            for (int part = 0; part < hopper::ACCUMULATORS / 2; part += AT_A_TIME) {
                float some[AT_A_TIME];
#pragma unroll
                for (int c = 0; c < AT_A_TIME; ++c) some[c] = z[(part + c) / 2 * 4 + 2 * h + c % 2];
                if (has_bias) {  // not in the accumulators from the start: wgmma would be serialized (C7511)
                    add_bias<T>(args, some, first + 4 * part);
                }
                keep_columns<SUMS>(args, inverse_softcap, some, first + 4 * part, label, own, all[h].kept,
                                   all[h].spread);
                __syncwarp();  // one part after the other, or registers spill
            }
        }
    }
}

template <typename T, Sums SUMS>
__device__ __forceinline__ void hopper_scorer(const ScorerArgs& args, const hopper::TensorMap& hidden,
                                              const hopper::TensorMap& weight, unsigned char* memory) {
    constexpr bool SPREAD = SUMS == Sums::spread;
    const int thread = static_cast<int>(threadIdx.x);
    const HopperShared shared{shared_address(memory)};
    if (thread == 0) {
        for (int stage = 0; stage < Hopper::STAGES; ++stage) {
            hopper::init_barrier(shared.full(stage), 1);
            hopper::init_barrier(shared.empty(stage), Hopper::CONSUMERS / 32);
        }
        hopper::publish_barriers();
        hopper::prefetch_map(hidden);
        hopper::prefetch_map(weight);
    }
    __syncthreads();  // the barriers are set before anybody waits at them

    const int items = args.row_tiles * args.groups;
    if (thread >= Hopper::CONSUMERS) {
        hopper::give_registers<24>();
        if (thread < Hopper::CONSUMERS + 32) produce(args, hidden, weight, shared, items);
        return;
    }
    hopper::take_registers<240>();

    const Consumers team;
    int* labels = reinterpret_cast<int*>(memory + Hopper::LABELS_AT);
    float* sums = reinterpret_cast<float*>(memory + Hopper::SUMS_AT);
    int* flags = reinterpret_cast<int*>(memory + Hopper::FLAGS_AT);
    const int64_t capacity = static_cast<int64_t>(args.row_tiles) * Hopper::BM;
    Ring ring;
    bool ends = false;
#pragma unroll 1
    for (int i = static_cast<int>(blockIdx.x); i < items; i += static_cast<int>(gridDim.x)) {
        const Item item = item_at(args, i);
        bool is_computed = false;
        if (thread < Hopper::BM) {
            const Token token = read_token(args, item.tile * Hopper::BM + thread);
            labels[thread] = token.label;
            is_computed = token.computed;
        }
        const bool is_needed = any_of_team(team, is_computed, flags);  // and the labels are there
        All all[2] = {{nothing_kept(), nothing_spread()}, {nothing_kept(), nothing_spread()}};
        consume<T, SUMS>(args, shared, ring, item, is_needed ? tiles_of_item(args, item) : 0, labels, all);

        const int row = item.tile * Hopper::BM + thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            merge_lanes<SPREAD>(all[h]);
            if (thread % 4 == 0) {
                store_slot<SPREAD>(args, capacity, item.group, row + 8 * h, all[h].kept, all[h].spread);
            }
        }
        if (args.head != nullptr && item.group == 0 && is_needed) {
            store_hidden_squares<T, Hopper::BM>(args, item.tile, team);
        }
        // Its barriers also keep the next item's labels and flag from those who still read this one's.
        ends = finish_item<Hopper::BM, SPREAD>(args, item.tile, team, sums, flags + 1);
    }
    // Who has ended the launch has no item left, and so no copy or product under way.
    if (ends) choose(args, team, memory);
}

}  // namespace attent::gpu::scorer
