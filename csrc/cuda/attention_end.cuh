// The end of a tile: store its output, and leave its part of the example's score in its slot.
//
// Squared loss of an example with n rows, over all heads: 1/n sum_t 1/2 |f_t - y_t|^2; score s sqrt(sum_t |f_t - y_t|^2),
// s = 1/n, 1 or 1/sqrt(n). f is the output before it is rounded to its dtype. A tile adds up its own rows, its warps in
// order; an example's tiles are added in a fixed order.

#pragma once

#include "attention_tile.cuh"

namespace attent::gpu {

constexpr int MOST_WARPS = 8;

// Output and logsumexp from sums; rows that are padding get 0 and -inf.
template <typename C>
__device__ __forceinline__ void finish(Found<C>& found, float (&logsumexp)[C::ROW_TILES][2], int first_row,
                                       int end_row) {
#pragma unroll
    for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const bool is_inside = first_row + 16 * m + 8 * half < end_row;
            const float factor = reciprocal_of_sum(found.sum[m][half]);
            logsumexp[m][half] = is_inside ? logsumexp_of(found.max[m][half], found.sum[m][half]) : minus_infinity();
#pragma unroll
            for (int n = 0; n < C::WIDTH / 8; ++n) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    found.output[m][n][i] = is_inside ? found.output[m][n][i] * factor : 0.0f;
                }
            }
        }
    }
}

__device__ __forceinline__ float load_number(const void* data, Dtype dtype, int64_t at) {
    if (dtype == Dtype::float32) return static_cast<const float*>(data)[at];
    if (dtype == Dtype::float16) return to_float32(static_cast<const Half*>(data)[at]);
    return to_float32(static_cast<const BFloat16*>(data)[at]);
}

// The lane's part of sum |f - y|^2 of this warp's rows; the target's are on their way to where the queries were.
template <typename C>
__device__ __forceinline__ float square_residual(const Found<C>& found, int row_of_tile, int rows) {
    using T = typename C::T;
    wait_for_copies<0>();
    __syncwarp();  // the other lanes' copies too
    const SharedAddress first =
        row_tile<C>() + offset_in_tile<C::WIDTH>(row_of_tile, 0) + static_cast<int>(threadIdx.x) % 4 * 4;
    float square = 0.0f;
#pragma unroll
    for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_of_tile + 16 * m + 8 * half;
            const SharedAddress start = first + (16 * m + 8 * half) * (C::WIDTH * 2);
            float of_row = 0.0f;
#pragma unroll
            for (int n = 0; n < C::WIDTH / 8; ++n) {  // columns from value_width on are 0 there as in the output
                const uint32_t y = load_shared_4(moved<C::WIDTH>(start, 0, n));
                const float low = found.output[m][n][2 * half] - low_of<T>(y);
                const float high = found.output[m][n][2 * half + 1] - high_of<T>(y);
                of_row += low * low + high * high;
            }
            if (row < rows) square += of_row;
        }
    }
    return square;
}

// The sums of the tile's columns, for a mean, to the tile's slot [WIDTH]. All threads; `sums` is [ROW_WARPS][WIDTH].
template <typename C>
__device__ __forceinline__ void store_column_sums(const Found<C>& found, float* slot, float* sums, bool owns_rows,
                                                  const Lane& at) {
    C::block().wait();  // nobody reads what lies where the sums go
    if (owns_rows) {
#pragma unroll
        for (int n = 0; n < C::WIDTH / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float sum = 0.0f;
#pragma unroll
                for (int m = 0; m < C::ROW_TILES; ++m) sum += found.output[m][n][i] + found.output[m][n][2 + i];
#pragma unroll
                for (int distance = 4; distance < 32; distance *= 2) {
                    sum += __shfl_xor_sync(0xffffffffu, sum, distance);
                }
                if (at.row == 0) sums[at.warp * C::WIDTH + 8 * n + at.column + i] = sum;
            }
        }
    }
    C::block().wait();  // all warps' sums are there
    for (int column = at.thread; column < C::WIDTH; column += C::THREADS) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < C::ROW_WARPS; ++warp) sum += sums[warp * C::WIDTH + column];
        slot[column] = sum;
    }
}

