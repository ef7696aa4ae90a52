// Where examples are in memory, padded [B, H, T, .] or packed [total, H, .], which tile of rows is whose, and which keys
// a query looks at.
//
// Query t of an example with R queries and K keys stands at position t + K - R: the last query beside the last key. It
// looks at keys position - left ... position + right, cut to the keys there are; causal attention is right = 0.
//
// Lengths and cu_seqlens come unread: lengths are clamped to the tensor, cu_seqlens are clamped and made non-decreasing.
// So whatever they hold no address lies outside, and every example gets its tiles. Offsets into tensors are 64-bit, row
// numbers 32-bit.

#pragma once

#include "scored_attention.h"
#include "tile.cuh"

namespace attent::gpu {

// Entries of cu_seqlens that a lane looks at together.
constexpr int CU_A_LANE = 8;

struct Segment {
    int first, rows;  // the example's first row in its tensor (0 if padded), and how many it has
};

__host__ __device__ __forceinline__ int clamped(int64_t x, int most) {
    return x < 0 ? 0 : x > most ? most : static_cast<int>(x);
}

// How many tiles an example owns: at least one, so that somebody counts for it.
__host__ __device__ __forceinline__ int num_tiles(int rows, int block) {
    return rows <= block ? 1 : (rows + block - 1) / block;
}

// How many tiles hold all packed examples, whatever cu_seqlens holds.
__host__ __device__ __forceinline__ int packed_tiles(int total, int examples, int block) {
    return total / block + 1 + examples;
}

// First key that query `row` looks at, and one past the last; both rise with the row. Empty: last is not above first.
struct KeyRange {
    int first, last;
};
__host__ __device__ __forceinline__ KeyRange keys_of(int row, int rows, int keys, int left, int right) {
    const int position = row + keys - rows;
    KeyRange range{0, keys};
    if (left >= 0) range.first = position - left > 0 ? position - left : 0;
    if (right >= 0) range.last = position + right + 1 < keys ? position + right + 1 : keys;
    return range;
}

__device__ __forceinline__ int max_of_lanes_before(int x, int lane) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, x, distance);
        if (lane >= distance) x = max(x, other);
    }
    return x;
}

// First row and rows of a packed example. Called by whole warps.
__device__ inline Segment find_packed_segment(const int32_t* cu, int example, int total, int lane) {
    int first = 0;
    for (int i = lane; i <= example; i += 32) first = max(first, min(cu[i], total));
    first = __shfl_sync(0xffffffffu, max_of_lanes_before(first, lane), 31);
    const int last = min(cu[example + 1], total);
    return {first, max(last, first) - first};
}

__device__ inline Segment find_segment(const Segments& segments, int example, int lane) {
    if (segments.cu != nullptr) return find_packed_segment(segments.cu, example, segments.most, lane);
    if (segments.lengths == nullptr) return {0, segments.most};
    const int64_t given = segments.lengths_are_64_bits ? static_cast<const int64_t*>(segments.lengths)[example]
                                                       : static_cast<const int32_t*>(segments.lengths)[example];
    return {0, clamped(given, segments.most)};
}

struct PackedTile {
    int example;
    Segment rows;
    int own_tile;    // its number within the example; one past the last or more: nobody's tile
    int first_tile;  // of the example
};

