// The loop of attention: a tile of queries over the keys that it looks at, with an online softmax.
//
// Keys and values lie in a ring of slots in shared memory, a tile of keys and its tile of values in turn, each copied
// asynchronously while tiles before it are multiplied. One barrier an item: behind it everybody sees the item that has
// landed, and nobody reads the item before it any more, whose slot the next copy takes.
//
// Products are accumulated in float32. What multiplies v is rounded to v's dtype first, and the sum of probabilities is
// of those that are not rounded.

#pragma once

#include "attention_layout.cuh"
#include "mma.cuh"
#include "softmax.cuh"

namespace attent::gpu {

// Everything about a block that is known when it is compiled.
template <typename T_, int WIDTH_, bool FEW_>
struct TileOf {
    using T = T_;
    static constexpr bool FEW = FEW_;
    static constexpr TileShape SHAPE = tile_shape(WIDTH_, FEW_);
    static constexpr int WIDTH = SHAPE.width, BLOCK_M = SHAPE.block_m(), BLOCK_N = SHAPE.block_n, SLOTS = SHAPE.slots;
    static constexpr int ROW_TILES = SHAPE.row_tiles, ROW_WARPS = SHAPE.row_warps, KEY_WARPS = SHAPE.key_warps;
    static constexpr int THREADS = SHAPE.threads(), WARP_ROWS = 16 * ROW_TILES, WARP_KEYS = BLOCK_N / KEY_WARPS;
    // Shared memory: the tile of rows, then what its end may use, all of it.
    static constexpr int ROWS_BYTES = SHAPE.query_bytes(), END_BYTES = SHAPE.shared_bytes();
    __device__ static constexpr Block block() { return {THREADS}; }
    static_assert(WIDTH == WIDTH_ && WARP_KEYS % 16 == 0 && SLOTS >= 2, "whole products");
};

// What a warp has found of its rows. Of accumulators [.][.][4], and of rows [.][2], see mma.cuh.
template <typename C>
struct Found {
    float output[C::ROW_TILES][C::WIDTH / 8][4];
    float max[C::ROW_TILES][2];
    float sum[C::ROW_TILES][2];  // of the lane's own columns, until the loop is done
};

struct Lane {
    int thread, warp, lane;
    int row, column;  // of an accumulator's first number: lane / 4, 2 (lane % 4)
};
__device__ __forceinline__ Lane this_lane() {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    return {thread, thread / 32, lane, lane / 4, lane % 4 * 2};
}

// Shared memory begins with a tile [BLOCK_M][WIDTH] of rows: queries, later target and output; then the ring.
template <typename C>
__device__ __forceinline__ SharedAddress row_tile() {
    return shared_address(dynamic_shared());
}
// Slots start at multiples of 128 bytes, so that an address in a slot is the slot's plus one in the first.
template <typename C>
__device__ __forceinline__ SharedAddress ring_slot(int item) {
    return row_tile<C>() + C::SHAPE.query_bytes() + item % C::SLOTS * C::SHAPE.slot_bytes();
}

// The keys of one block: `count` tiles of BLOCK_N from `low` on. In tiles within [inner_low, inner_high) every row looks
// at every key; keys rise with rows, so only those before and behind need masks.
struct KeyTiles {
    int low, inner_low, inner_high, count;
};
template <typename C>
__device__ __forceinline__ KeyTiles key_tiles(const ScoredAttention& a, const Unit& unit, int splits) {
    const int rows = unit.queries.rows, keys = unit.keys.rows;
    const int last_row = min(unit.first_row + C::BLOCK_M, unit.end_row) - 1;
    if (last_row < unit.first_row) return {0, 0, 0, 0};
    const KeyRange first = keys_of(unit.first_row, rows, keys, a.left, a.right);
    const KeyRange last = keys_of(last_row, rows, keys, a.left, a.right);
    KeyTiles tiles{first.first / C::BLOCK_N * C::BLOCK_N, last.first, first.last, 0};
    int high = last.last;
    if (splits > 1) {
        const int all = (max(high - tiles.low, 0) + C::BLOCK_N - 1) / C::BLOCK_N;
        const int keys_a_split = (all + splits - 1) / splits * C::BLOCK_N;
        tiles.low += unit.split * keys_a_split;
        high = min(high, tiles.low + keys_a_split);
    }
    tiles.count = (max(high - tiles.low, 0) + C::BLOCK_N - 1) / C::BLOCK_N;
    return tiles;
}

// What the loop looks at of what the block works on. In shared memory, where it takes no registers.
template <typename T>
struct KeySource {
    const T* key;  // the example's first, of the head
    const T* value;
    int rows, keys;  // of the example
    KeyTiles tiles;
};
template <typename C>
__device__ __forceinline__ KeySource<typename C::T> key_source(const ScoredAttention& a, const Unit& unit, int splits) {
    using T = typename C::T;
    const int head = unit.head / a.sizes.heads_per_key;
    return {row_of<T>(a.key, unit.example, head, unit.keys.first),
            row_of<T>(a.value, unit.example, head, unit.keys.first), unit.queries.rows, unit.keys.rows,
            key_tiles<C>(a, unit, splits)};
}

// Start to copy the ring's `item`-th tile: even ones are keys, odd ones values. One group of copies, if empty.
template <typename C>
__device__ __forceinline__ void copy_item(const ScoredAttention& a, const KeySource<typename C::T>& source, int item,
                                          int thread) {
    if (item < 2 * source.tiles.count) {
        const bool is_key = item % 2 == 0;
        const int first = source.tiles.low + item / 2 * C::BLOCK_N;
        const int64_t stride = is_key ? a.key.row : a.value.row;
        copy_tile_async<typename C::T, C::BLOCK_N, C::WIDTH, C::THREADS>(
            ring_slot<C>(item), (is_key ? source.key : source.value) + first * stride, stride, source.keys - first,
            is_key ? a.sizes.width : a.sizes.value_width, thread);
    }
    commit_copies();
}

// S = Q K^T of this warp's rows and keys, from where the lane reads its first queries and keys.
template <typename C>
__device__ __forceinline__ void multiply_keys(float (&s)[C::ROW_TILES][C::WARP_KEYS / 8][4], SharedAddress queries,
                                              SharedAddress keys) {
#pragma unroll
    for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < C::WARP_KEYS / 8; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < C::WIDTH / 16; ++step) {
        uint32_t query[C::ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < C::ROW_TILES; ++m) {
            ldmatrix(query[m], moved<C::WIDTH>(queries, 16 * m, 2 * step));
        }
#pragma unroll
        for (int pair = 0; pair < C::WARP_KEYS / 16; ++pair) {
            uint32_t key[4];
            ldmatrix(key, moved<C::WIDTH>(keys, 16 * pair, 2 * step));
            const uint32_t first[2] = {key[0], key[1]}, second[2] = {key[2], key[3]};
#pragma unroll
            for (int m = 0; m < C::ROW_TILES; ++m) {
                mma_16x8x16<typename C::T>(s[m][2 * pair], query[m], first);
                mma_16x8x16<typename C::T>(s[m][2 * pair + 1], query[m], second);
            }
        }
    }
}

