// The scorer for sm_80 and up: a block of threads multiplies BM tokens with a group of vocabulary tiles, BN classes
// each, one after the other, and keeps of the logits what online.cuh says. It ends by finish.cuh.
//
//     z [BM, BN] = hidden [BM, D] weight [BN, D]ᵀ (+ bias),  then sums over BN, tile after tile
//
// FLOPs: 2 N V D. Bytes: of L2 each tile takes (BM + BN) D 2; in all 2 N V D (1/BM + 1/BN). Slots: 4 κ G N written and
// read once, κ = 3 numbers for each token and group, 7 with smoothing.
//
// Tiles, 128 × 128 × 32 in 4 warps of 64 × 64, 3 stages, two blocks to a multiprocessor (so that one's sums run beside
// the other's products):
// * Shared memory delivers 128 bytes a clock; at A100's 2048 FLOP a clock a 64 × 64 warp tile reads 64 of them and the
//   copies write 32. Warps of 32 × 64 would read 96.
// * Registers: 128 accumulators, 16 + 4 of operands, 24 of sums (8 rows × m, a, s), of 255. With smoothing the other
//   4 sums of a row stand in shared memory, read and written once a tile.
// * 3 stages of 16 KB: 48 KB, so that two blocks fit sm_86's, sm_89's and sm_120's 100 KB. Two stages ahead are 1024
//   clocks of products, L2's latency three times over.
//
// A tile none of whose tokens is computed (ignored, or its example has weight 0) skips its products.
#pragma once

#include "../mma.cuh"
#include "../tile.cuh"
#include "columns.cuh"
#include "finish.cuh"
#include "tiles.h"

namespace attent::gpu::scorer {

/// All threads of a block.
struct WholeBlock {
    __device__ int thread() const { return static_cast<int>(threadIdx.x); }
    __device__ static constexpr int threads() { return Portable::THREADS; }
    __device__ static constexpr Block block() { return {Portable::THREADS}; }
    __device__ void sync() const { block().wait(); }
};

/// Row `source` of an operand from column k0 + 8 `chunk` on: 8 numbers, 0 from the width on.
struct Operand {
    const uint16_t* data;
    int64_t column;
    bool by_chunks;  // columns are adjacent and rows start at multiples of 16 bytes

