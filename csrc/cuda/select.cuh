// Top-k within a launch: the last block of a kernel that has written a pool's scores chooses from them.
//
// Hard, or Gumbel top-k with a floor, and the inclusion probabilities, what attent.select_top_k defines. As
// attent_kernels/selection.py, whose order of steps, ranks and noise this has:
//
// 1. Each example's rank (ranks.cuh) goes to scratch memory.
// 2. Radix selection: the k-th smallest rank, 8 bits a pass, from the highest bit in which ranks differ down to where a
//    bin holds just what is still to be taken. Counts are integers, so their order does not matter.
// 3. The chosen ones' ranks by score are compacted in index order by prefix sums, and sorted (block_sort.cuh).
//    A hard choice from up to kFew is a sort of the pool: 2 and the compaction fall away.
// With a floor, 2 is done again on the floor's noise of those that were not taken.
//
// Bytes: 8 an example written once and read in each pass (3 or 4, of distinct float32 scores) and twice in the
// compaction, all from the caches; 16 a chosen one. Scores and validity are read past the L1 cache, since other blocks
// wrote them. Scratch memory is this block's own: its L1 cache is right.
#pragma once

#include "block_sort.cuh"
#include "block_sums.cuh"
#include "dtype.h"
#include "ranks.cuh"