// Accumulators of two products side by side, rounded, as A of the next (mma.cuh).
template <typename T>
__device__ __forceinline__ void round_to_operand(uint32_t (&a)[4], const float (&first)[4], const float (&second)[4]) {
    a[0] = pack<T>(first[0], first[1]);
    a[1] = pack<T>(first[2], first[3]);
    a[2] = pack<T>(second[0], second[1]);
    a[3] = pack<T>(second[2], second[3]);
}

// O += P V, from where the lane reads its first values; P is s, rounded.
template <typename C>
__device__ __forceinline__ void multiply_values(Found<C>& found, const float (&s)[C::ROW_TILES][C::WARP_KEYS / 8][4],
                                                SharedAddress values) {
    using T = typename C::T;
#pragma unroll
    for (int step = 0; step < C::WARP_KEYS / 16; ++step) {
        uint32_t p[C::ROW_TILES][4];
#pragma unroll
        for (int m = 0; m < C::ROW_TILES; ++m) round_to_operand<T>(p[m], s[m][2 * step], s[m][2 * step + 1]);
#pragma unroll
        for (int pair = 0; pair < C::WIDTH / 16; ++pair) {
            uint32_t value[4];
            ldmatrix_transposed(value, moved<C::WIDTH>(values, 16 * step, 2 * pair));
            const uint32_t first[2] = {value[0], value[1]}, second[2] = {value[2], value[3]};
#pragma unroll
            for (int m = 0; m < C::ROW_TILES; ++m) {
                mma_16x8x16<T>(found.output[m][2 * pair], p[m], first);
                mma_16x8x16<T>(found.output[m][2 * pair + 1], p[m], second);
            }
        }
    }
}

