// Scored attention in one launch: what its kernel takes, and how it is cut into blocks. No CUDA is needed to include it.
//
// Maths, of one example (B of them) with R queries and K keys, per head: O = softmax(scale Q K^T) V over the keys that a
// query looks at (attention_layout.cuh); its loss and score against a target, or through a classifier of the pooled
// output (readout.cuh); then the top k of the scores (select.cuh).
//
// Work: a block for each tile of BLOCK_M rows of one head; for few queries, also one for each part of the keys.
// FLOPs 4 R K D per head (half of that when causal) + 2 F C per example for the readout; bytes: Q, K, V, O and target
// once, plus K and V again for every BLOCK_M rows, mostly from the L2 cache, as the tiles of a head run side by side.
//
// Pointers are to device memory, strides count numbers, not bytes. Lengths, cu_seqlens and labels are not read on the
// host: the kernel clamps them. Tickets are 0 before and after a launch; all else in the workspace is not set.

#pragma once

#include <cstdint>

#include "dtype.h"
#include "per_example.h"
#include "status.h"

namespace attent::gpu {

enum class Pool : int { mean = 0, first = 1, last = 2 };
enum class Score : int { none = 0, loss = 1, residual = 2, logit = 3, head = 4 };

// A tensor's rows by example, head and row; of a packed tensor the example's stride is 0. Columns are side by side, and
// rows of query, key, value and target start at multiples of 16 bytes.
struct Rows {
    void* data;
    int64_t example, head, row;
};

// How many rows each example has. At most one of the pointers is there; neither: `most` each.
struct Segments {
    const int32_t* cu;    // [B + 1], packed
    const void* lengths;  // int32, or int64, [B], padded
    bool lengths_are_64_bits;
    int most;  // T, or all rows of a packed tensor
};

// A vector or matrix in any strides.
struct View {
    const void* data;
    Dtype dtype;
    int64_t row, column;
};

// W [C, F] of the pooled output [B, F], F = heads x Dv; weight.data null: none.
struct Classifier {
    View weight;
    View bias;           // [C], by its `row`; data null: none
    const void* labels;  // [B]
    int64_t label_stride;
    bool labels_are_64_bits;
    int classes;
    void* pooled;     // [B, F] in the dtype of query
    void* logits;     // [B, C], the same
    float* gradient;  // [B, C]: of an example's loss in its logits
    Pool pool;
};

struct AttentionResults {
    Rows output;       // data null: neither this nor logsumexp is stored
    float* logsumexp;  // contiguous in its rows
    int64_t logsumexp_example, logsumexp_head;
    float* losses;  // [B]
    float* scores;  // [B], null without a score
    int8_t* valid;  // [B]: has the example a query
};

// The k that are chosen, k_floor of them uniformly; index null: none are.
struct Choice {
    int64_t* index;       // [k]
    float* score;         // [k]
    float* inclusion;     // [k]
    const int64_t* seed;  // [1]; not read with temperature 0 and k_floor 0
    int64_t* scratch;
    int k, k_floor;
    float temperature;
};

struct AttentionWorkspace {
    int* tickets;  // AttentionPlan::tickets of them, all 0
    float* slots;
    float* split_slots;
    bool delayed;  // a stress test's switch (tickets.cuh)
};

// What decides over tiles; the kernel and the plan look at the same.
struct AttentionSizes {
    int examples;
    int heads, heads_per_key;
    int rows;  // R of padded examples, all rows of packed ones
    int keys;  // the same of keys
    int width, value_width;
    bool is_packed;
    bool only_pooled_row;  // of each example only the pooled row ("first" or "last") is computed
    bool has_target;
    Pool pool;
    int processors;  // streaming multiprocessors
    bool is_hopper;  // compute capability 9.0, and tensor maps find query, key and value: no two of their rows overlap
};

struct ScoredAttention {
    AttentionSizes sizes;
    Dtype dtype;  // of query, key, value, target and output
    Rows query, key, value;
    Rows target;  // data null: none
    Segments queries, keys;
    int left, right;  // keys before and behind a query's own position; -1: no limit
    float scale;
    float softcap;  // 0: none
    Classifier classifier;
    Score score;
    PerExample per_example;
    AttentionResults results;
    Choice choice;
    AttentionWorkspace workspace;
};

// Up to so many queries an example, a tile of 16 rows is used and keys are split across blocks.
constexpr int FEW_QUERIES = 16;
constexpr int GROUP = 16;  // examples that are read out together

// The tile of one block. Shared memory holds the queries and a ring of `slots` tiles, of keys and of values in turn.
struct TileShape {
    int width;      // of rows in shared memory: 64, 96, 128, 192 or 256
    int row_tiles;  // of 16 rows, that each warp multiplies with every key it reads
    int row_warps, key_warps;
    int block_n;  // keys of a tile
    int slots;

