// The Hopper kernel's memory, and the warp that copies: which unit is next, its queries, and its keys and values through
// two rings of slots. The kernel's header is scored_attention_sm90.cuh.
#pragma once

#include "attention_tile.cuh"
#include "hopper.cuh"

namespace attent::gpu {

// Everything about the kernel that is known when it is compiled; the names that the portable kernel's TileOf has mean the
// same, for the code that both share. Accumulators of a warpgroup's product are a warp's: [1][columns / 8][4].
template <typename T_, int WIDTH_>
struct HopperTile {
    using T = T_;
    static constexpr bool FEW = false;
    static constexpr HopperShape SHAPE{WIDTH_};
    static constexpr int WIDTH = WIDTH_, BLOCK_M = SHAPE.BLOCK_M, BLOCK_N = SHAPE.BLOCK_N, SLOTS = SHAPE.slots();
    static constexpr int ROW_TILES = 1, ROW_WARPS = 8, KEY_WARPS = 1, WARP_ROWS = 16, WARP_KEYS = BLOCK_N;
    static constexpr int THREADS = SHAPE.CONSUMERS;  // that hold the tile, the block's first
    static constexpr int ROWS_BYTES = SHAPE.rows_bytes(), END_BYTES = SHAPE.end_bytes();
    static constexpr int HALF_BYTES = BLOCK_N * hopper::ROW_BYTES;  // of 64 columns, as tensor maps load them
    __device__ static constexpr Block block() { return {THREADS, false, 1}; }
    static_assert(ROW_WARPS * WARP_ROWS == BLOCK_M && 32 * ROW_WARPS == THREADS && BLOCK_M == BLOCK_N, "whole tiles");
};

// Where things are in shared memory. Barriers, each with who arrives at it:
template <typename C>
struct HopperMemory {
    SharedAddress base;

    __device__ SharedAddress queries() const { return base + C::SHAPE.queries_at(); }
    __device__ SharedAddress keys(int slot) const { return base + C::SHAPE.keys_at() + slot * C::ROWS_BYTES; }
    __device__ SharedAddress values(int slot) const { return base + C::SHAPE.values_at() + slot * C::ROWS_BYTES; }

