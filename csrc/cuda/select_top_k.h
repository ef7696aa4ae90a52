// Top-k selection on its own, on a GPU: what the launchers take, and what a launch looks like. No CUDA header needed.
//
// Up to kMostInLaunch scores: one launch of one block (select_top_k.cu). Beyond, up to 2^31 scores, nothing is read back
// and no block waits for another:
//
//                                                                          float32   bfloat16   float16
//     digits of the scores, 8 bits each: 16-bit scores have fewer                4          2         3  select_count.cu
//     or, above temperature 0, digits of the keys                                4          4         4
//     with a floor, digits of its noise                                        + 4        + 4       + 4  select_floor.cu
//     writing the chosen; up to kFinishedInPass of them, sorted and put out    + 1        + 1       + 1  select_write.cu
//     for more, the outputs, after the caller has sorted k unique int64        + 1        + 1       + 1  select_outputs.cu
#pragma once

#include <cstdint>

#include "dtype.h"
#include "select.cuh"
#include "select_passes.cuh"
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
    // Lent for the launches, of the plan's lengths; scratch aligned to 16 bytes, tickets zeros and left so.
    int64_t* scratch;
    int32_t* tickets;
    int64_t* chosen;  // the ranks of the chosen: what is to be sorted between the two launchers
    int32_t* code;
    int8_t* kind;
    bool delayed;  // for stress tests: see take_ticket
};

struct SelectTopKPlan {
    int blocks, threads;
    int64_t span;                                                                   // adjacent examples of a block
    int64_t scratch_length, ticket_count, chosen_length, code_length, kind_length;  // elements
    int launches;
    bool finished;  // false: sort chosen[:k] if the order is to be by score, then launch_select_outputs
};

// 16 warps: a block alone on its processor hides the latency of its loads and barriers behind each other.
constexpr int kSelectThreads = 512;
// Of the sort's buffer: with the counts of SelectShared below the 48 KB that every block may have.
constexpr int kSelectKeys = 4096;
// As many are sorted by the last block of the write pass; a library's sort of more is faster.
constexpr int kFinishedInPass = kSelectKeys;
// The state, each block's histogram, spans and slots, in int64.
constexpr int64_t kPassScratch =
    sizeof(PassStates) / 8 + kPassBlocks * kPassBins / 2 + 3 * kPassBlocks / 2 + 3 * kPassBlocks;
static_assert(kPassBlocks % 4 == 0, "each part is aligned");

// Where the digits of a choice start, from the highest: 8 bits each, the last ones fewer, down to the lowest bit that
// differs among keys.
struct Digits {
    int shift[4], count;
};

inline Digits digits_down_to(int lowest_bit) {
    Digits digits{{24}, 1};
    while (digits.shift[digits.count - 1] > lowest_bit) {
        digits.shift[digits.count] = larger(digits.shift[digits.count - 1] - 8, lowest_bit);
        ++digits.count;
    }
    return digits;
}

// Scores of 16 bits do not fill float32's low ones.
inline int lowest_bit(Dtype dtype) {
    return dtype == Dtype::float32 ? 0 : dtype == Dtype::float16 ? 13 : 16;
}

// most_in_launch, most_blocks: other than the defaults for tests.
inline SelectTopKPlan plan_select_top_k(int64_t n, int64_t k, int64_t k_floor, float temperature, Dtype dtype,
                                        int64_t most_in_launch, int64_t most_blocks, int threads, int64_t finished) {
    SelectTopKPlan plan{};
    plan.finished = true;
    if (k == 0) return plan;
    if (n <= most_in_launch) {
        plan.blocks = plan.launches = 1;
        plan.threads = kSelectThreads;
        plan.span = n;
        plan.scratch_length = select_scratch_length(n);
        return plan;
    }
    const bool has_noise = temperature > 0.0f && k > k_floor, has_floor = k_floor > 0;
    const int64_t round = int64_t{threads} * kAdjacent, rounds = ceil_div(n, round);
    plan.span = ceil_div(rounds, most_blocks) * round;
    plan.blocks = static_cast<int>(ceil_div(n, plan.span));
    plan.threads = threads;
    plan.scratch_length = kPassScratch;
    plan.ticket_count = kPassBins + 1;
    plan.finished = k <= finished;
    plan.chosen_length = plan.finished ? power_of_two(k) : k;
    plan.code_length = has_noise || has_floor ? n : 0;
    plan.kind_length = has_floor ? n : 0;
    plan.launches = (k > k_floor ? digits_down_to(has_noise ? 0 : lowest_bit(dtype)).count : 0) +
                    (has_floor ? digits_down_to(0).count : 0) + (plan.finished ? 1 : 2);
    return plan;
}

inline SelectTopKPlan plan_select_top_k(int64_t n, int64_t k, int64_t k_floor, float temperature, Dtype dtype) {
    return plan_select_top_k(n, k, k_floor, temperature, dtype, kMostInLaunch, kPassBlocks, kPassThreads,
                             kFinishedInPass);
}

