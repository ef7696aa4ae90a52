// The scorer's folds: vocabulary groups into tokens, tokens into examples, blocks of examples into one number.
//
// What other blocks of threads stored is read past this multiprocessor's L1 cache (__ldcg), and summed in an order that
// depends on sizes alone: a thread's numbers one after the other, then the threads by halves.
#pragma once

#include "online.cuh"
#include "tokens.cuh"

namespace attent::gpu::scorer {

/// Where a token's kept numbers stand: slots [kept, groups, capacity].
template <bool SPREAD>
__device__ __forceinline__ void store_slot(const ScorerArgs& args, int64_t capacity, int group, int row,
                                           const Kept& kept, const Spread& spread) {
    const int64_t step = args.groups * capacity;
    float* slot = args.slots + group * capacity + row;
    slot[0] = kept.m;
    slot[step] = kept.a;
    slot[2 * step] = kept.s;
    if constexpr (SPREAD) {
        slot[3 * step] = spread.b;
        slot[4 * step] = spread.c;
        slot[5 * step] = spread.t;
        slot[6 * step] = spread.o;
    }
}

/// What is kept of a token's whole vocabulary.
template <bool SPREAD>
__device__ void fold_groups(const ScorerArgs& args, int64_t capacity, int row, Kept& kept, Spread& spread) {
    kept = nothing_kept();
    spread = nothing_spread();
    const int64_t step = args.groups * capacity;
    const float* slot = args.slots + row;
    for (int group = 0; group < args.groups; ++group) {
        kept.m = fmaxf(kept.m, __ldcg(slot + group * capacity));
    }
    const float pivot = finite(kept.m);
    for (int group = 0; group < args.groups; ++group) {
        const float* part = slot + group * capacity;
        const float ahead = __ldcg(part) - pivot, shrink = fast_exp2(ahead);
        kept.a += shrink * __ldcg(part + step);
        kept.s += shrink * shrink * __ldcg(part + 2 * step);
        if constexpr (SPREAD) {
            spread.b += shrink * __ldcg(part + 3 * step);
            spread.c += __ldcg(part + 4 * step);
            const float mass = __ldcg(part + 6 * step);
            spread.t += __ldcg(part + 5 * step) + (mass == 0.0f ? 0.0f : ahead * mass);
            spread.o += mass;
        }
    }
}

/// The token of a row: its loss, square, count and share to the workspace, and to the output that is not reduced.
template <bool SPREAD>
__device__ void fold_token(const ScorerArgs& args, int64_t capacity, int row) {
    if (row >= args.tokens) return;
    const Token token = read_token(args, row);
    float label_weight = 1.0f;
    if (args.class_weight.data != nullptr && token.counted) {
        // A label that is no class counts in the denominator as the class nearest to it would.
        const int nearest = token.label == -2 ? args.classes - 1 : larger(token.label, 0);
        label_weight = load_float(args.class_weight.data, args.class_weight.number, nearest);
    }
    LossAndSquare result{0.0f, 0.0f};
    if (token.computed && token.label < 0) {
        result.loss = result.square = NAN;
    } else if (token.computed) {
        Kept kept;
        Spread spread;
        fold_groups<SPREAD>(args, capacity, row, kept, spread);
        Capped own{__ldcg(args.own + row), 1.0f};
        if (args.softcap > 0) own = capped(own.logit, args.softcap, 1.0f / args.softcap);
        float mass = label_weight;
        if (SPREAD) mass *= (1.0f - args.label_smoothing) + args.label_smoothing / args.classes;
        result = loss_and_square<SPREAD>(kept, spread, own.logit, own.slope, mass);
    }
    args.token_loss[row] = result.loss;
    args.token_square[row] = result.square;
    args.token_count[row] = token.counted ? 1.0f : 0.0f;
    if (args.token_share != nullptr) args.token_share[row] = token.counted ? label_weight : 0.0f;
    if (args.head != nullptr) {
        // The length of [h 1]: of hidden states that no product was computed with there is none.
        const float has_bias = args.bias != nullptr ? 1.0f : 0.0f;
        args.token_head[row] = token.computed ? result.square * (__ldcg(args.hidden_square + row) + has_bias) : 0.0f;
    }
    if (args.reduction == Reduction::none) args.loss[row] = token.computed ? result.loss * token.factor : 0.0f;
}

/// values[i] += values[i + lanes/2] …, until the first of every `lanes` threads has their sum. lanes: a power of two.
template <typename Team>
__device__ float sum_of_lanes(const Team& team, float* values, int lanes, float mine) {
    values[team.thread()] = mine;
    for (int step = lanes / 2; step > 0; step /= 2) {
        team.sync();  // the numbers of the upper half are there
        if (team.thread() % lanes < step) values[team.thread()] += values[team.thread() + step];
    }
    const float sum = values[team.thread()];
    team.sync();  // nobody overwrites what another still reads
    return sum;
}

/// Counts, scores, losses and validity of a block of examples, and what it adds to the batch's loss.
template <typename Team>
__device__ void fold_examples(const ScorerArgs& args, int block, const Team& team, float* shared /* [threads] */) {
    const int lanes = team.threads() / args.block_examples, lane = team.thread() % lanes;
    const int example = block * args.block_examples + team.thread() / lanes;
    const bool is_example = example < args.batch;
    const int begin = first_token(args, smaller(example, args.batch));
    const int end = first_token(args, smaller(example + 1, args.batch));
    float count = 0.0f, loss = 0.0f, square = 0.0f, head = 0.0f, share = 0.0f;
    for (int row = begin + lane; row < end; row += lanes) {
        count += __ldcg(args.token_count + row);
        loss += __ldcg(args.token_loss + row);
        square += __ldcg(args.token_square + row);
        if (args.head != nullptr) head += __ldcg(args.token_head + row);
        if (args.token_share != nullptr) share += __ldcg(args.token_share + row);
    }
    count = sum_of_lanes(team, shared, lanes, count);
    loss = sum_of_lanes(team, shared, lanes, loss);
    square = sum_of_lanes(team, shared, lanes, square);
    if (args.head != nullptr) head = sum_of_lanes(team, shared, lanes, head);
    if (args.token_share != nullptr) share = sum_of_lanes(team, shared, lanes, share);

    const bool writes = is_example && lane == 0;
    const float n = fmaxf(count, 1.0f);
    const float scale = args.per_example == PerExample::mean  ? 1.0f / n
                        : args.per_example == PerExample::rms ? 1.0f / sqrtf(n)
                                                              : 1.0f;
    float weighted = loss;
    if (writes) {
        args.counts[example] = count;
        if (args.mean_loss != nullptr) args.mean_loss[example] = loss / n;
        if (args.logit != nullptr) args.logit[example] = sqrtf(square) * scale;
        if (args.head != nullptr) args.head[example] = sqrtf(head) * scale;
        bool is_valid = count > 0.0f;
        if (args.example_weight.data != nullptr) {
            const Vector& weight = args.example_weight;
            const float factor = load_float(weight.data, weight.number, example * weight.stride);
            weighted *= factor;  // where it is 0 no token is computed, and the losses are 0
            is_valid = is_valid && factor != 0.0f;
        }
        if (args.valid != nullptr) args.valid[example] = is_valid;
        if (args.reduction == Reduction::example) args.loss[example] = weighted / n;
    }
    if (args.reduction == Reduction::sum || args.reduction == Reduction::mean) {
        const float of_block = sum_of_lanes(team, shared, team.threads(), writes ? weighted : 0.0f);
        const float of_share = args.token_share != nullptr ? share : count;
        const float shares = sum_of_lanes(team, shared, team.threads(), writes ? of_share : 0.0f);
        if (team.thread() == 0) {
            args.block_loss[block] = of_block;
            args.block_share[block] = shares;
        }
    }
}

/// The batch's loss: a sum, or a mean, which is 0 where nothing is counted.
template <typename Team>
__device__ void fold_blocks(const ScorerArgs& args, const Team& team, float* shared /* [threads] */) {
    if (args.reduction != Reduction::sum && args.reduction != Reduction::mean) return;
    float loss = 0.0f, share = 0.0f;
    for (int block = team.thread(); block < args.blocks; block += team.threads()) {
        loss += __ldcg(args.block_loss + block);
        share += __ldcg(args.block_share + block);
    }
    loss = sum_of_lanes(team, shared, team.threads(), loss);
    share = sum_of_lanes(team, shared, team.threads(), share);
    if (team.thread() != 0) return;
    args.loss[0] = args.reduction == Reduction::sum ? loss : share == 0.0f ? 0.0f * loss : loss / share;
}

}  // namespace attent::gpu::scorer