// Of the tiles of `block` rows that packed examples are cut into: whose the `tile`-th is, and which of its own.
//
// Example b's tiles start at first_row / block + b, which leaves room for ceil(rows / block) of them and for one if it
// has no rows; so packed_tiles hold all. Some are nobody's. Called by whole warps.
__device__ inline PackedTile find_packed_tile(const int32_t* cu, int examples, int total, int tile, int block,
                                              int lane) {
    int started = 0, first = 0, highest = 0;  // highest: of cu_seqlens so far
    for (int start = 0; start < examples; start += 32 * CU_A_LANE) {
        int row[CU_A_LANE], largest = 0;
#pragma unroll
        for (int j = 0; j < CU_A_LANE; ++j) {
            const int i = start + lane * CU_A_LANE + j;
            largest = max(largest, i < examples ? min(cu[i], total) : 0);
            row[j] = largest;
        }
        const int up_to_here = max_of_lanes_before(largest, lane);
        const int before = __shfl_up_sync(0xffffffffu, up_to_here, 1);
        const int from = lane == 0 ? highest : max(before, highest);
        int here = 0, last_started = 0;
#pragma unroll
        for (int j = 0; j < CU_A_LANE; ++j) {
            const int i = start + lane * CU_A_LANE + j, at = max(row[j], from);
            if (i < examples && at / block + i <= tile) ++here, last_started = at;
        }
        first = max(first, __shfl_sync(0xffffffffu, max_of_lanes_before(last_started, lane), 31));
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) here += __shfl_xor_sync(0xffffffffu, here, distance);
        started += here;
        highest = max(highest, __shfl_sync(0xffffffffu, up_to_here, 31));
        if (here < 32 * CU_A_LANE) break;  // rows rise, so no later example has started
    }
    PackedTile found;
    found.example = max(started - 1, 0);
    const int last = min(cu[found.example + 1], total);
    found.first_tile = first / block + found.example;
    found.rows = {first, max(last, first) - first};
    // Before the first example's first tile, which a cu_seqlens that does not start at 0 has, nobody has started.
    found.own_tile = started == 0 ? num_tiles(found.rows.rows, block) : tile - found.first_tile;
    return found;
}

// What one block works on.
struct Unit {
    int example, head, split;
    Segment queries, keys;
    int own_tile, own_tiles;        // own_tile >= own_tiles: padding, or nobody's
    int64_t first_tile, all_tiles;  // of the example, and of a head: where its slots are
    int first_row, end_row;         // of the example, that are computed
    int64_t tile;                   // of all heads: its ticket, with splits

    __device__ __forceinline__ int64_t slot() const { return head * all_tiles + first_tile + own_tile; }
};

// Units are [heads, tiles] of packed examples, [examples, heads, tiles] of padded ones, each with its splits.
__device__ inline Unit find_unit(const ScoredAttention& a, int64_t block, int tiles, int splits, int block_m,
                                 int lane) {
    const AttentionSizes& sizes = a.sizes;
    Unit unit;
    unit.split = static_cast<int>(block % splits);
    unit.tile = block / splits;
    int tile = static_cast<int>(unit.tile % tiles);
    const int64_t head = unit.tile / tiles;
    unit.head = static_cast<int>(head % sizes.heads);
    unit.all_tiles = sizes.is_packed ? tiles : static_cast<int64_t>(sizes.examples) * tiles;
    if (sizes.is_packed && !sizes.only_pooled_row) {
        const PackedTile found = find_packed_tile(a.queries.cu, sizes.examples, a.queries.most, tile, block_m, lane);
        unit.example = found.example;
        unit.queries = found.rows;
        unit.own_tile = found.own_tile;
        unit.first_tile = found.first_tile;
    } else {
        unit.example = sizes.is_packed ? tile : static_cast<int>(head / sizes.heads);
        unit.queries = find_segment(a.queries, unit.example, lane);
        if (a.right >= 0) tile = tiles - 1 - tile;  // later rows look at more keys: they start first
        unit.own_tile = sizes.only_pooled_row ? 0 : tile;
        unit.first_tile = sizes.is_packed ? unit.example : static_cast<int64_t>(unit.example) * tiles;
    }
    unit.keys = find_segment(a.keys, unit.example, lane);
    if (sizes.only_pooled_row) {
        unit.first_row = a.classifier.pool == Pool::last ? max(unit.queries.rows - 1, 0) : 0;
        unit.end_row = min(unit.first_row + 1, unit.queries.rows);
        unit.own_tiles = 1;
    } else {
        unit.first_row = unit.own_tile * block_m;
        unit.end_row = unit.queries.rows;
        unit.own_tiles = num_tiles(unit.queries.rows, block_m);
    }
    return unit;
}

// Where a row begins; `row` counts from the tensor's first.
template <typename T>
__device__ __forceinline__ T* row_of(const Rows& rows, int example, int head, int64_t row) {
    return static_cast<T*>(rows.data) + example * rows.example + head * rows.head + row * rows.row;
}

}  // namespace attent::gpu