// This warp's rows of the output, rounded, to where its queries were: there a row's chunks of 16 bytes come together.
template <typename C>
__device__ __forceinline__ SharedAddress stage_rows(const Found<C>& found, int warp_row, const Lane& at) {
    const SharedAddress staged = row_tile<C>() + warp_row * C::WIDTH * 2;
    const SharedAddress own = staged + offset_in_tile<C::WIDTH>(at.row, 0) + at.column * 2;
    __syncwarp();  // all lanes have read what lies there
#pragma unroll
    for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
        for (int n = 0; n < C::WIDTH / 8; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* two = &found.output[m][n][2 * half];
                store_shared_4(moved<C::WIDTH>(own, 16 * m + 8 * half, n), pack<typename C::T>(two[0], two[1]));
            }
        }
    }
    __syncwarp();  // the other lanes' numbers are there
    return staged;
}

// A staged chunk to its place in a row of `width` numbers; `by_chunks`: all of the row's chunks are whole and aligned.
template <typename T>
__device__ __forceinline__ void store_chunk(T* row, int chunk, int width, bool by_chunks, const uint4& numbers) {
    if (chunk * CHUNK >= width) return;
    if (by_chunks) {
        *reinterpret_cast<uint4*>(row + chunk * CHUNK) = numbers;
        return;
    }
    const uint32_t pairs[4] = {numbers.x, numbers.y, numbers.z, numbers.w};
#pragma unroll
    for (int j = 0; j < CHUNK; ++j) {
        if (chunk * CHUNK + j < width) {
            row[chunk * CHUNK + j] = T{static_cast<uint16_t>(pairs[j / 2] >> (j % 2 * 16) & 0xffffu)};
        }
    }
}

// The example's pooled row, if it is one of this warp's, to its place [B, heads, value_width] of the pooled output.
template <typename C>
__device__ __forceinline__ void store_pooled_row(SharedAddress staged, const ScoredAttention& a, const Unit& unit,
                                                 int warp_row, const Lane& at) {
    const int pooled_row = a.classifier.pool == Pool::last ? max(unit.queries.rows - 1, 0) : 0;
    const int row = pooled_row - unit.first_row - warp_row, width = a.sizes.value_width;
    if (row < 0 || row >= C::WARP_ROWS || at.lane >= C::WIDTH / CHUNK) return;
    auto* pooled = static_cast<typename C::T*>(a.classifier.pooled) +
                   (static_cast<int64_t>(unit.example) * a.sizes.heads + unit.head) * width;
    store_chunk(pooled, at.lane, width, width % CHUNK == 0,
                load_shared_16(staged + offset_in_tile<C::WIDTH>(row, at.lane)));
}

// Output of this warp's rows, and their logsumexp.
template <typename C>
__device__ __forceinline__ void store_rows(SharedAddress staged, const float (&logsumexp)[C::ROW_TILES][2],
                                           const ScoredAttention& a, const Unit& unit, int warp_row, const Lane& at) {
    using T = typename C::T;
    const AttentionSizes& sizes = a.sizes;
    // Of packed examples only their own rows are stored, of padded ones the padding too; or the one row that is computed.
    const int stored = sizes.only_pooled_row ? 1 : (sizes.is_packed ? unit.end_row : sizes.rows) - unit.first_row;
    const int64_t first = sizes.only_pooled_row ? (sizes.is_packed ? unit.example : 0)
                                                : static_cast<int64_t>(unit.queries.first) + unit.first_row;
    T* output = row_of<T>(a.results.output, unit.example, unit.head, first);
    const bool by_chunks = sizes.value_width % CHUNK == 0;  // the output is our own: rows are aligned if they can be
#pragma unroll 4
    for (int i = at.lane; i < C::WARP_ROWS * (C::WIDTH / CHUNK); i += 32) {
        const int row = i / (C::WIDTH / CHUNK), chunk = i % (C::WIDTH / CHUNK);
        if (warp_row + row >= stored) continue;
        store_chunk(output + (warp_row + row) * a.results.output.row, chunk, sizes.value_width, by_chunks,
                    load_shared_16(staged + offset_in_tile<C::WIDTH>(row, chunk)));
    }

    float* of_rows =
        a.results.logsumexp + unit.example * a.results.logsumexp_example + unit.head * a.results.logsumexp_head + first;
    if (at.column != 0) return;
#pragma unroll
    for (int m = 0; m < C::ROW_TILES; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + at.row + 16 * m + 8 * half;
            if (row < stored) of_rows[row] = logsumexp[m][half];
        }
    }
}