// Logits in base 2 from products, but for the factor that is returned: it is left to the exponent's multiply-add.
template <typename C>
__device__ __forceinline__ float to_logits(float (&s)[C::ROW_TILES][C::WARP_KEYS / 8][4], const ScoredAttention& a,
                                           int rows, int keys, bool is_masked, int first_row, int first_key) {
    float factor = fabsf(a.scale) * LOG2_E;
    if (a.scale < 0.0f) {  // the maximum of what is to be multiplied by the factor is taken: it has to be positive
#pragma unroll
        for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
            for (int n = 0; n < C::WARP_KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = -s[m][n][i];
            }
        }
    }
    if (a.softcap > 0.0f) {
        const float scale = fabsf(a.scale), capped = -2.0f * LOG2_E / a.softcap;
#pragma unroll
        for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
            for (int n = 0; n < C::WARP_KEYS / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = cap(s[m][n][i] * scale, a.softcap, capped) * LOG2_E;
            }
        }
        factor = 1.0f;
    }
    if (is_masked) {
#pragma unroll
        for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_row + 16 * m + 8 * half;
                const KeyRange range = keys_of(row, rows, keys, a.left, a.right);
#pragma unroll
                for (int n = 0; n < C::WARP_KEYS / 8; ++n) {
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        const int key = first_key + 8 * n + i % 2;
                        const bool is_seen = key >= range.first && key < range.last;
                        s[m][n][i] = is_seen ? s[m][n][i] * factor : minus_infinity();  // 0 x infinity is NaN
                    }
                }
            }
        }
        factor = 1.0f;
    }
    return factor;
}

// Probabilities of 16 rows from their logits, and their maxima and sums with them. `shrink` is what their output so far
// is still to be multiplied with.
template <typename C>
__device__ __forceinline__ void add_to_softmax(Found<C>& found, float (&s)[C::ROW_TILES][C::WARP_KEYS / 8][4], int m,
                                               float factor, float (&shrink)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float largest = minus_infinity();
#pragma unroll
        for (int n = 0; n < C::WARP_KEYS / 8; ++n) {
            largest = fmaxf(largest, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        }
        const float both = fmaxf(found.max[m][half], max_of_row(largest) * factor), pivot = pivot_of(both);
        shrink[half] = fast_exp2(found.max[m][half] - pivot);
        found.max[m][half] = both;
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < C::WARP_KEYS / 8; ++n) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                s[m][n][i] = fast_exp2(fmaf(s[m][n][i], factor, -pivot));
                sum += s[m][n][i];
            }
        }
        found.sum[m][half] = fmaf(found.sum[m][half], shrink[half], sum);
    }
}

template <typename C>
__device__ __forceinline__ void shrink_output(Found<C>& found, int m, const float (&shrink)[2]) {
#pragma unroll
    for (int n = 0; n < C::WIDTH / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) found.output[m][n][i] *= shrink[i / 2];
    }
}

// Start to copy this warp's rows of the target, if there is one, over its queries.
template <typename C>
__device__ __forceinline__ void copy_target(const ScoredAttention& a, const Unit& unit, int warp_row, int lane) {
    using T = typename C::T;
    if (a.target.data == nullptr) return;
    __syncwarp();  // all lanes have read the queries
    const int first = unit.first_row + warp_row;
    const T* start = row_of<T>(a.target, unit.example, unit.head, static_cast<int64_t>(unit.queries.first) + first);
    copy_tile_async<T, C::WARP_ROWS, C::WIDTH, 32, 1>(row_tile<C>() + warp_row * C::WIDTH * 2, start, a.target.row,
                                                      unit.end_row - first, a.sizes.value_width, lane);
    commit_copies();
}

