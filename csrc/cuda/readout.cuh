// A linear classifier of the pooled output: logits, cross-entropy, its gradient in the logits, and the scores.
//
// Of one example, pooled h [F] with F = heads x Dv, logits z = W h + b [C], label y, p = softmax(z): loss -log p_y;
// "logit" |p - onehot(y)|; "head" that times |h|, or sqrt(|h|^2 + 1) with a bias. Nothing is subtracted that could
// cancel: with m the largest logit, a = sum_{v != y} exp(z_v - m), s = sum_{v != y} exp(z_v - m)^2 and
// l = a + exp(z_y - m), 1 - p_y is a/l and the squared norm (a^2 + s)/l^2.
//
// Examples are read out in groups of GROUP = 16, what a tensor core's product takes: a group's last example computes the
// logits of all of it, so that the weight is read B / GROUP times and not B times. Each warp takes classes in turn and
// keeps m, a, s and z_y of its own; they are folded in a fixed order.

#pragma once

#include "attention_end.cuh"

namespace attent::gpu {

constexpr int CLASS_TILES = 4;  // of 8 classes, that a warp multiplies with every feature it reads
constexpr int WARP_CLASSES = 8 * CLASS_TILES;

// Of the logits that a lane, a warp or the block has seen of one example.
struct LogitStatistics {
    float max, others, square, own;  // m, a, s, z_y
};
__device__ __forceinline__ LogitStatistics no_logits() {
    return {minus_infinity(), 0.0f, 0.0f, minus_infinity()};
}
__device__ __forceinline__ void add_logit(LogitStatistics& of, float z, bool is_own) {
    const float both = fmaxf(of.max, z), pivot = pivot_of(both), shrink = fast_exp2((of.max - pivot) * LOG2_E);
    const float p = is_own ? 0.0f : fast_exp2((z - pivot) * LOG2_E);
    of.others = of.others * shrink + p;
    of.square = of.square * shrink * shrink + p * p;
    if (is_own) of.own = z;
    of.max = both;
}
__device__ __forceinline__ void add_statistics(LogitStatistics& of, const LogitStatistics& other) {
    const float both = fmaxf(of.max, other.max), pivot = pivot_of(both);
    const float scale = fast_exp2((of.max - pivot) * LOG2_E), other_scale = fast_exp2((other.max - pivot) * LOG2_E);
    of.others = of.others * scale + other.others * other_scale;
    of.square = of.square * scale * scale + other.square * other_scale * other_scale;
    of.own = fmaxf(of.own, other.own);
    of.max = both;
}

// Shared memory of a group's readout.
struct ReadoutShared {
    LogitStatistics of_warps[MOST_WARPS][GROUP];
    float feature_square[GROUP];  // |h|^2
};

__device__ __forceinline__ int64_t label_of(const Classifier& classifier, int64_t example) {
    const int64_t at = example * classifier.label_stride;
    return classifier.labels_are_64_bits ? static_cast<const int64_t*>(classifier.labels)[at]
                                         : static_cast<const int32_t*>(classifier.labels)[at];
}

// Whether weight and pooled output can be multiplied as they are, 8 features at a time.
__device__ __forceinline__ bool weight_is_read_in_chunks(const ScoredAttention& a, int features) {
    const View& weight = a.classifier.weight;
    return weight.dtype == a.dtype && weight.column == 1 &&
           (reinterpret_cast<uintptr_t>(weight.data) % 16 | (weight.row & (CHUNK - 1)) | (features & (CHUNK - 1))) == 0;
}

__device__ __forceinline__ uint4 chunk_or_zero(const void* data, bool is_inside) {
    return is_inside ? __ldcg(static_cast<const uint4*>(data)) : make_uint4(0, 0, 0, 0);
}

// Logits of a group's 16 examples and 32 classes, without bias. The order in which a product takes features is free as
// long as both sides agree: lane 4 g + t takes 8 t .. 8 t + 7 of every 32, so that each of its loads is of 16 bytes.
template <typename T>
__device__ __forceinline__ void multiply_weight(float (&z)[CLASS_TILES][4], const ScoredAttention& a, int first_example,
                                                int first_class, int features, const Lane& at) {
    const View& weight = a.classifier.weight;
    const T* pooled = static_cast<const T*>(a.classifier.pooled);
    const int own = at.column / 2 * CHUNK;
#pragma unroll 2
    for (int start = 0; start < features; start += 4 * CHUNK) {
        const int feature = start + own;
        uint4 h[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int example = first_example + at.row + 8 * half;
            h[half] = chunk_or_zero(pooled + static_cast<int64_t>(example) * features + feature,
                                    example < a.sizes.examples && feature < features);
        }
        const uint32_t near[4] = {h[0].x, h[1].x, h[0].y, h[1].y}, far[4] = {h[0].z, h[1].z, h[0].w, h[1].w};
#pragma unroll
        for (int n = 0; n < CLASS_TILES; ++n) {
            const int row = first_class + 8 * n + at.row;
            const uint4 w = chunk_or_zero(static_cast<const T*>(weight.data) + row * weight.row + feature,
                                          row < a.classifier.classes && feature < features);
            const uint32_t near_w[2] = {w.x, w.y}, far_w[2] = {w.z, w.w};
            mma_16x8x16<T>(z[n], near, near_w);
            mma_16x8x16<T>(z[n], far, far_w);
        }
    }
}

// The same from any dtype and strides, by multiply-adds in float32: slow, for weights that are not in query's dtype.
template <typename T>
__device__ inline float multiply_row(const T* pooled, const View& weight, int row, int features) {
    float sum = 0.0f;
    for (int feature = 0; feature < features; ++feature) {
        sum = fmaf(to_float32(load_of_others(pooled + feature)),
                   load_number(weight.data, weight.dtype, row * weight.row + feature * weight.column), sum);
    }
    return sum;
}

template <typename T>
__device__ __forceinline__ void logits_of(float (&z)[CLASS_TILES][4], const ScoredAttention& a, int first_example,
                                          int first_class, int features, const Lane& at) {
    const Classifier& classifier = a.classifier;
    const bool in_chunks = weight_is_read_in_chunks(a, features);
#pragma unroll
    for (int n = 0; n < CLASS_TILES; ++n) z[n][0] = z[n][1] = z[n][2] = z[n][3] = 0.0f;
    if (in_chunks) multiply_weight<T>(z, a, first_example, first_class, features, at);
#pragma unroll
    for (int n = 0; n < CLASS_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = first_class + 8 * n + at.column + i % 2, example = first_example + at.row + i / 2 * 8;
            if (row >= classifier.classes || example >= a.sizes.examples) continue;
            if (!in_chunks) {
                z[n][i] =
                    multiply_row(static_cast<const T*>(classifier.pooled) + static_cast<int64_t>(example) * features,
                                 classifier.weight, row, features);
            }
            if (classifier.bias.data != nullptr) {
                z[n][i] += load_number(classifier.bias.data, classifier.bias.dtype, row * classifier.bias.row);
            }
        }
    }
}

