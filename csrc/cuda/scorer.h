// The linear-cross-entropy scorer: what a launch is told, what it is lent, and the two kernels that do it.
//
// N tokens of width D against V classes: losses, the scores "loss", "logit" and (one token an example) "head", and the
// choice by one of them, in one launch. What is computed, and in which order, is the header of scorer/finish.cuh; the
// sums that one pass over the vocabulary keeps are the header of scorer/online.cuh.
//
// Targets are class indices. Tensors come as an address and strides in elements; nothing here allocates.
#pragma once

#include <cstdint>

#include "per_example.h"
#include "status.h"

namespace attent::gpu::scorer {

enum class Number : int { bfloat16, float16, float32, float64, int32, int64 };
enum class Reduction : int { nothing, mean, sum, none, example };

/// A vector [n] of numbers that are read as float32; no data: not given.
struct Vector {
    const void* data;
    int64_t stride;
    Number number;
};

/// The choice by one of the scores, as attent.select_top_k makes it; no score: nothing is chosen.
struct Choice {
    const float* score;  // [B], one of the launch's own outputs
    int32_t k;
    int32_t k_floor;  // how many of the k are drawn uniformly
    float temperature;
    const int64_t* seed;  // [1], read where temperature or k_floor is above 0
    int64_t* index;       // [k]
    float* chosen_score;  // [k]
    float* inclusion;     // [k]
};

struct ScorerArgs {
    // --- what is scored
    const void* hidden;  // [B, T, D]: token r at (r / T) example + (r % T) token strides; [N, D] is T = 1
    int64_t hidden_example, hidden_token, hidden_column;
    const void* weight;  // [V, D]
    int64_t weight_row, weight_column;
    Number number;       // of both, and of the bias: bfloat16 or float16
    const void* target;  // [B, T] like hidden
    int64_t target_example, target_token;
    Number target_number;       // int32 or int64
    const void* bias;           // [V], adjacent, or none
    Vector class_weight;        // [V], adjacent
    Vector example_weight;      // [B]
    const int32_t* cu_seqlens;  // [B + 1], or none
    int64_t cu_seqlens_stride;
    int32_t tokens, tokens_each, batch, width, classes;  // N, T, B, D, V
    int64_t ignore_index;
    float label_smoothing;
    float softcap;  // 0: none
    int32_t shift;  // 1: token t predicts target t + 1
    Reduction reduction;
    PerExample per_example;

    // --- what comes out, float32; nullptr where not asked for
    float* loss;    // [N], [B] or [1], by the reduction
    float* counts;  // [B] valid tokens, always
    float* mean_loss;
    float* logit;
    float* head;  // scores [B]
    Choice choice;

    // --- what is lent: uninitialised but for the tickets, which are 0 and are left 0
    float* slots;          // [kept, groups, capacity], capacity = row_tiles * rows of a tile
    float* own;            // [capacity], the target's raw logit
    float* hidden_square;  // [capacity] if head
    float* token_loss;     // [capacity], like the next ones
    float* token_square;
    float* token_count;  // 1 where the token has a target
    float* token_share;  // class weight of its target, for the mean's denominator; nullptr: its count
    float* token_head;   // if head
    float* block_loss;   // [blocks]
    float* block_share;  // [blocks]
    int8_t* valid;       // [B] if a choice is made
    int64_t* selection;  // scratch of the selection
    int32_t* tickets;    // [row_tiles + blocks + 1]
    int32_t delayed;     // 1: a stress test's switch, each team waits before it takes a ticket (finish.cuh)

    // --- how the work is cut
    int32_t row_tiles;
    int32_t groups;          // of vocabulary tiles
    int32_t group_tiles;     // in a group
    int32_t sweep;           // row tiles that go through the vocabulary together
    int32_t blocks;          // of examples
    int32_t block_examples;  // in a block: a power of two, a tile's rows at most
};

/// Which sums a pass keeps of each token: the header of scorer/online.cuh.
enum class Sums : int { plain, capped, spread };

constexpr int kept_numbers(Sums sums) {
    return sums == Sums::spread ? 7 : 3;
}

/// The two kernels: mma.sync and cp.async (sm_80 and up), and TMA and wgmma (sm_90a).
enum class ScorerKernel : int { portable, hopper };

/// Which of its instances a kernel runs. The Hopper kernel has none for a softcap alone, which would spill registers: the
/// one for smoothing, of 0, computes the same, a few instructions a logit more.
inline Sums sums_of(ScorerKernel kernel, bool is_smoothed, bool is_capped) {
    if (is_smoothed || (is_capped && kernel == ScorerKernel::hopper)) return Sums::spread;
    return is_capped ? Sums::capped : Sums::plain;
}
inline Sums sums_of(ScorerKernel kernel, const ScorerArgs& args) {
    return sums_of(kernel, args.label_smoothing > 0, args.softcap > 0);
}

/// A kernel's tiles, for who cuts the work.
struct ScorerTiles {
    int rows, classes, width;  // BM, BN, BK
    int threads;
    int stages;
    int resident;  // blocks of threads that a multiprocessor holds
    int shared_bytes;
    int kept;  // numbers of each token and group of vocabulary tiles
};
ScorerTiles scorer_tiles(ScorerKernel kernel, Sums sums);

/// Elements from a token's hidden state to the next one's, where they lie evenly.
inline int64_t hidden_row_stride(const ScorerArgs& args) {
    return args.tokens_each == 1 ? args.hidden_example : args.hidden_token;
}

/// Why the Hopper kernel cannot take these arguments; nullptr if it can. (The portable one takes all.)
const char* hopper_scorer_refuses(const ScorerArgs& args);

struct ScorerPlan {
    int64_t grid;
    int threads;
    int shared_bytes;
    int64_t tickets;         // int32
    int64_t scratch_floats;  // all float32 scratch together
};

/// The launch's shape, and what it is lent, of arguments whose cut is filled in. `processors`: of the device.
ScorerPlan plan_scorer(ScorerKernel kernel, const ScorerArgs& args, int processors);

/// Gives `args`, whose cut and outputs are filled in, its scratch arrays within `memory`; how many bytes they take.
/// `memory` 0: to ask for the bytes.
int64_t lay_out_scorer(ScorerKernel kernel, ScorerArgs& args, uintptr_t memory);

/// Whether the numbers fit together: what would run past an array is refused, naming the argument.
Status check_scorer(const ScorerArgs& args);

/// Start the kernel on the current device. The caller keeps all that the arguments point to until the stream has passed.
Status launch_scorer(ScorerKernel kernel, const ScorerArgs& args, int processors, cudaStream_t stream);
Status launch_hopper_scorer(const ScorerArgs& args, int processors, cudaStream_t stream);

}  // namespace attent::gpu::scorer