// What this warp finds of its rows and its part of the keys; sums are of whole rows. `unit` and `source` are in shared
// memory.
template <typename C>
__device__ __forceinline__ void attend(Found<C>& found, const ScoredAttention& a, const Unit& unit,
                                       const KeySource<typename C::T>& source, const Lane& at) {
    using T = typename C::T;
    const int warp_row = at.warp % C::ROW_WARPS * C::WARP_ROWS, warp_key = at.warp / C::ROW_WARPS * C::WARP_KEYS;
#pragma unroll
    for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < C::WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) found.output[m][n][i] = 0.0f;
        }
        found.max[m][0] = found.max[m][1] = minus_infinity();
        found.sum[m][0] = found.sum[m][1] = 0.0f;
    }

    // The queries land with the first item: they are in its group.
    const T* queries =
        row_of<T>(a.query, unit.example, unit.head, static_cast<int64_t>(unit.queries.first) + unit.first_row);
    copy_tile_async<T, C::BLOCK_M, C::WIDTH, C::THREADS>(row_tile<C>(), queries, a.query.row,
                                                         unit.end_row - unit.first_row, a.sizes.width, at.thread);
#pragma unroll
    for (int item = 0; item < C::SLOTS - 1; ++item) copy_item<C>(a, source, item, at.thread);

    const int first_row = unit.first_row + warp_row + at.row;
    SharedAddress own_queries = start_of_a<C::WIDTH>(row_tile<C>(), warp_row, at.lane);
    SharedAddress own_keys = start_of_b_of_rows<C::WIDTH>(0, warp_key, at.lane);
    SharedAddress own_values = start_of_b<C::WIDTH>(0, warp_key, at.lane);
#pragma unroll 1
    for (int tile = 0; tile < source.tiles.count; ++tile) {
        const int first_key = source.tiles.low + tile * C::BLOCK_N;
        wait_for_copies<C::SLOTS - 2>();
        // Everybody's copies of these keys are visible, and nobody reads the values before them any more.
        __syncthreads();
        copy_item<C>(a, source, 2 * tile + C::SLOTS - 1, at.thread);
        float s[C::ROW_TILES][C::WARP_KEYS / 8][4];
        compute_from_here(own_queries);
        compute_from_here(own_keys);
        multiply_keys<C>(s, own_queries, ring_slot<C>(2 * tile) + own_keys);

        const bool is_masked = first_key < source.tiles.inner_low || first_key + C::BLOCK_N > source.tiles.inner_high;
        const float factor =
            to_logits<C>(s, a, source.rows, source.keys, is_masked, first_row, first_key + warp_key + at.column);
#pragma unroll
        for (int m = 0; m < C::ROW_TILES; ++m) {
            float shrink[2];
            add_to_softmax<C>(found, s, m, factor, shrink);
            shrink_output<C>(found, m, shrink);
        }

        wait_for_copies<C::SLOTS - 2>();
        // Everybody's copies of these values are visible, and nobody reads the keys before them any more.
        __syncthreads();
        if (!C::FEW && tile == source.tiles.count - 1) copy_target<C>(a, unit, warp_row, at.lane);
        copy_item<C>(a, source, 2 * tile + C::SLOTS, at.thread);
        compute_from_here(own_values);
        multiply_values<C>(found, s, ring_slot<C>(2 * tile + 1) + own_values);
    }
    if (source.tiles.count == 0) {
        wait_for_copies<0>();  // the queries are on their way to where other things are put next
        __syncthreads();       // other threads' too
        if (!C::FEW) copy_target<C>(a, unit, warp_row, at.lane);
    }
#pragma unroll
    for (int m = 0; m < C::ROW_TILES; ++m) {
        found.sum[m][0] = sum_of_row(found.sum[m][0]);
        found.sum[m][1] = sum_of_row(found.sum[m][1]);
    }
}

}  // namespace attent::gpu
