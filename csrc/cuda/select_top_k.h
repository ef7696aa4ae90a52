// Top-k selection on its own, on a GPU: what the launchers take, and what a launch looks like. No CUDA header needed.
//
// One launch of one block up to kMostInLaunch scores (select_top_k.cu).
#pragma once

#include <cstdint>

#include "dtype.h"
#include "select.cuh"
#include "status.h"

namespace attent::gpu {

struct SelectTopKArgs {
    const void* score;  // [n] of dtype, adjacent
    Dtype dtype;
    const int8_t* valid;  // [n], or null: all are
    int64_t n, k;         // 0 <= k <= n < 2^31
    int64_t k_floor;      // 0 <= k_floor <= k: how many are drawn uniformly
    float temperature;    // 0: by score; above: Gumbel top-k
    const int64_t* seed;  // [1]; null only where temperature and k_floor are 0
    bool sorted;          // in the order of the scores, or of the indices
    int64_t* index;       // [k], output
    void* chosen_score;   // [k] of dtype, output
    float* inclusion;     // [k], output
    int64_t* scratch;     // of the plan's length, aligned to 16 bytes
};

struct SelectTopKPlan {
    int blocks, threads;
    int64_t scratch_length;  // int64 elements
};

// 16 warps: a block alone on its processor hides the latency of its loads and barriers behind each other.
constexpr int kSelectThreads = 512;
// Of the sort's buffer: with the counts of SelectShared below the 48 KB that every block may have.
constexpr int kSelectKeys = 4096;

inline SelectTopKPlan plan_select_top_k(int64_t n) {
    return {1, kSelectThreads, select_scratch_length(n)};
}

inline Status check_select_top_k(const SelectTopKArgs& args) {
    if (args.n < 0 || args.n > kIndexMask) {
        return say(Status::refused, "n: got %lld; takes 0 <= n < 2^31", static_cast<long long>(args.n));
    }
    if (args.k < 0 || args.k > args.n || args.k_floor < 0 || args.k_floor > args.k) {
        return say(Status::refused, "k, k_floor: got %lld, %lld; takes 0 <= k_floor <= k <= n = %lld",
                   static_cast<long long>(args.k), static_cast<long long>(args.k_floor),
                   static_cast<long long>(args.n));
    }
    if (!(args.temperature >= 0.0f)) {
        return say(Status::refused, "temperature: got %g; takes 0 or above", static_cast<double>(args.temperature));
    }
    if (args.seed == nullptr && args.k > 0 && (args.temperature > 0.0f || args.k_floor > 0)) {
        return say(Status::refused, "seed: got a null pointer; takes int64 [1] with a temperature or a floor");
    }
    return Status{};
}

template <typename Score>
SelectArgs<Score> in_block(const SelectTopKArgs& args) {
    return {static_cast<const Score*>(args.score),
            args.valid,
            static_cast<int>(args.n),
            static_cast<int>(args.k),
            static_cast<int>(args.k_floor),
            args.temperature,
            args.seed,
            args.index,
            static_cast<Score*>(args.chosen_score),
            args.inclusion,
            args.scratch,
            args.sorted};
}

// Nothing is launched where k is 0.
Status launch_select_top_k(const SelectTopKArgs& args, cudaStream_t stream);

}  // namespace attent::gpu