// The end of one tile of an example; all threads. `owns_rows`: the warp holds rows of the tile.
template <typename C>
__device__ __forceinline__ void end_of_tile(Found<C>& found, const ScoredAttention& a, const Unit& unit, bool owns_rows,
                                            const Lane& at) {
    const int warp_row = at.warp % C::ROW_WARPS * C::WARP_ROWS;
    float logsumexp[C::ROW_TILES][2];
    finish<C>(found, logsumexp, unit.first_row + warp_row + at.row, unit.end_row);
    if (unit.own_tile < unit.own_tiles) {
        if (a.target.data != nullptr) {
            __shared__ float squares[MOST_WARPS];
            if (owns_rows) {
                if (C::FEW) copy_target<C>(a, unit, warp_row, at.lane);
                const float square =
                    sum_of_warp(square_residual<C>(found, warp_row + at.row, unit.end_row - unit.first_row));
                if (at.lane == 0) squares[at.warp] = square;
            }
            C::block().wait();  // all warps' squares are there
            if (at.thread == 0) {
                float square = 0.0f;
                for (int warp = 0; warp < C::ROW_WARPS; ++warp) square += squares[warp];
                a.workspace.slots[unit.slot()] = square;
            }
        } else if (a.classifier.pool == Pool::mean) {
            float* sums = reinterpret_cast<float*>(dynamic_shared() + C::ROWS_BYTES);
            static_assert(C::ROW_WARPS * C::WIDTH * 4 <= C::END_BYTES - C::ROWS_BYTES);
            store_column_sums<C>(found, a.workspace.slots + unit.slot() * C::WIDTH, sums, owns_rows, at);
        }
    }
    const bool stores_pooled = a.target.data == nullptr && a.classifier.pool != Pool::mean;
    if (!owns_rows || (a.results.output.data == nullptr && !stores_pooled)) return;
    const SharedAddress staged = stage_rows<C>(found, warp_row, at);
    if (stores_pooled) store_pooled_row<C>(staged, a, unit, warp_row, at);
    if (a.results.output.data != nullptr) store_rows<C>(staged, logsumexp, a, unit, warp_row, at);
}

// The sum of an example's slots over its heads and tiles, on all threads. `sums` is [MOST_WARPS].
__device__ inline float add_slots(const float* slots, const Unit& unit, int heads, const Block& block, float* sums,
                                  const Lane& at) {
    float sum = 0.0f;
    for (int64_t i = at.thread; i < static_cast<int64_t>(heads) * unit.own_tiles; i += block.threads) {
        const int64_t head = i / unit.own_tiles;
        sum += __ldcg(slots + head * unit.all_tiles + unit.first_tile + (i - head * unit.own_tiles));
    }
    sum = sum_of_warp(sum);
    if (at.lane == 0) sums[at.warp] = sum;
    block.wait();  // all warps' sums are there
    sum = 0.0f;
    for (int warp = 0; warp < block.threads / 32; ++warp) sum += sums[warp];
    return sum;
}

// From sum |f - y|^2 of an example with `rows` rows; both 0 where there are none.
__device__ inline void store_loss_and_score(const ScoredAttention& a, int example, float square, int rows) {
    const float n = static_cast<float>(max(rows, 1)), loss = square / (2.0f * n);
    a.results.losses[example] = loss;
    if (a.score == Score::loss) {
        a.results.scores[example] = loss;
    } else if (a.score == Score::residual) {
        float norm = sqrtf(square);
        if (a.per_example == PerExample::mean) norm = norm / n;
        if (a.per_example == PerExample::rms) norm = sqrtf(square / n);
        a.results.scores[example] = norm;
    }
}

}  // namespace attent::gpu
