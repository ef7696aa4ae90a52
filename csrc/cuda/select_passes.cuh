// Top-k of a pool that is too large for one block: passes that all blocks share, one launch each. As
// attent_kernels/selection_passes.py.
//
// A key is 33 bits (ranks.cuh); equal keys are taken in index order. Each block owns a span of adjacent examples. A pass
// counts one digit of the keys that match the digits found so far. Each block adds its histogram to the pool's, which
// integers allow in any order, and the last one to come finds the digit of the k-th smallest key. From the blocks' own
// histograms it learns as well how many each span holds below the k-th key and how many equal to it. So the write pass
// knows where in index order each block's chosen examples go, and which of those equal to the k-th are among them.
// Blocks never wait for each other.
//
// Bytes: each pass reads 2 or 4 an example and 1 of validity, 16 bytes at a time where the address allows; with noise the
// first pass writes 4, with a floor 5 are written once more. 8 and 20 or 22 bytes for each chosen one.
#pragma once

#include "block_sums.cuh"
#include "select.cuh"
#include "tickets.cuh"

namespace attent::gpu {

constexpr int kPassThreads = 256;
constexpr int kAdjacent = 4;  // examples that a thread looks at at a time: 16 bytes of float32
// Blocks at most: 4 for each of the 132 processors of an H100 or H200.
constexpr int kPassBlocks = 528;
constexpr int kPassBins = 512;  // of the first digit, which has the invalid bit on top
static_assert(kPassBlocks <= 1024, "the counts of all blocks fit SelectShared::counts");

// Where keys come from: the scores; the scores, with noise, and stored; as stored by such a pass, or by the floor's.
enum class Source { scores, with_noise, codes, floor };

// What the floor's first pass notes of each example.
constexpr int8_t kValid = 0, kInvalid = 1, kTaken = 2;

// Of the choice by key, and of the floor's: the k-th key (its digits so far) and how many equal to it are taken.
struct PassState {
    int64_t key, left;
};

struct PassStates {
    PassState first, floor;
    int64_t n_valid;
    int64_t runner_up;  // the smallest key that is not taken
};

struct PassArgs {
    const void* score;    // [n]
    const int8_t* valid;  // [n], or null: all are
    int64_t n, span;      // span: of a block, a multiple of the threads times kAdjacent
    int k, k_first, k_floor;
    float temperature;
    const int64_t* seed;  // [1]
    int32_t* code;        // [n] with noise or a floor
    int8_t* kind;         // [n] with a floor
    PassStates* states;
    int32_t* rows;        // [blocks, kPassBins]: each block's histogram, summed up
    int32_t* spans;       // [3, kPassBlocks]: examples below the k-th key; places, and equal keys, before the span
    int64_t* slots;       // [3, kPassBlocks]: what each block leaves for the last
    int32_t* histogram;   // [kPassBins], zeros, and left so
    int32_t* ticket;      // [1], likewise
    int64_t* chosen;      // [a power of two from k on]: ranks by score
    int64_t* index;       // [k], output
    void* chosen_score;   // [k], output
    float* inclusion;     // [k], output
    bool sorted, finish;  // finish: the last block of the write pass writes the outputs, too
    int shift, width;     // the digit of this pass
    int first_shift;      // the lowest bit of the choice by key, for the floor's first pass
    bool is_first, is_last;
    bool delayed;  // for stress tests: see take_ticket
};

// Shared memory of a pass: KEYS at least kPassBlocks and 1 for each thread.
template <int KEYS>
struct PassShared : SelectShared<KEYS> {
    int bins[kPassBins];
    int n_valid, n_taken;
};

struct Drawn {
    bool gumbel, floor;
};

ATTENT_HD Drawn drawn(const PassArgs& args) {
    return {args.temperature > 0.0f && args.k_first > 0, args.k_floor > 0};
}

// Four adjacent values, those behind n left as they are. Nobody writes them during the launch but this thread.
template <typename T>
ATTENT_HD void load_adjacent(const T* from, int64_t begin, int64_t n, T (&to)[kAdjacent]) {
    struct alignas(sizeof(T) * kAdjacent) Whole {
        T value[kAdjacent];
    };
    if (begin + kAdjacent <= n && reinterpret_cast<uintptr_t>(from) % sizeof(Whole) == 0) {
        const Whole whole = *reinterpret_cast<const Whole*>(from + begin);
        for (int j = 0; j < kAdjacent; ++j) to[j] = whole.value[j];
    } else {
        for (int j = 0; j < kAdjacent; ++j) {
            if (begin + j < n) to[j] = from[begin + j];
        }
    }
}

struct Keys {
    int64_t key[kAdjacent];
    bool is_eligible[kAdjacent];  // there, and to be taken by its key
};

template <Source SOURCE, typename Score>
ATTENT_HD Keys load_keys(const PassArgs& args, int64_t begin) {
    Keys keys;
    int8_t kind[kAdjacent] = {}, valid[kAdjacent] = {1, 1, 1, 1};
    int32_t code[kAdjacent] = {};
    Score score[kAdjacent] = {};
    if constexpr (SOURCE == Source::floor) {
        load_adjacent(args.kind, begin, args.n, kind);
    } else if (args.valid != nullptr) {
        load_adjacent(args.valid, begin, args.n, valid);
    }
    if constexpr (SOURCE == Source::floor || SOURCE == Source::codes) {
        load_adjacent<int32_t>(args.code, begin, args.n, code);
    } else {
        load_adjacent(static_cast<const Score*>(args.score), begin, args.n, score);
    }
    for (int j = 0; j < kAdjacent; ++j) {
        const bool is_there = begin + j < args.n;
        bool is_valid = valid[j] != 0;
        keys.is_eligible[j] = is_there;
        if constexpr (SOURCE == Source::floor) {
            is_valid = kind[j] != kInvalid;
            keys.is_eligible[j] = is_there && kind[j] != kTaken;
        } else if constexpr (SOURCE != Source::codes) {
            float value = to_float32(score[j]);
            if (SOURCE == Source::with_noise && is_valid && is_there) {
                value = gumbel(random_bits(*args.seed, begin + j).lane[0]) + log_weight(value, args.temperature);
            }
            code[j] = descending_code(value);
            if (SOURCE == Source::with_noise && is_there) args.code[begin + j] = code[j];
        }
        keys.key[j] = key_of(code[j], is_valid);
    }
    return keys;
}

// Counts of digits, one addition to shared memory for each run of equal ones: adjacent scores often share a digit.
struct Run {
    int digit = -1, length = 0;