inline Status check_select_top_k(const SelectTopKArgs& args) {
    const auto number = [](int64_t value) { return static_cast<long long>(value); };
    if (args.n < 0 || args.n > kIndexMask) {
        return say(Status::refused, "n: got %lld; takes 0 <= n < 2^31", number(args.n));
    }
    if (args.k < 0 || args.k > args.n || args.k_floor < 0 || args.k_floor > args.k) {
        return say(Status::refused, "k, k_floor: got %lld, %lld; takes 0 <= k_floor <= k <= n = %lld", number(args.k),
                   number(args.k_floor), number(args.n));
    }
    if (!(args.temperature >= 0.0f)) {
        return say(Status::refused, "temperature: got %g; takes 0 or above", static_cast<double>(args.temperature));
    }
    const int dtype = static_cast<int>(args.dtype);
    if (dtype < 0 || dtype > 2) {
        return say(Status::refused, "dtype: got %d; takes 0 (float32), 1 (float16) or 2 (bfloat16)", dtype);
    }
    if (args.k == 0) return Status{};
    if (args.seed == nullptr && (args.temperature > 0.0f || args.k_floor > 0)) {
        return say(Status::refused, "seed: got a null pointer; takes int64 [1] with a temperature or a floor");
    }
    if (args.score == nullptr || args.index == nullptr || args.chosen_score == nullptr || args.inclusion == nullptr ||
        args.scratch == nullptr) {
        return say(Status::refused, "score, index, chosen_score, inclusion, scratch: one of them is a null pointer");
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

inline PassArgs in_passes(const SelectTopKArgs& args, const SelectTopKPlan& plan) {
    PassArgs pass{};
    pass.score = args.score, pass.valid = args.valid, pass.n = args.n, pass.span = plan.span;
    pass.k = static_cast<int>(args.k), pass.k_floor = static_cast<int>(args.k_floor);
    pass.k_first = pass.k - pass.k_floor;
    pass.temperature = args.temperature, pass.seed = args.seed, pass.code = args.code, pass.kind = args.kind;
    pass.states = reinterpret_cast<PassStates*>(args.scratch);
    pass.rows = reinterpret_cast<int32_t*>(pass.states + 1);
    pass.spans = pass.rows + kPassBlocks * kPassBins;
    pass.slots = reinterpret_cast<int64_t*>(pass.spans + 3 * kPassBlocks);
    pass.histogram = args.tickets, pass.ticket = args.tickets + kPassBins;
    pass.chosen = args.chosen, pass.index = args.index, pass.chosen_score = args.chosen_score;
    pass.inclusion = args.inclusion, pass.sorted = args.sorted, pass.finish = plan.finished;
    pass.delayed = args.delayed;
    return pass;
}

// The passes in their order. run.count(source, pass), run.floor(source, pass) and run.write(source, pass) launch one.
template <typename Run>
Status run_passes(const SelectTopKArgs& args, const SelectTopKPlan& plan, const Run& run) {
    PassArgs pass = in_passes(args, plan);
    const bool has_noise = args.temperature > 0.0f && pass.k_first > 0;
    Digits digits = digits_down_to(has_noise ? 0 : lowest_bit(args.dtype));
    const auto count = [&](Source source, int from) {
        for (int i = from; i < digits.count; ++i) {
            pass.is_first = i == 0;
            pass.is_last = i == digits.count - 1;
            pass.shift = digits.shift[i];
            pass.width = i == 0 ? 33 - pass.shift : digits.shift[i - 1] - pass.shift;
            const Source from_now = i > 0 && source == Source::with_noise ? Source::codes : source;
            ATTENT_RETURN_UNLESS_OK(run.count(from_now, pass));
        }
        return Status{};
    };
    if (pass.k_first > 0) ATTENT_RETURN_UNLESS_OK(count(has_noise ? Source::with_noise : Source::scores, 0));
    Source source = has_noise ? Source::codes : Source::scores;
    if (pass.k_floor > 0) {
        pass.first_shift = digits.shift[digits.count - 1];
        digits = digits_down_to(0);
        pass.is_first = pass.is_last = false;
        pass.shift = digits.shift[0], pass.width = 33 - pass.shift;
        ATTENT_RETURN_UNLESS_OK(run.floor(source, pass));
        source = Source::floor;
        ATTENT_RETURN_UNLESS_OK(count(source, 1));
    }
    pass.shift = digits.shift[digits.count - 1];
    return run.write(source, pass);
}

// One kernel each; run_passes says when. score's dtype matters to those that read scores.
Status launch_select_count(Source source, Dtype dtype, const PassArgs& args, int blocks, cudaStream_t stream);
Status launch_select_floor(Source source, Dtype dtype, const PassArgs& args, int blocks, cudaStream_t stream);
Status launch_select_write(Source source, Dtype dtype, const PassArgs& args, int blocks, cudaStream_t stream);

// All of the plan up to the sort, or to the end. Nothing is launched where k is 0.
Status launch_select_top_k(const SelectTopKArgs& args, cudaStream_t stream);

// What follows the sort where the plan is not finished.
Status launch_select_outputs(const SelectTopKArgs& args, cudaStream_t stream);

}  // namespace attent::gpu
