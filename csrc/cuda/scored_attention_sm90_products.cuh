// The Hopper kernel's loop: a warpgroup's 64 rows over the keys of a unit, with an online softmax. What waits for what is
// in the header of scored_attention_sm90.cuh.
#pragma once

#include "hopper_products.cuh"
#include "scored_attention_sm90_copies.cuh"

namespace attent::gpu {

// Accumulators [columns / 8][4] as products take them.
template <int N>
__device__ __forceinline__ float (&flat(float (&accumulators)[N][4]))[4 * N] {
    return reinterpret_cast<float (&)[4 * N]>(accumulators);
}

// Start S = Q K^T of this warpgroup's rows, which begin at `queries`. One group of products.
template <typename C>
__device__ __forceinline__ void start_keys(float (&s)[1][C::WARP_KEYS / 8][4], SharedAddress queries,
                                           SharedAddress keys) {
    hopper::fence_products(flat(s[0]));
#pragma unroll
    for (int step = 0; step < C::WIDTH / 16; ++step) {
        const int half = step / 4 * C::HALF_BYTES;
        hopper::start_product<typename C::T>(flat(s[0]), hopper::operand(queries + half, 0, step % 4),
                                             hopper::operand(keys + half, 0, step % 4), step > 0);
    }
    hopper::commit_products();
    hopper::fence_registers(flat(s[0]));
}

// Start O += P V. One group of products.
template <typename C>
__device__ __forceinline__ void start_values(Found<C>& found, uint32_t (&p)[C::WARP_KEYS / 16][4],
                                             SharedAddress values) {
    hopper::fence_products(flat(found.output[0]), p);
#pragma unroll
    for (int step = 0; step < C::WARP_KEYS / 16; ++step) {
        hopper::start_row_product<typename C::T>(flat(found.output[0]), p[step],
                                                 hopper::columns_operand(values, 16 * step, C::HALF_BYTES));
    }
    hopper::commit_products();
    hopper::fence_registers(flat(found.output[0]));
}

// This warp is through with what the barrier is of; behind a wait for its products, all lanes are.
__device__ __forceinline__ void release(SharedAddress barrier, const Lane& at) {
    if (at.lane == 0) hopper::arrive(barrier);
}

// Probabilities of the unit's `tile`-th keys from products, in s; `shrink` is what the output is to be multiplied with.
template <typename C>
__device__ __forceinline__ void to_probabilities(Found<C>& found, float (&s)[1][C::WARP_KEYS / 8][4],
                                                 float (&shrink)[2], const ScoredAttention& a,
                                                 const HopperUnit& current, int tile, const Lane& at) {
    const Unit& unit = current.unit;
    const int first_key = current.tiles.low + tile * C::BLOCK_N;
    const bool is_masked = first_key < current.tiles.inner_low || first_key + C::BLOCK_N > current.tiles.inner_high;
    const float factor = to_logits<C>(s, a, unit.queries.rows, unit.keys.rows, is_masked,
                                      unit.first_row + at.warp * C::WARP_ROWS + at.row, first_key + at.column);
    add_to_softmax<C>(found, s, 0, factor, shrink);
}

template <typename C>
__device__ __forceinline__ void round_probabilities(uint32_t (&p)[C::WARP_KEYS / 16][4],
                                                    const float (&s)[1][C::WARP_KEYS / 8][4]) {
#pragma unroll
    for (int step = 0; step < C::WARP_KEYS / 16; ++step) {
        round_to_operand<typename C::T>(p[step], s[0][2 * step], s[0][2 * step + 1]);
    }
}

// What this warpgroup finds of its rows; sums are of whole rows.
template <typename C>
__device__ __forceinline__ void attend(Found<C>& found, const ScoredAttention& a, const HopperMemory<C>& memory,
                                       const HopperUnit& current, hopper::Ring<C::SLOTS>& keys,
                                       hopper::Ring<C::SLOTS>& values, const Lane& at) {
    using T = typename C::T;
#pragma unroll
    for (int n = 0; n < C::WIDTH / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) found.output[0][n][i] = 0.0f;
    }
    found.max[0][0] = found.max[0][1] = minus_infinity();
    found.sum[0][0] = found.sum[0][1] = 0.0f;
    const int count = current.tiles.count;
    if (count == 0) {
        // All lanes have seen that the unit is there before the copying warp goes on, which would flip the parity they
        // wait for; and are done with the description before this one, which the next overwrites.
        __syncwarp();
        release(memory.queries_are_read(), at);
        return;
    }
    const SharedAddress queries = memory.queries() + at.thread / 128 * 64 * hopper::ROW_BYTES;
    float s[1][C::WARP_KEYS / 8][4], shrink[2];
    uint32_t p[C::WARP_KEYS / 16][4];

    hopper::wait(memory.keys_are_there(keys.slot), keys.round);
    start_keys<C>(s, queries, memory.keys(keys.slot));
    hopper::wait_for_products<T, 0>();
    hopper::fence_registers(flat(s[0]));
    release(memory.keys_are_read(keys.slot), at);
    if (count == 1) release(memory.queries_are_read(), at);
    keys.next();
    to_probabilities<C>(found, s, shrink, a, current, 0, at);
    round_probabilities<C>(p, s);

#pragma unroll 1
    for (int tile = 1; tile < count; ++tile) {
        hopper::wait(memory.keys_are_there(keys.slot), keys.round);
        start_keys<C>(s, queries, memory.keys(keys.slot));
        hopper::wait(memory.values_are_there(values.slot), values.round);
        start_values<C>(found, p, memory.values(values.slot));
        hopper::wait_for_products<T, 1>();  // S is whole; P V goes on during the softmax
        hopper::fence_registers(flat(s[0]));
        release(memory.keys_are_read(keys.slot), at);
        if (tile == count - 1) release(memory.queries_are_read(), at);
        keys.next();
        to_probabilities<C>(found, s, shrink, a, current, tile, at);
        hopper::wait_for_products<T, 0>();
        hopper::fence_registers(flat(found.output[0]));
        hopper::fence_registers(p);  // the next probabilities do not take their place before
        release(memory.values_are_read(values.slot), at);
        values.next();
        shrink_output<C>(found, 0, shrink);
        round_probabilities<C>(p, s);
    }

    hopper::wait(memory.values_are_there(values.slot), values.round);
    start_values<C>(found, p, memory.values(values.slot));
    hopper::wait_for_products<T, 0>();
    hopper::fence_registers(flat(found.output[0]));
    release(memory.values_are_read(values.slot), at);
    values.next();
    found.sum[0][0] = sum_of_row(found.sum[0][0]);
    found.sum[0][1] = sum_of_row(found.sum[0][1]);
}

}  // namespace attent::gpu