    ATTENT_HD void add(int next, int* counts) {
        if (next != digit) {
            flush(counts);
            digit = next;
            length = 0;
        }
        ++length;
    }
    ATTENT_HD void flush(int* counts) const {
        if (length > 0) atomic_add(counts + digit, length);
    }
};

template <int KEYS>
ATTENT_HD void clear_counts(const Block& block, PassShared<KEYS>& shared) {
    block.phase([&](int thread) {
        for (int bin = thread; bin < kPassBins; bin += block.threads) shared.counts[bin] = shared.bins[bin] = 0;
        if (thread == 0) shared.n_valid = shared.n_taken = 0;
    });
}

// Adds a block's histogram, which lies in shared.counts, to the pool's; whether it was the last to do so.
template <int KEYS>
ATTENT_HD bool publish(const Block& block, const PassArgs& args, int program, int programs, PassShared<KEYS>& shared) {
    running_sums(block, shared.counts, shared.spare, kPassBins);
    block.phase([&](int thread) {
        for (int bin = thread; bin < kPassBins; bin += block.threads) {
            const int up_to = shared.counts[bin], count = up_to - (bin == 0 ? 0 : shared.counts[bin - 1]);
            args.rows[int64_t{program} * kPassBins + bin] = up_to;
            if (count > 0) atomic_add(args.histogram + bin, count);
        }
    });
    return take_ticket(args.ticket, programs, args.delayed);
}

// The sum of what all blocks left in a slot.
template <int KEYS>
ATTENT_HD int64_t total(const Block& block, const int64_t* slots, int programs, PassShared<KEYS>& shared) {
    block.phase([&](int thread) {
        for (int i = thread; i < programs; i += block.threads) {
            shared.counts[i] = static_cast<int>(load_of_others(slots + i));
        }
    });
    running_sums(block, shared.counts, shared.spare, programs);
    const int sum = shared.counts[programs - 1];
    block.phase([](int) {});  // all have read it before it is overwritten
    return sum;
}

// The smallest of what all blocks left in a slot.
template <int KEYS>
ATTENT_HD int64_t least(const Block& block, const int64_t* slots, int programs, PassShared<KEYS>& shared) {
    block.phase([&](int thread) {
        for (int i = thread; i < programs; i += block.threads) shared.keys[i] = load_of_others(slots + i);
    });
    return extreme<true>(block, shared.keys, programs);
}

// The last block's work: the digit of the k-th key, and what each span holds below it. below_slots: where each block
// left how many of its span are taken already (the floor's first pass), or null: as the spans say, or none.
template <int KEYS>
ATTENT_HD void find_digit(const Block& block, const PassArgs& args, PassState* state, int64_t prefix, int left,
                          const int64_t* below_slots, int programs, PassShared<KEYS>& shared) {
    block.phase([&](int thread) {
        for (int bin = thread; bin < kPassBins; bin += block.threads) {
            shared.counts[bin] = load_of_others(args.histogram + bin);
            args.histogram[bin] = 0;  // for the next pass
        }
    });
    running_sums(block, shared.counts, shared.spare, kPassBins);
    block.phase([&](int thread) {
        for (int bin = thread; bin < kPassBins; bin += block.threads) {
            const int before = bin == 0 ? 0 : shared.counts[bin - 1];
            if (before < left && left <= shared.counts[bin]) {  // true for one bin
                shared.digit = bin;
                shared.before = before;
            }
        }
    });
    const int digit = shared.digit;
    left -= shared.before;
    block.phase([&](int thread) {
        if (thread == 0) *state = {(prefix << args.width) + digit, left};
        for (int i = thread; i < programs; i += block.threads) {
            const int32_t* row = args.rows + int64_t{i} * kPassBins + digit;
            const int lower = digit == 0 ? 0 : load_of_others(row - 1);
            int below = lower;
            if (below_slots != nullptr) {
                below += static_cast<int>(load_of_others(below_slots + i));
            } else if (!args.is_first) {
                below += args.spans[i];  // of an earlier launch
            }
            args.spans[i] = below;
            shared.counts[i] = load_of_others(row) - lower;
        }
    });
    if (!args.is_last) return;
    running_sums(block, shared.counts, shared.spare, programs);
    block.phase([&](int thread) {
        for (int i = thread; i < programs; i += block.threads) {
            args.spans[2 * kPassBlocks + i] = i == 0 ? 0 : shared.counts[i - 1];
        }
    });
    block.phase([&](int thread) {
        for (int i = thread; i < programs; i += block.threads) shared.counts[i] = args.spans[i];
    });
    running_sums(block, shared.counts, shared.spare, programs);
    block.phase([&](int thread) {
        for (int i = thread; i < programs; i += block.threads) {
            const int ties_before = args.spans[2 * kPassBlocks + i];  // as this thread stored it
            args.spans[kPassBlocks + i] = (i == 0 ? 0 : shared.counts[i - 1]) + smaller(ties_before, left);
        }
    });
}

// Counts args.width bits of the keys from bit args.shift on, and adds the digit of the k-th to the state.
template <Source SOURCE, typename Score, int KEYS>
ATTENT_HD void count_digit(const Block& block, const PassArgs& args, int program, int programs,
                           PassShared<KEYS>& shared) {
    PassState* state = SOURCE == Source::floor ? &args.states->floor : &args.states->first;
    int64_t prefix = 0;
    int left = SOURCE == Source::floor ? args.k_floor : args.k_first;
    if (!args.is_first) {
        prefix = state->key;
        left = static_cast<int>(state->left);
    }
    clear_counts(block, shared);
    block.phase([&](int thread) {
        int n_valid = 0;
        Run run;
        const int64_t end = smaller((program + int64_t{1}) * args.span, args.n);
        for (int64_t i = program * args.span + int64_t{thread} * kAdjacent; i < end; i += block.threads * kAdjacent) {
            const Keys keys = load_keys<SOURCE, Score>(args, i);
            for (int j = 0; j < kAdjacent; ++j) {
                const int64_t place = keys.key[j] >> args.shift;
                if (keys.is_eligible[j] && place >> args.width == prefix) {
                    run.add(static_cast<int>(place) & ((1 << args.width) - 1), shared.counts);
                }
                n_valid += i + j < args.n && keys.key[j] >> 32 == 0;
            }
        }
        run.flush(shared.counts);
        atomic_add(&shared.n_valid, n_valid);
    });
    block.phase([&](int thread) {
        if (thread == 0) args.slots[program] = shared.n_valid;
    });
    if (!publish(block, args, program, programs, shared)) return;
    if (args.is_first && SOURCE != Source::floor) {
        const int64_t n_valid = total(block, args.slots, programs, shared);
        block.phase([&](int thread) {
            if (thread == 0) args.states->n_valid = n_valid;
        });
    }
    find_digit(block, args, state, prefix, left, nullptr, programs, shared);
}

// How many of those equal to the k-th key come before this thread's four in the block's round: to shared.counts. On all
// threads, how many there are in the round.
template <int KEYS>
ATTENT_HD int count_ties(const Block& block, PassShared<KEYS>& shared) {
    running_sums(block, shared.counts, shared.spare, block.threads);
    return shared.counts[block.threads - 1];
}

// Who of a thread's four is below the k-th key or, as long as there are any left to take, equal to it.
ATTENT_HD void take(const Keys& keys, int shift, int64_t kth_key, int ties_before, int64_t ties_left,
                    bool (&is_taken)[kAdjacent]) {
    for (int j = 0; j < kAdjacent; ++j) {
        const int64_t key = keys.key[j] >> shift;
        const bool is_tie = keys.is_eligible[j] && key == kth_key;
        ties_before += is_tie;
        is_taken[j] = (keys.is_eligible[j] && key < kth_key) || (is_tie && ties_before <= ties_left);
    }
}

ATTENT_HD int ties_among(const Keys& keys, int shift, int64_t kth_key) {
    int ties = 0;
    for (int j = 0; j < kAdjacent; ++j) ties += keys.is_eligible[j] && keys.key[j] >> shift == kth_key;
    return ties;
}

}  // namespace attent::gpu
