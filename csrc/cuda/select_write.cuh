// The passes that write, of a large pool's selection (select_passes.cuh): the floor's first one, which marks who is taken
// by key, and the one that writes who is chosen.
#pragma once

#include "block_sort.cuh"
#include "select_passes.cuh"

namespace attent::gpu {

// Marks who is among the first, gives the others the floor's codes, and counts the first digit of those.
template <Source SOURCE, typename Score, int KEYS>
ATTENT_HD void count_floor(const Block& block, const PassArgs& args, int program, int programs,
                           PassShared<KEYS>& shared) {
    int64_t first_key = -1, ties_left = 0;  // no key is below 0: with no first ones, none is taken
    if (args.k_first > 0) {
        first_key = args.states->first.key;
        ties_left = args.states->first.left - args.spans[2 * kPassBlocks + program];
    }
    const int64_t begin = program * args.span, end = smaller(begin + args.span, args.n);
    int64_t* not_taken = shared.keys;  // [threads]: the smallest key that a thread has not taken
    clear_counts(block, shared);
    block.phase([&](int thread) { not_taken[thread] = kLastRank; });
    for (int64_t start = begin; start < end; start += block.threads * kAdjacent) {
        block.phase([&](int thread) {
            const Keys keys = load_keys<SOURCE, Score>(args, start + int64_t{thread} * kAdjacent);
            shared.counts[thread] = ties_among(keys, args.first_shift, first_key);
        });
        const int ties = count_ties(block, shared);
        block.phase([&](int thread) {
            const int64_t i = start + int64_t{thread} * kAdjacent;
            const Keys keys = load_keys<SOURCE, Score>(args, i);
            bool is_taken[kAdjacent];
            take(keys, args.first_shift, first_key, thread == 0 ? 0 : shared.counts[thread - 1], ties_left, is_taken);
            Run run;
            int n_taken = 0, n_valid = 0;
            for (int j = 0; j < kAdjacent && i + j < args.n; ++j) {
                const Example example = load_example(static_cast<const Score*>(args.score), args.valid, i + j);
                int32_t code = 0;
                int8_t kind = kTaken;
                if (is_taken[j]) {
                    ++n_taken;
                } else {
                    not_taken[thread] = smaller(not_taken[thread], keys.key[j]);
                    const uint32_t bits = random_bits(*args.seed, i + j).lane[1];
                    code = example.valid ? floor_code(bits) : descending_code(example.score);
                    kind = example.valid ? kValid : kInvalid;
                    const int64_t place = key_of(code, example.valid) >> args.shift;
                    run.add(static_cast<int>(place) & ((1 << args.width) - 1), shared.bins);
                }
                n_valid += example.valid;
                args.code[i + j] = code;
                args.kind[i + j] = kind;
            }
            run.flush(shared.bins);
            atomic_add(&shared.n_taken, n_taken);
            atomic_add(&shared.n_valid, n_valid);
        });
        ties_left -= ties;
    }
    const int64_t smallest = extreme<true>(block, not_taken, block.threads);
    block.phase([&](int thread) {
        for (int bin = thread; bin < kPassBins; bin += block.threads) shared.counts[bin] = shared.bins[bin];
        if (thread != 0) return;
        args.slots[program] = smallest;
        args.slots[kPassBlocks + program] = shared.n_taken;
        args.slots[2 * kPassBlocks + program] = shared.n_valid;
    });
    if (!publish(block, args, program, programs, shared)) return;
    const int64_t runner_up = least(block, args.slots, programs, shared);
    const int64_t n_valid = total(block, args.slots + 2 * kPassBlocks, programs, shared);
    block.phase([&](int thread) {
        if (thread == 0) args.states->runner_up = runner_up;
        if (thread == 0) args.states->n_valid = n_valid;
    });
    find_digit(block, args, &args.states->floor, 0, args.k_floor, args.slots + kPassBlocks, programs, shared);
}

// Index, score and inclusion of the chosen at `position`, in the order of args.chosen.
template <typename Score>
ATTENT_HD void write_output(const PassArgs& args, int64_t position, const Thresholds& thresholds) {
    const int64_t index = index_of_rank(load_of_others(args.chosen + position));
    const bool is_first = args.k_floor == 0 || load_of_others(args.kind + index) == kTaken;
    const Score score = static_cast<const Score*>(args.score)[index];
    args.index[position] = index;
    static_cast<Score*>(args.chosen_score)[position] = score;
    args.inclusion[position] = inclusion_of(to_float32(score), is_first, thresholds, args.k_first, args.temperature);
}

// From the state that the passes left. A hard choice has not looked at who is valid: its inclusions are 1 all the same.
ATTENT_HD Thresholds thresholds_of(const PassArgs& args) {
    Thresholds thresholds{0.0f, 0.0f, 0.0f, true};
    if (args.temperature == 0.0f && args.k_floor == 0) return thresholds;
    const int n_valid = static_cast<int>(load_of_others(&args.states->n_valid));
    thresholds.is_certain = n_valid <= args.k;
    if (args.k_floor > 0) thresholds.share = floor_share(args.k_floor, n_valid, args.k_first);
    if (drawn(args).gumbel) {
        thresholds.last_first = value_of_key(load_of_others(&args.states->first.key));
        thresholds.runner_up = value_of_key(load_of_others(&args.states->runner_up));
    }
    return thresholds;
}

// Writes the ranks by score of all who are chosen, in index order; the last block finishes where it is to.
template <Source SOURCE, typename Score, int KEYS>
ATTENT_HD void write_all(const Block& block, const PassArgs& args, int program, int programs,
                         PassShared<KEYS>& shared) {
    const PassState state = SOURCE == Source::floor ? args.states->floor : args.states->first;
    const int64_t begin = program * args.span, end = smaller(begin + args.span, args.n);
    int place = args.spans[kPassBlocks + program];
    int64_t ties_left = state.left - args.spans[2 * kPassBlocks + program];
    const bool finds_runner_up = drawn(args).gumbel && !drawn(args).floor;
    int64_t* runner_up = shared.keys;  // [threads]
    block.phase([&](int thread) { runner_up[thread] = kLastRank; });
    for (int64_t start = begin; start < end; start += block.threads * kAdjacent) {
        block.phase([&](int thread) {
            const Keys keys = load_keys<SOURCE, Score>(args, start + int64_t{thread} * kAdjacent);
            shared.counts[thread] = ties_among(keys, args.shift, state.key);
        });
        const int ties = count_ties(block, shared);
        block.phase([&](int thread) {
            const int64_t i = start + int64_t{thread} * kAdjacent;
            const Keys keys = load_keys<SOURCE, Score>(args, i);
            bool is_taken[kAdjacent];
            take(keys, args.shift, state.key, thread == 0 ? 0 : shared.counts[thread - 1], ties_left, is_taken);
            int bits = 0;
            for (int j = 0; j < kAdjacent && i + j < args.n; ++j) {
                if (is_taken[j] || !keys.is_eligible[j]) {  // not eligible: taken by its key before the floor
                    bits |= 1 << j;
                } else if (finds_runner_up) {
                    runner_up[thread] = smaller(runner_up[thread], keys.key[j]);
                }
            }
            shared.bins[thread] = bits;
        });
        block.phase([&](int thread) {
            int taken = 0;
            for (int j = 0; j < kAdjacent; ++j) taken += shared.bins[thread] >> j & 1;
            shared.counts[thread] = taken;
        });
        running_sums(block, shared.counts, shared.spare, block.threads);
        const int taken = shared.counts[block.threads - 1];
        block.phase([&](int thread) {
            const int64_t i = start + int64_t{thread} * kAdjacent;
            int64_t* to = args.chosen + place + (thread == 0 ? 0 : shared.counts[thread - 1]);
            for (int j = 0; j < kAdjacent; ++j) {
                if ((shared.bins[thread] >> j & 1) == 0) continue;
                const Example example = load_example(static_cast<const Score*>(args.score), args.valid, i + j);
                *to++ = rank_of(descending_code(example.score), example.valid, i + j);
            }
        });
        place += taken;
        ties_left -= ties;
    }
    if (finds_runner_up) {
        const int64_t found = extreme<true>(block, runner_up, block.threads);
        block.phase([&](int thread) {
            if (thread == 0) args.slots[program] = found;
        });
    }
    if (!args.finish && !finds_runner_up) return;
    if (!take_ticket(args.ticket, programs, args.delayed)) return;
    if (finds_runner_up) {
        const int64_t found = least(block, args.slots, programs, shared);
        block.phase([&](int thread) {
            if (thread == 0) args.states->runner_up = found;
        });
    }
    if (!args.finish) return;
    if (args.sorted) sort_in_block(block, args.chosen, args.k, shared.keys, KEYS);
    const Thresholds thresholds = thresholds_of(args);
    block.phase([&](int thread) {
        for (int64_t i = thread; i < args.k; i += block.threads) write_output<Score>(args, i, thresholds);
    });
}

// The outputs of a choice that was sorted between two launches.
template <typename Score>
ATTENT_HD void write_outputs(const Block& block, const PassArgs& args, int program) {
    const Thresholds thresholds = thresholds_of(args);
    block.phase([&](int thread) {
        const int64_t i = int64_t{program} * block.threads + thread;
        if (i < args.k) write_output<Score>(args, i, thresholds);
    });
}

}  // namespace attent::gpu