namespace attent::gpu {

// A larger pool ends its launch with scores and goes to select_top_k: one block alone would take too long over it.
constexpr int kMostInLaunch = 16384;
// Up to here a hard choice sorts the pool rather than select first.
constexpr int kFew = 512;
constexpr int kBins = 256;
// Adjacent ranks that a thread compacts between two prefix sums: 64 bytes, two whole sectors of the L2 cache.
constexpr int kItems = 8;

// Shared memory of a selection: KEYS a power of two, at least 4 for each thread of the block, up to 1,024 threads.
template <int KEYS>
struct alignas(16) SelectShared {
    int64_t keys[KEYS];  // the sort's buffer; before, what each thread found
    int counts[1024];    // of each bin, or of each thread
    int spare[1024];
    int digit, before, in_bin;
};

template <typename Score>
struct SelectArgs {
    const Score* score;   // [n]
    const int8_t* valid;  // [n], or null: all are
    int n, k;             // 0 <= k <= n <= kMostInLaunch
    int k_floor;          // how many of the k are drawn uniformly
    float temperature;    // 0: by score; above: Gumbel top-k
    const int64_t* seed;  // [1]; null only where temperature and k_floor are 0
    int64_t* index;       // [k], output
    Score* chosen_score;  // [k], output
    float* inclusion;     // [k], output
    int64_t* scratch;     // [select_scratch_length(n)], aligned to 16 bytes
    bool sorted = true;   // false: in the order of the indices
};

ATTENT_HD int64_t select_scratch_length(int64_t n) {
    return n + (n & 1) + power_of_two(n);
}

struct Example {
    float score;
    bool valid;
};

template <typename Score>
ATTENT_HD Example load_example(const Score* score, const int8_t* valid, int64_t index) {
    return {to_float32(load_of_others(score + index)), valid == nullptr || load_of_others(valid + index) != 0};
}

// What decides the inclusion probabilities of the chosen.
struct Thresholds {
    float last_first;  // the key of the last that was taken by its key
    float runner_up;   // and of the first that was not
    float share;       // k_floor / (n_valid - k_first)
    bool is_certain;   // all valid ones are taken: nothing is left to chance, and keys may belong to invalid ones
};

// q, of who was taken by its key against the runner-up and of the others against the last taken; and the floor's share
// of what q leaves.
ATTENT_HD float inclusion_of(float score, bool is_first, const Thresholds& thresholds, int k_first, float temperature) {
    if (thresholds.is_certain) return 1.0f;
    float q = is_first ? 1.0f : 0.0f;
    if (temperature > 0.0f) {
        const float threshold = is_first ? thresholds.runner_up : thresholds.last_first;
        q = k_first > 0 ? probability_above(log_weight(score, temperature), threshold) : 0.0f;
    }
    return q + (1.0f - q) * thresholds.share;
}

ATTENT_HD float floor_share(int k_floor, int n_valid, int k_first) {
    return static_cast<float>(k_floor) / static_cast<float>(larger(n_valid - k_first, 1));
}

ATTENT_HD int bit_length(uint64_t number) {
    int length = 0;
    for (; number > 0; number >>= 1) ++length;
    return length;
}

// A bound that exactly the k > 0 smallest of ranks [n] do not exceed. Ranks above `highest` are not looked at.
template <int KEYS>
ATTENT_HD int64_t bound_of_smallest(const Block& block, const int64_t* ranks, int n, int k, int64_t lowest,
                                    int64_t highest, SelectShared<KEYS>& shared) {
    const uint64_t base = static_cast<uint64_t>(lowest), extent = static_cast<uint64_t>(highest) - base;
    int shift = larger(bit_length(extent) - 8, 0), width = 8;
    uint64_t prefix = 0;
    int left = k;
    for (;;) {
        block.phase([&](int thread) {
            for (int bin = thread; bin < kBins; bin += block.threads) shared.counts[bin] = 0;
        });
        block.phase([&](int thread) {
            for (int i = thread; i < n; i += block.threads) {
                const uint64_t place = (static_cast<uint64_t>(ranks[i]) - base) >> shift;
                // A rank above the highest may match as well: it lies behind the k-th and is never taken.
                if (place >> width == prefix) atomic_add(&shared.counts[place & ((1u << width) - 1)], 1);
            }
        });
        running_sums(block, shared.counts, shared.spare, kBins);
        block.phase([&](int thread) {
            for (int bin = thread; bin < kBins; bin += block.threads) {
                const int before = bin == 0 ? 0 : shared.counts[bin - 1];
                if (before < left && left <= shared.counts[bin]) {  // true for one bin
                    shared.digit = bin;
                    shared.before = before;
                    shared.in_bin = shared.counts[bin] - before;
                }
            }
        });
        prefix = (prefix << width) + static_cast<uint64_t>(shared.digit);
        left -= shared.before;
        if (shared.in_bin == left || shift == 0) break;
        width = smaller(shift, 8);
        shift -= width;
    }
    // 2^64 - 1 where prefix and shift are the highest: the sum wraps around, and the extent is smaller.
    const uint64_t bound = ((prefix + 1) << shift) - 1;
    return static_cast<int64_t>(base + smaller(bound, extent));
}

// Stores the ranks that the first of the chosen are taken by. Returns how many examples are valid.
template <typename Score, int KEYS>
ATTENT_HD int rank_all(const Block& block, const SelectArgs<Score>& args, int64_t* ranks, int64_t* lowest,
                       int64_t* highest, SelectShared<KEYS>& shared) {
    const bool gumbel_noise = args.temperature > 0.0f;
    const int64_t seed = gumbel_noise ? *args.seed : 0;
    block.phase([&](int thread) {
        int n_valid = 0;
        int64_t low = kLastRank, high = kFirstRank;
        for (int i = thread; i < args.n; i += block.threads) {
            const Example example = load_example(args.score, args.valid, i);
            float value = example.score;
            // Invalid ones have no noise: where they must fill up, they do it in the order of their scores at any seed.
            if (gumbel_noise && example.valid) {
                value = gumbel(random_bits(seed, i).lane[0]) + log_weight(value, args.temperature);
            }
            const int64_t rank = rank_of(descending_code(value), example.valid, i);
            ranks[i] = rank;
            n_valid += example.valid;
            low = smaller(low, rank);
            high = larger(high, rank);
        }
        shared.counts[thread] = n_valid;
        shared.keys[thread] = low;
        shared.keys[block.threads + thread] = high;
    });
    *lowest = extreme<true>(block, shared.keys, block.threads);
    *highest = extreme<false>(block, shared.keys + block.threads, block.threads);
    running_sums(block, shared.counts, shared.spare, block.threads);
    const int n_valid = shared.counts[block.threads - 1];
    block.phase([](int) {});  // all have read the count before it is overwritten
    return n_valid;
}

// What a choice by key leaves for the floor and for the inclusion probabilities.
struct Boundary {
    int64_t last_first, runner_up;  // the last rank that was taken, and the first that was not
};

// Those up to `bound` are taken: kLastRank marks them. The others get the ranks that the floor is drawn by.
template <typename Score, int KEYS>
ATTENT_HD Boundary rank_rest_by_floor(const Block& block, const SelectArgs<Score>& args, int64_t* ranks, int64_t bound,
                                      int64_t* lowest, int64_t* highest, SelectShared<KEYS>& shared) {
    const int64_t seed = *args.seed;
    block.phase([&](int thread) {
        int64_t last_first = kFirstRank, runner_up = kLastRank, low = kLastRank, high = kFirstRank;
        for (int i = thread; i < args.n; i += block.threads) {
            const int64_t rank = ranks[i];
            if (rank <= bound) {
                last_first = larger(last_first, rank);
                ranks[i] = kLastRank;
            } else {
                runner_up = smaller(runner_up, rank);
                const Example example = load_example(args.score, args.valid, i);
                const int32_t code =
                    example.valid ? floor_code(random_bits(seed, i).lane[1]) : descending_code(example.score);
                const int64_t by_floor = rank_of(code, example.valid, i);
                low = smaller(low, by_floor);
                high = larger(high, by_floor);
                ranks[i] = by_floor;
            }
        }
        shared.keys[thread] = last_first;
        shared.keys[block.threads + thread] = runner_up;
        shared.keys[2 * block.threads + thread] = low;
        shared.keys[3 * block.threads + thread] = high;
    });
    Boundary boundary;
    boundary.last_first = extreme<false>(block, shared.keys, block.threads);
    boundary.runner_up = extreme<true>(block, shared.keys + block.threads, block.threads);
    *lowest = extreme<true>(block, shared.keys + 2 * block.threads, block.threads);
    *highest = extreme<false>(block, shared.keys + 3 * block.threads, block.threads);
    return boundary;
}

// Stores the ranks by score of those up to `bound`, and of those marked as taken, side by side, in index order. Returns
// the last of the ranks up to `bound`, and the first after it.
template <typename Score, int KEYS>
ATTENT_HD Boundary compact_by_score(const Block& block, const SelectArgs<Score>& args, const int64_t* ranks,
                                    int64_t bound, int64_t* chosen, SelectShared<KEYS>& shared) {
    const bool ranks_are_by_score = args.temperature == 0.0f && args.k_floor == 0;
    int64_t* last = shared.keys;
    int64_t* following = shared.keys + block.threads;
    block.phase([&](int thread) {
        last[thread] = kFirstRank;
        following[thread] = kLastRank;
    });
    int taken_before = 0;
    for (int start = 0; start < args.n; start += block.threads * kItems) {
        block.phase([&](int thread) {
            const int begin = start + thread * kItems;
            int taken = 0;
            for (int i = begin; i < smaller(begin + kItems, args.n); ++i) {
                const int64_t rank = ranks[i];
                taken += rank <= bound || rank == kLastRank;
                if (rank <= bound) {
                    last[thread] = larger(last[thread], rank);
                } else {
                    following[thread] = smaller(following[thread], rank);
                }
            }
            shared.counts[thread] = taken;
        });
        running_sums(block, shared.counts, shared.spare, block.threads);
        const int taken = shared.counts[block.threads - 1];
        block.phase([&](int thread) {
            const int begin = start + thread * kItems;
            int place = taken_before + (thread == 0 ? 0 : shared.counts[thread - 1]);
            for (int i = begin; i < smaller(begin + kItems, args.n); ++i) {
                int64_t rank = ranks[i];
                if (rank > bound && rank != kLastRank) continue;
                if (!ranks_are_by_score) {
                    const Example example = load_example(args.score, args.valid, i);
                    rank = rank_of(descending_code(example.score), example.valid, i);
                }
                chosen[place++] = rank;
            }
        });
        taken_before += taken;
    }
    Boundary boundary;
    boundary.last_first = extreme<false>(block, last, block.threads);
    boundary.runner_up = extreme<true>(block, following, block.threads);
    return boundary;
}

// Called by all threads of one block, the last of its launch; args.k = 0 and args.n = 0 are fine. Before, a barrier lies
// behind the block's last use of the memory that `shared` takes (take_ticket has one).
template <typename Score, int KEYS>
ATTENT_HD void select_in_block(const Block& block, const SelectArgs<Score>& args, SelectShared<KEYS>& shared) {
    if (args.k == 0) return;
    const bool gumbel_noise = args.temperature > 0.0f, has_floor = args.k_floor > 0;
    const bool noisy = gumbel_noise || has_floor;
    const int k_first = args.k - args.k_floor;
    int64_t* ranks = args.scratch;
    int64_t* chosen = args.scratch + args.n + (args.n & 1);

    int64_t lowest, highest;
    const int n_valid = rank_all(block, args, ranks, &lowest, &highest, shared);
    // A hard choice from few, and one of all, is a sort of them where they lie.
    const bool is_part = args.k < args.n && (noisy || !args.sorted || args.n > kFew);
    Boundary boundary{kFirstRank, kLastRank};
    int64_t bound = kFirstRank;
    if (is_part && k_first > 0) bound = bound_of_smallest(block, ranks, args.n, k_first, lowest, highest, shared);
    if (has_floor && is_part) {
        boundary = rank_rest_by_floor(block, args, ranks, bound, &lowest, &highest, shared);
        bound = bound_of_smallest(block, ranks, args.n, args.k_floor, lowest, highest, shared);
    }
    int64_t* found = chosen;
    int count = args.k;
    if (is_part || noisy) {
        // All of them: every rank is below kLastRank. Then nothing is left to chance, and the boundary is not used.
        const Boundary taken = compact_by_score(block, args, ranks, is_part ? bound : kLastRank - 1, chosen, shared);
        if (!has_floor) boundary = taken;
    } else {
        found = ranks;
        count = args.n;
    }
    if (args.sorted) sort_in_block(block, found, count, shared.keys, KEYS);

    const Thresholds thresholds{value_of_code(code_of_rank(boundary.last_first)),
                                value_of_code(code_of_rank(boundary.runner_up)),
                                has_floor ? floor_share(args.k_floor, n_valid, k_first) : 0.0f, n_valid <= args.k};
    block.phase([&](int thread) {
        for (int position = thread; position < args.k; position += block.threads) {
            const int64_t index = index_of_rank(found[position]);
            const bool is_first = !has_floor || ranks[index] == kLastRank;
            const Score score = load_of_others(args.score + index);
            args.index[position] = index;
            args.chosen_score[position] = score;
            args.inclusion[position] = inclusion_of(to_float32(score), is_first, thresholds, k_first, args.temperature);
        }
    });
}

}  // namespace attent::gpu
