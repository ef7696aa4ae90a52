// Few queries: the keys of a tile of 16 rows are split over the warps of a block, and over blocks. Every part leaves its
// maxima, sums and weighted sums in its slot, and parts are folded in the order of their keys.
//
// A slot: maxima [16], sums [16], weighted sums [16][part_pitch].

#pragma once

#include "attention_tile.cuh"
#include "tickets.cuh"

namespace attent::gpu {

// A thread's share of a tile of 16 rows: every 8 threads take a row, 4 columns in turn.
template <int WIDTH>
struct RowPart {
    float max, sum;
    float4 output[WIDTH / 32];
};

// From accumulators to a slot in shared memory.
template <typename C>
__device__ __forceinline__ void store_part(float* slot, const Found<C>& found, const Lane& at) {
    if (at.column == 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            slot[at.row + 8 * half] = found.max[0][half];
            slot[16 + at.row + 8 * half] = found.sum[0][half];
        }
    }
#pragma unroll
    for (int n = 0; n < C::WIDTH / 8; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float* place = slot + 32 + (at.row + 8 * half) * part_pitch(C::WIDTH) + 8 * n + at.column;
            *reinterpret_cast<float2*>(place) =
                make_float2(found.output[0][n][2 * half], found.output[0][n][2 * half + 1]);
        }
    }
}

// From a slot in shared memory to accumulators.
template <typename C>
__device__ __forceinline__ void load_part(Found<C>& found, const float* slot, const Lane& at) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = at.row + 8 * half;
        found.max[0][half] = slot[row];
        found.sum[0][half] = slot[16 + row];
#pragma unroll
        for (int n = 0; n < C::WIDTH / 8; ++n) {
            const float2 two =
                *reinterpret_cast<const float2*>(slot + 32 + row * part_pitch(C::WIDTH) + 8 * n + at.column);
            found.output[0][n][2 * half] = two.x;
            found.output[0][n][2 * half + 1] = two.y;
        }
    }
}

// Fold `parts` slots, side by side, in order. FROM_OTHERS: other blocks stored them.
template <int WIDTH, bool FROM_OTHERS>
__device__ __forceinline__ void fold_parts(RowPart<WIDTH>& folded, const float* slots, int parts, int thread) {
    const int row = thread / 8, column = thread % 8 * 4;
    folded.max = minus_infinity();
    folded.sum = 0.0f;
#pragma unroll
    for (int j = 0; j < WIDTH / 32; ++j) folded.output[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int part = 0; part < parts; ++part) {
        const float* slot = slots + static_cast<int64_t>(part) * part_floats(WIDTH);
        const float other_max = FROM_OTHERS ? __ldcg(slot + row) : slot[row];
        const float other_sum = FROM_OTHERS ? __ldcg(slot + 16 + row) : slot[16 + row];
        const Fold factors = fold(folded.max, other_max);
        folded.sum = folded.sum * factors.scale + other_sum * factors.other_scale;
#pragma unroll
        for (int j = 0; j < WIDTH / 32; ++j) {
            const auto* place = reinterpret_cast<const float4*>(slot + 32 + row * part_pitch(WIDTH) + column + 32 * j);
            const float4 other = FROM_OTHERS ? __ldcg(place) : *place;
            float4& own = folded.output[j];
            own.x = own.x * factors.scale + other.x * factors.other_scale;
            own.y = own.y * factors.scale + other.y * factors.other_scale;
            own.z = own.z * factors.scale + other.z * factors.other_scale;
            own.w = own.w * factors.scale + other.w * factors.other_scale;
        }
    }
}

template <int WIDTH>
__device__ __forceinline__ void store_folded(float* slot, const RowPart<WIDTH>& folded, int thread) {
    const int row = thread / 8, column = thread % 8 * 4;
    if (column == 0) {
        slot[row] = folded.max;
        slot[16 + row] = folded.sum;
    }
#pragma unroll
    for (int j = 0; j < WIDTH / 32; ++j) {
        *reinterpret_cast<float4*>(slot + 32 + row * part_pitch(WIDTH) + column + 32 * j) = folded.output[j];
    }
}

// Fold the parts of the block's warps, and those of the tile's blocks if this one is the last of them to come. Whether
// the whole is in the first warp's `found` now.
template <typename C>
__device__ __forceinline__ bool fold_keys(Found<C>& found, const ScoredAttention& a, const Unit& unit, int splits,
                                          int* tile_tickets, const Lane& at) {
    static_assert(C::THREADS == 128 && C::KEY_WARPS * part_floats(C::WIDTH) * 4 <= C::SHAPE.shared_bytes());
    auto* slots = reinterpret_cast<float*>(dynamic_shared());
    wait_for_copies<0>();
    __syncthreads();  // nobody reads queries, keys or values any more: parts take their place
    store_part(slots + at.warp * part_floats(C::WIDTH), found, at);
    __syncthreads();  // all parts are there
    RowPart<C::WIDTH> folded;
    fold_parts<C::WIDTH, false>(folded, slots, C::KEY_WARPS, at.thread);
    if (splits > 1) {
        float* of_tile = a.workspace.split_slots + unit.tile * splits * part_floats(C::WIDTH);
        store_folded<C::WIDTH>(of_tile + static_cast<int64_t>(unit.split) * part_floats(C::WIDTH), folded, at.thread);
        if (!take_ticket(tile_tickets + unit.tile, splits, a.workspace.delayed)) return false;
        fold_parts<C::WIDTH, true>(folded, of_tile, splits, at.thread);
    }
    __syncthreads();  // all have read the parts in shared memory before the whole takes their place
    store_folded<C::WIDTH>(slots, folded, at.thread);
    __syncthreads();  // the whole is there
    if (at.warp == 0) load_part(found, slots, at);
    __syncthreads();  // the first warp has read it before its place is used again
    return true;
}

}  // namespace attent::gpu