    __device__ __forceinline__ void copy(uint32_t to, unsigned char* to_pointer, int64_t row_offset, int k,
                                         int width) const {
        const int inside = larger(0, smaller(8, width - k));
        if (by_chunks) {
            copy_async(to, data + row_offset + (inside > 0 ? k : 0), inside * 2);
            return;
        }
        // Any strides, number by number: right, and slow.
#pragma unroll 1
        for (int i = 0; i < 8; ++i) {
            uint16_t value = 0;
            if (i < inside) value = data[row_offset + (k + i) * column];
            memcpy(to_pointer + i * 2, &value, 2);
        }
    }
};

template <typename T, Sums SUMS>
__device__ __forceinline__ void portable_scorer(const ScorerArgs& args, unsigned char* shared) {
    using P = Portable;
    constexpr bool SPREAD = SUMS == Sums::spread;
    constexpr int AT_A_TIME = SPREAD ? P::COLUMNS / 2 : P::COLUMNS;  // logits of a row: with more, registers spill
    const WholeBlock team;
    const int thread = team.thread(), warp = thread / 32, lane = thread % 32;
    const int warp_row = warp / 2 * P::WARP_ROWS, warp_column = warp % 2 * P::WARP_COLUMNS;
    const Item item = item_at(args, blockIdx.x);
    const int first_row = item.tile * P::BM;
    int* labels = reinterpret_cast<int*>(shared + P::LABELS_AT);
    int* flag = reinterpret_cast<int*>(shared + P::FLAG_AT);
    All* all = reinterpret_cast<All*>(shared + P::ALL_AT) + thread;  // [ROWS] in steps of THREADS
    const float inverse_softcap = args.softcap > 0 ? 1.0f / args.softcap : 0.0f;

    const Token token = read_token(args, first_row + thread);
    labels[thread] = token.label;
    const bool is_needed = any_of_team(team, token.computed, flag);  // and the labels are there

    // --- what this thread copies: of each operand chunk thread % 4 of the rows thread / 4 + 32 i
    const bool by_chunks = args.width > 0 && args.hidden_column == 1 && args.weight_column == 1 &&
                           args.hidden_example % 8 == 0 && args.hidden_token % 8 == 0 && args.weight_row % 8 == 0 &&
                           reinterpret_cast<uintptr_t>(args.hidden) % 16 == 0 &&
                           reinterpret_cast<uintptr_t>(args.weight) % 16 == 0;
    const Operand hidden{static_cast<const uint16_t*>(args.hidden), args.hidden_column, by_chunks};
    const Operand weight{static_cast<const uint16_t*>(args.weight), args.weight_column, by_chunks};
    constexpr int COPIES = P::BM * P::CHUNKS / P::THREADS;
    const int copy_row = thread / P::CHUNKS, copy_chunk = thread % P::CHUNKS;
    int64_t hidden_rows[COPIES];
#pragma unroll
    for (int i = 0; i < COPIES; ++i)
        hidden_rows[i] = hidden_offset(args, first_row + copy_row + i * P::THREADS / P::CHUNKS);

    const int vocabulary_tiles = (args.classes + P::BN - 1) / P::BN;
    const int first_tile = item.group * args.group_tiles;
    const int tiles = is_needed ? smaller(args.group_tiles, vocabulary_tiles - first_tile) : 0;
    const int steps = larger(1, (args.width + P::BK - 1) / P::BK);  // of a tile
    const int total = tiles * steps;

    int next_step = 0, next_tile = 0;  // what is copied next, and into which stage
    int next_stage = 0;
    const auto copy_next = [&] {
        if (next_tile < tiles) {
            unsigned char* stage = shared + next_stage * P::STAGE_BYTES;
            const uint32_t to = shared_address(stage);
            const int k = next_step * P::BK + copy_chunk * 8, column = (first_tile + next_tile) * P::BN;
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                const int row = copy_row + i * P::THREADS / P::CHUNKS;
                const uint32_t at = offset_in_tile<P::BK>(row, copy_chunk);
                hidden.copy(to + at, stage + at, hidden_rows[i], k, args.width);
                const int64_t of_class = smaller(column + row, args.classes - 1) * args.weight_row;
                weight.copy(to + P::OPERAND_BYTES + at, stage + P::OPERAND_BYTES + at, of_class, k, args.width);
            }
            next_stage = next_stage + 1 == P::STAGES ? 0 : next_stage + 1;
            if (++next_step == steps) next_step = 0, ++next_tile;
        }
        commit_copies();  // also of nothing, so that groups and steps go together
    };

    Kept kept[SPREAD ? 1 : P::ROWS];
#pragma unroll
    for (int r = 0; r < P::ROWS; ++r) {
        kept[SPREAD ? 0 : r] = nothing_kept();
        if (SPREAD) all[r * P::THREADS] = {nothing_kept(), nothing_spread()};
    }
    float z[P::ROW_TILES][P::COLUMN_TILES][4];

    for (int i = 0; i < P::STAGES - 1; ++i) copy_next();
    int step = 0, tile = 0, stage = 0;
#pragma unroll 1
    for (int i = 0; i < total; ++i) {
        const int first_column = (first_tile + tile) * P::BN + warp_column + 2 * (lane % 4);  // of this thread
        if (step == 0) {
#pragma unroll
            for (int c = 0; c < P::COLUMN_TILES; ++c) {
                float bias[2] = {0.0f, 0.0f};
                if (args.bias != nullptr) add_bias<T>(args, bias, first_column + 8 * c);
#pragma unroll
                for (int r = 0; r < P::ROW_TILES; ++r) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) z[r][c][j] = bias[j % 2];
                }
            }
        }

        wait_for_copies<P::STAGES - 2>();
        __syncthreads();  // everybody's copies of this stage are there, and nobody reads the one before any more …
        copy_next();      // … which these overwrite

        const uint32_t operands = shared_address(shared + stage * P::STAGE_BYTES);
