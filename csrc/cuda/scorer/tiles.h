// The sizes of the kernels' tiles, and where things stand in shared memory. Why they are so is in the kernels' headers.
#pragma once

#include "../scorer.h"

namespace attent::gpu::scorer {

constexpr int half_bytes = 2;  // of a bfloat16 or float16

struct Portable {
    static constexpr int BM = 128, BN = 128, BK = 32, STAGES = 3;
    static constexpr int WARPS = 4, THREADS = 32 * WARPS, RESIDENT = 2;
    static constexpr int WARP_ROWS = 64, WARP_COLUMNS = 64;     // of a warp's tile; 2 × 2 warps
    static constexpr int ROW_TILES = WARP_ROWS / 16;            // of mma.sync
    static constexpr int COLUMN_TILES = WARP_COLUMNS / 8;       //
    static constexpr int ROWS = 2 * ROW_TILES;                  // of a thread
    static constexpr int COLUMNS = 2 * COLUMN_TILES;            // of a thread in each of its rows
    static constexpr int CHUNKS = BK / 8;                       // of 16 bytes in a row
    static constexpr int OPERAND_BYTES = BM * BK * half_bytes;  // of one of the two in a stage
    static constexpr int STAGE_BYTES = 2 * OPERAND_BYTES;

    static constexpr int LABELS_AT = STAGES * STAGE_BYTES;  // int [BM]
    static constexpr int FLAG_AT = LABELS_AT + 4 * BM;      // int
    static constexpr int ALL_AT = FLAG_AT + 16;             // [ROWS][THREADS] × 7 floats, with smoothing
    static constexpr int shared_bytes(Sums sums) {
        return ALL_AT + (sums == Sums::spread ? ROWS * THREADS * 4 * kept_numbers(sums) : 0);
    }
};
static_assert(Portable::BM == Portable::BN && Portable::BM == Portable::THREADS, "operands are copied alike");

struct Hopper {
    static constexpr int BM = 128, BN = 256, BK = 64, STAGES = 4;
    static constexpr int CONSUMERS = 256, THREADS = CONSUMERS + 128, RESIDENT = 1;
    static constexpr int HIDDEN_BYTES = BM * BK * half_bytes, WEIGHT_BYTES = BN * BK * half_bytes;
    static constexpr int STAGE_BYTES = HIDDEN_BYTES + WEIGHT_BYTES;

    static constexpr int LABELS_AT = STAGES * STAGE_BYTES;       // int [BM]
    static constexpr int SUMS_AT = LABELS_AT + 4 * BM;           // float [CONSUMERS]
    static constexpr int BARRIERS_AT = SUMS_AT + 4 * CONSUMERS;  // uint64 [2 STAGES]
    static constexpr int FLAGS_AT = BARRIERS_AT + 16 * STAGES;   // int [2]
    static constexpr int shared_bytes(Sums) { return FLAGS_AT + 16; }
};

}  // namespace attent::gpu::scorer