    __device__ SharedAddress barrier(int i) const { return base + C::SHAPE.barriers_at() + 8 * i; }
    // The unit is described, and its queries' bytes are there: the copying warp.
    __device__ SharedAddress unit_is_there() const { return barrier(0); }
    // The unit's queries have been multiplied for the last time: all 8 multiplying warps.
    __device__ SharedAddress queries_are_read() const { return barrier(1); }
    // Values that are still to be cut to the example's keys are there: the copying warp, for itself.
    __device__ SharedAddress values_landed() const { return barrier(2); }
    // The slot's bytes are there (the copying warp), and have been multiplied (all 8).
    __device__ SharedAddress keys_are_there(int slot) const { return barrier(3 + slot); }
    __device__ SharedAddress values_are_there(int slot) const { return barrier(3 + C::SLOTS + slot); }
    __device__ SharedAddress keys_are_read(int slot) const { return barrier(3 + 2 * C::SLOTS + slot); }
    __device__ SharedAddress values_are_read(int slot) const { return barrier(3 + 3 * C::SLOTS + slot); }
};

// By one thread, before all others' first use behind a barrier of the block.
template <typename C>
__device__ __forceinline__ void init_barriers(const HopperMemory<C>& memory) {
    hopper::init_barrier(memory.unit_is_there(), 1);
    hopper::init_barrier(memory.queries_are_read(), C::ROW_WARPS);
    hopper::init_barrier(memory.values_landed(), 1);
    for (int slot = 0; slot < C::SLOTS; ++slot) {
        hopper::init_barrier(memory.keys_are_there(slot), 1);
        hopper::init_barrier(memory.values_are_there(slot), 1);
        hopper::init_barrier(memory.keys_are_read(slot), C::ROW_WARPS);
        hopper::init_barrier(memory.values_are_read(slot), C::ROW_WARPS);
    }
    hopper::publish_barriers();
}

// What the copying warp tells the others of a unit.
struct HopperUnit {
    Unit unit;
    KeyTiles tiles;
    bool is_end;  // no unit: there are no more
};

struct TensorMaps {
    hopper::TensorMap query, key, value;
};

// The next unit of this block: units are taken as blocks come for them, so that none waits for a long one. The ticket of
// units is drawn `units` times in a launch: by each block once more than it takes units behind its first one.
__device__ __forceinline__ int draw_unit(int* ticket, int units) {
    const int drawn = atomicAdd(ticket, 1);
    if (drawn == units - 1) *ticket = 0;  // nobody draws after this: for the next launch
    return static_cast<int>(gridDim.x) + drawn;
}

// A tile of rows of a head, 64 columns at a time.
template <typename C>
__device__ __forceinline__ void load_rows(const hopper::TensorMap& map, SharedAddress to, SharedAddress barrier,
                                          int row, int head, int example) {
#pragma unroll
    for (int half = 0; half < C::WIDTH / 64; ++half) {
        hopper::load_box(map, to + half * C::HALF_BYTES, barrier, 64 * half, row, head, example);
    }
}

// One warp: all queries, keys and values of all units of this block, in the order in which they are multiplied.
template <typename C>
__device__ __forceinline__ void copy_units(const ScoredAttention& a, const TensorMaps& maps,
                                           const HopperMemory<C>& memory, HopperUnit* described, int tiles_a_head,
                                           int units) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    hopper::Ring<C::SLOTS> keys, values;
    uint32_t landed = 0;
    int* ticket = a.workspace.tickets + 1 + num_groups(a.sizes) + a.sizes.examples;
    int next = static_cast<int>(blockIdx.x);
#pragma unroll 1
    for (uint32_t number = 0;;) {
        const int current = next;
        const bool is_end = current >= units;
        Unit unit{};
        KeyTiles tiles{};
        if (!is_end) {
            unit = find_unit(a, current, tiles_a_head, 1, C::BLOCK_M, lane);
            tiles = key_tiles<C>(a, unit, 1);
            if (lane == 0) next = draw_unit(ticket, units);
            next = __shfl_sync(0xffffffffu, next, 0);
            const bool is_nobodys = a.sizes.is_packed && unit.own_tile >= unit.own_tiles;
            if (is_nobodys) continue;
        }
        const int key_head = unit.head / a.sizes.heads_per_key, example = a.sizes.is_packed ? 0 : unit.example;
        if (lane == 0) {
            // All have multiplied the last unit's queries, which these overwrite. So all are done with the unit before
            // that one, whose description this one overwrites.
            hopper::wait(memory.queries_are_read(), (number & 1) ^ 1);
            described[number & 1] = {unit, tiles, is_end};
            if (tiles.count > 0) {
                hopper::arrive_and_expect(memory.unit_is_there(), C::ROWS_BYTES);
                load_rows<C>(maps.query, memory.queries(), memory.unit_is_there(), unit.queries.first + unit.first_row,
                             unit.head, example);
            } else {
                hopper::arrive(memory.unit_is_there());
            }
        }
        __syncwarp();
        if (is_end) return;
        ++number;

        // Tile after tile, values one tile behind keys.
#pragma unroll 1
        for (int tile = 0; tile <= tiles.count; ++tile) {
            const int row = unit.keys.first + tiles.low + tile * C::BLOCK_N;
            if (tile < tiles.count) {
                if (lane == 0) {
                    hopper::wait(memory.keys_are_read(keys.slot), keys.round ^ 1);  // all have, in the round before
                    hopper::arrive_and_expect(memory.keys_are_there(keys.slot), C::ROWS_BYTES);
                    load_rows<C>(maps.key, memory.keys(keys.slot), memory.keys_are_there(keys.slot), row, key_head,
                                 example);
                }
                keys.next();
            }
            if (tile > 0) {
                // Rows behind the example's last key belong to others or to nobody: their probabilities are 0, but 0
                // times what is there may be NaN. Behind the tensor's last row tensor maps load zeros.
                const int own = unit.keys.first + unit.keys.rows - (row - C::BLOCK_N);
                const bool is_cut = own < C::BLOCK_N && unit.keys.first + unit.keys.rows < a.sizes.keys;
                const SharedAddress there = memory.values_are_there(values.slot);
                const SharedAddress landing = is_cut ? memory.values_landed() : there;
                if (lane == 0) {
                    hopper::wait(memory.values_are_read(values.slot), values.round ^ 1);  // as of the keys
                    hopper::arrive_and_expect(landing, C::ROWS_BYTES);
                    load_rows<C>(maps.value, memory.values(values.slot), landing, row - C::BLOCK_N, key_head, example);
                }
                if (is_cut) {
                    hopper::wait(landing, landed);  // the copy does not overwrite the zeros
                    landed ^= 1;
#pragma unroll
                    for (int half = 0; half < C::WIDTH / 64; ++half) {
                        const SharedAddress start = memory.values(values.slot) + half * C::HALF_BYTES;
#pragma unroll 1
                        for (int at = own * hopper::ROW_BYTES + 16 * lane; at < C::HALF_BYTES; at += 16 * 32) {
                            store_shared_16(start + at, make_uint4(0, 0, 0, 0));
                        }
                    }
                    hopper::publish_stores();
                    __syncwarp();  // all lanes' zeros are there
                    if (lane == 0) hopper::arrive(there);
                }
                values.next();
            }
            __syncwarp();
        }
    }
}

}  // namespace attent::gpu