#pragma unroll
        for (int k = 0; k < P::BK / 16; ++k) {
            uint32_t a[P::ROW_TILES][4];
#pragma unroll
            for (int r = 0; r < P::ROW_TILES; ++r) load_a<P::BK>(a[r], operands, warp_row + 16 * r, k, lane);
#pragma unroll
            for (int c = 0; c < P::COLUMN_TILES; c += 2) {
                uint32_t b[4];  // two fragments of 8 columns
                load_b_of_rows<P::BK>(b, operands + P::OPERAND_BYTES, warp_column + 8 * c, k, lane);
#pragma unroll
                for (int r = 0; r < P::ROW_TILES; ++r) {
                    mma_16x8x16<T>(z[r][c], a[r], {b[0], b[1]});
                    mma_16x8x16<T>(z[r][c + 1], a[r], {b[2], b[3]});
                }
            }
        }
        stage = stage + 1 == P::STAGES ? 0 : stage + 1;
        if (++step < steps) continue;

        // --- the tile's logits are whole: 8 rows of 16 columns in each thread
        step = 0, ++tile;
#pragma unroll
        for (int r = 0; r < P::ROWS; ++r) {
            const int row = warp_row + r / 2 * 16 + r % 2 * 8 + lane / 4;
            All sums{kept[SPREAD ? 0 : r], nothing_spread()};
            if (SPREAD) sums = all[r * P::THREADS];
#pragma unroll
            for (int part = 0; part < P::COLUMNS; part += AT_A_TIME) {
                float some[AT_A_TIME];
#pragma unroll
                for (int c = 0; c < AT_A_TIME; ++c) some[c] = z[r / 2][(part + c) / 2][r % 2 * 2 + c % 2];
                keep_columns<SUMS>(args, inverse_softcap, some, first_column + 4 * part, labels[row],
                                   args.own + first_row + row, sums.kept, sums.spread);
            }
            if (SPREAD) {
                all[r * P::THREADS] = sums;
            } else {
                kept[r] = sums.kept;
            }
        }
    }
    wait_for_copies<0>();
    __syncthreads();  // nobody reads a stage any more: the merge overwrites the first

    // --- four lanes and two warps have columns of the same row
    const int64_t capacity = static_cast<int64_t>(args.row_tiles) * P::BM;
    All* of_right = reinterpret_cast<All*>(shared);  // [BM]
    All sums[P::ROWS];
#pragma unroll
    for (int r = 0; r < P::ROWS; ++r) {
        sums[r] = SPREAD ? all[r * P::THREADS] : All{kept[SPREAD ? 0 : r], nothing_spread()};
        merge_lanes<SPREAD>(sums[r]);
        const int row = warp_row + r / 2 * 16 + r % 2 * 8 + lane / 4;
        if (warp_column > 0 && lane % 4 == 0) of_right[row] = sums[r];
    }
    __syncthreads();  // the right warps' sums are there
    if (warp_column == 0 && lane % 4 == 0) {
#pragma unroll
        for (int r = 0; r < P::ROWS; ++r) {
            const int row = warp_row + r / 2 * 16 + r % 2 * 8 + lane / 4;
            merge(sums[r].kept, sums[r].spread, of_right[row].kept, of_right[row].spread);
            store_slot<SPREAD>(args, capacity, item.group, first_row + row, sums[r].kept, sums[r].spread);
        }
    }
    if (args.head != nullptr && item.group == 0 && is_needed) store_hidden_squares<T, P::BM>(args, item.tile, team);
    float* folds = reinterpret_cast<float*>(shared + P::STAGE_BYTES);
    if (finish_item<P::BM, SPREAD>(args, item.tile, team, folds, flag)) choose(args, team, shared);
}

}  // namespace attent::gpu::scorer