    constexpr int block_m() const { return 16 * row_tiles * row_warps; }
    constexpr int threads() const { return 32 * row_warps * key_warps; }
    constexpr int query_bytes() const { return block_m() * width * 2; }
    constexpr int slot_bytes() const { return block_n * width * 2; }
    constexpr int shared_bytes() const { return query_bytes() + slots * slot_bytes(); }
};

// Floats that a part of the keys leaves of a tile of 16 rows: maxima, sums, weighted sums. Rows of the last are 8 longer
// than wide, so that 4 of them side by side lie in different banks of shared memory.
constexpr int part_pitch(int width) {
    return width + 8;
}
constexpr int part_floats(int width) {
    return 32 + 16 * part_pitch(width);
}

// Not yet timed on a GPU. Numbers behind the choice, for a warp of R rows, N keys and width D. Registers a thread: R D / 32 + R N / 32 float32
// accumulators, + 60 or so, of 255. Each tile of keys that is read from shared memory serves R rows: with 16 the reads
// take as long as the products (16 FLOPs a byte: an A100 multiplies 2048 FLOPs and reads 128 bytes a cycle), with 32
// half as long; from 192 on registers allow 16 only. Shared memory: 99 KB fit every GPU from sm_80 on; up to 64 wide
// three blocks, up to 128 wide two share an A100's processor. With 64 keys, 128 wide, registers spill. Few queries: what counts is bytes in flight, 64 KB a block.
constexpr TileShape tile_shape(int width, bool few) {
    if (few) {
        const int column = width <= 64 ? 64 : width <= 128 ? 128 : 256;
        return TileShape{column, 1, 1, 4, 64, column == 256 ? 2 : 512 / column};
    }
    if (width <= 64) return TileShape{64, 2, 4, 1, 64, 3};
    if (width <= 96) return TileShape{96, 2, 4, 1, 64, 3};
    if (width <= 128) return TileShape{128, 2, 4, 1, 48, 2};
    if (width <= 192) return TileShape{192, 1, 8, 1, 64, 2};
    return TileShape{256, 1, 8, 1, 32, 2};
}

static_assert(tile_shape(64, false).shared_bytes() <= 96 << 10 && tile_shape(96, false).shared_bytes() <= 96 << 10 &&
              tile_shape(128, false).shared_bytes() <= 96 << 10 && tile_shape(192, false).shared_bytes() <= 96 << 10 &&
              tile_shape(256, false).shared_bytes() <= 96 << 10 && tile_shape(256, true).shared_bytes() <= 96 << 10);

// The tile of the Hopper kernel (scored_attention_sm90.cuh): two warpgroups multiply 64 rows each, a warp copies.
struct HopperShape {
    int width;  // of rows in shared memory: 64 or 128

    static constexpr int BLOCK_M = 128, BLOCK_N = 128, CONSUMERS = 256, THREADS = CONSUMERS + 128;
    constexpr int slots() const { return 256 / width; }               // of keys, and as many of values: 128 KB together
    constexpr int rows_bytes() const { return BLOCK_M * width * 2; }  // of a tile; as many rows as keys
    // What the end of a tile uses: the tile of rows, and sums of columns, a row for each of 8 warps.
    constexpr int end_bytes() const { return rows_bytes() + 8 * width * 4; }
    constexpr int queries_at() const { return (end_bytes() + 1023) / 1024 * 1024; }
    constexpr int keys_at() const { return queries_at() + rows_bytes(); }
    constexpr int values_at() const { return keys_at() + slots() * rows_bytes(); }
    constexpr int barriers_at() const { return values_at() + slots() * rows_bytes(); }
    constexpr int barriers() const { return 3 + 4 * slots(); }
    constexpr int shared_bytes() const { return barriers_at() + 8 * barriers(); }
};
static_assert(HopperShape{64}.shared_bytes() <= 227 << 10 && HopperShape{128}.shared_bytes() <= 227 << 10);

enum class AttentionKernel : int { portable = 0, hopper = 1 };

struct AttentionPlan {
    AttentionKernel kernel;
    TileShape shape;              // of the portable kernel
    int width, block_m, block_n;  // of the kernel's tile
    int threads, shared_bytes;    // of a block
    int64_t units;                // tiles of all heads
    int64_t blocks;               // that are launched
    int tiles;                    // of rows: of each example, or of all packed ones
    int splits;
    int64_t tickets;         // int32
    int64_t slots;           // floats
    int64_t split_slots;     // floats
    int64_t choice_scratch;  // int64, if there is a choice
};

// Why the portable kernel runs and not the Hopper kernel; nullptr if the Hopper kernel does. A rule over sizes alone, the
// same for every option. Few queries, or one pooled row: a tile of 128 rows would compute 112 or more of them for nothing,
// and the portable kernel splits keys across blocks. 65 to 96 wide: the portable kernel has a tile of 96.
const char* hopper_attention_refuses(const AttentionSizes& sizes);

AttentionPlan plan_scored_attention(const AttentionSizes& sizes);

// Groups of examples that are read out together.
constexpr int num_groups(const AttentionSizes& sizes) {
    return (sizes.examples + GROUP - 1) / GROUP;
}

Status launch_scored_attention(const ScoredAttention& arguments, cudaStream_t stream);

}  // namespace attent::gpu