// Logits, losses, gradients and scores of one group of examples whose pooled output and validity are stored. All threads
// of the last block of the group.
template <typename C>
__device__ __forceinline__ void read_out(const ScoredAttention& a, int group, ReadoutShared& shared, const Lane& at) {
    using T = typename C::T;
    constexpr int WARPS = C::THREADS / 32;
    const Classifier& classifier = a.classifier;
    const int first_example = group * GROUP, features = a.sizes.heads * a.sizes.value_width;
    int64_t label[2];
    LogitStatistics found[2] = {no_logits(), no_logits()};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int example = first_example + at.row + 8 * half;
        label[half] = example < a.sizes.examples ? label_of(classifier, example) : 0;
    }

    for (int first = at.warp * WARP_CLASSES; first < classifier.classes; first += WARPS * WARP_CLASSES) {
        float z[CLASS_TILES][4];
        logits_of<T>(z, a, first_example, first, features, at);
#pragma unroll
        for (int n = 0; n < CLASS_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = first + 8 * n + at.column + i % 2, example = first_example + at.row + i / 2 * 8;
                if (row >= classifier.classes || example >= a.sizes.examples) continue;
                const int64_t place = static_cast<int64_t>(example) * classifier.classes + row;
                static_cast<T*>(classifier.logits)[place] = from_float<T>(z[n][i]);
                classifier.gradient[place] = z[n][i];  // for now: the logits, not rounded
                add_logit(found[i / 2], z[n][i], row == label[i / 2]);
            }
        }
    }
    if (a.score == Score::head) {
        for (int i = at.warp; i < GROUP; i += WARPS) {
            const int64_t example = first_example + i;
            float square = 0.0f;
            for (int feature = at.lane; feature < features && example < a.sizes.examples; feature += 32) {
                const float h =
                    to_float32(load_of_others(static_cast<const T*>(classifier.pooled) + example * features + feature));
                square = fmaf(h, h, square);
            }
            square = sum_of_warp(square);
            if (at.lane == 0) shared.feature_square[i] = square;
        }
    }

    // The four lanes of a row in order, then the warps in order.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        LogitStatistics of_row = no_logits();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int from = 4 * at.row + i;
            const LogitStatistics other{
                __shfl_sync(0xffffffffu, found[half].max, from), __shfl_sync(0xffffffffu, found[half].others, from),
                __shfl_sync(0xffffffffu, found[half].square, from), __shfl_sync(0xffffffffu, found[half].own, from)};
            add_statistics(of_row, other);
        }
        if (at.column == 0) shared.of_warps[at.warp][at.row + 8 * half] = of_row;
    }
    C::block().wait();  // all warps' statistics, and the features' squares, are there

    float scale[2], own_gradient[2], bad[2], max[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int i = at.row + 8 * half, example = first_example + i;
        LogitStatistics all = no_logits();
        for (int warp = 0; warp < WARPS; ++warp) add_statistics(all, shared.of_warps[warp][i]);
        const bool is_there = example < a.sizes.examples;
        const bool is_valid = is_there && __ldcg(a.results.valid + (is_there ? example : 0)) != 0;
        const bool is_label = label[half] >= 0 && label[half] < classifier.classes;
        const float own = all.own - all.max;  // 0 or below
        const float normaliser = all.others + fast_exp2(own * LOG2_E);
        const float log_normaliser = own == 0.0f ? log1pf(all.others) : log2f(normaliser) * LN_2;
        bad[half] = is_valid && !is_label ? __int_as_float(0x7fc00000) : 0.0f;  // NaN
        scale[half] = is_valid ? 1.0f / normaliser : 0.0f;
        own_gradient[half] = is_valid ? -(all.others / normaliser) : 0.0f;
        max[half] = all.max;
        if (at.warp == 0 && at.column == 0 && is_there) {
            const float loss = (is_valid ? log_normaliser - own : 0.0f) + bad[half];
            const float norm = (is_valid ? sqrtf(all.others * all.others + all.square) / normaliser : 0.0f) + bad[half];
            a.results.losses[example] = loss;
            if (a.score == Score::loss) a.results.scores[example] = loss;
            if (a.score == Score::logit) a.results.scores[example] = norm;
            if (a.score == Score::head) {
                const float square = shared.feature_square[i] + (classifier.bias.data != nullptr ? 1.0f : 0.0f);
                a.results.scores[example] = norm * sqrtf(square);
            }
        }
    }

    // The gradient over the logits that were left in its place, by the threads that left them: p - onehot(y), 0 of an
    // invalid example.
    for (int first = at.warp * WARP_CLASSES; first < classifier.classes; first += WARPS * WARP_CLASSES) {
#pragma unroll 1
        for (int n = 0; n < CLASS_TILES; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = first + 8 * n + at.column + i % 2, half = i / 2;
                const int example = first_example + at.row + 8 * half;
                if (row >= classifier.classes || example >= a.sizes.examples) continue;
                float* place = classifier.gradient + static_cast<int64_t>(example) * classifier.classes + row;
                const float p = fast_exp2((*place - max[half]) * LOG2_E) * scale[half];
                *place = (row == label[half] ? own_gradient[half] : p) + bad[half];
            }
        }
    }
}

// The mean of an example's rows, from the column sums [heads, all_tiles, WIDTH] that its tiles left. All threads.
template <typename C>
__device__ __forceinline__ void pool_mean(const ScoredAttention& a, const Unit& unit, int thread) {
    using T = typename C::T;
    const int width = a.sizes.value_width, features = a.sizes.heads * width;
    const float n = static_cast<float>(max(unit.queries.rows, 1));
    T* pooled = static_cast<T*>(a.classifier.pooled) + static_cast<int64_t>(unit.example) * features;
    for (int feature = thread; feature < features; feature += C::THREADS) {
        const int head = feature / width;
        const float* slot =
            a.workspace.slots + (head * unit.all_tiles + unit.first_tile) * C::WIDTH + (feature - head * width);
        float sum = 0.0f;
        for (int tile = 0; tile < unit.own_tiles; ++tile) {
            sum += __ldcg(slot + static_cast<int64_t>(tile) * C::WIDTH);
        }
        pooled[feature] = from_float<T>(sum / n);
    }
}

}  // namespace attent::gpu
