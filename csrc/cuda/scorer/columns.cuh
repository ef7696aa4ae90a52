// From a thread's accumulators of a tile of raw logits to what it keeps of them.
//
// Accumulators of mma.sync and of wgmma lie alike: of row `lane / 4` (and of that + 8) a thread has the columns
// 8 j + 2 (lane % 4) and the one after. A thread keeps its own sums of its own columns, with no word to its neighbours
// until the end of a group: a maximum of its own costs one exponential more a row and tile than a shared one, and saves
// the shuffles.
#pragma once

#include "online.cuh"
#include "tokens.cuh"

namespace attent::gpu::scorer {

/// Which columns a thread's N numbers of a row are: `first` + 8 (i / 2) + i % 2.
__device__ __forceinline__ int column_of(int first, int i) {
    return first + 8 * (i / 2) + i % 2;
}

/// The bias of the columns from `first` on, to N logits of a row.
template <typename T, int N>
__device__ __forceinline__ void add_bias(const ScorerArgs& args, float (&z)[N], int first) {
    const T* bias = static_cast<const T*>(args.bias) + first;
#pragma unroll
    for (int i = 0; i < N; ++i) {
        if (column_of(first, i) < args.classes) z[i] += to_float32(bias[column_of(0, i)]);
    }
}

/// N raw logits of a row, of the columns from `first` on. Where the target's own is among them, it goes to `own`.
template <Sums SUMS, int N>
__device__ __forceinline__ void keep_columns(const ScorerArgs& args, float inverse_softcap, float (&z)[N], int first,
                                             int label, float* own, Kept& kept, Spread& spread) {
    constexpr bool SPREAD = SUMS == Sums::spread;
    // Rarely true: once a row, and in the last tile.
    const bool has_own = label >= first && label <= column_of(first, N - 1) && (label - first) % 8 < 2;
    const bool is_ragged = column_of(first, N - 1) >= args.classes;
    if (has_own) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            if (column_of(first, i) == label) *own = z[i];
        }
    }
    float d[N], mass[N];
    if (SUMS != Sums::plain) {
        const bool is_capped = SUMS == Sums::capped || args.softcap > 0;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            Capped value{z[i], 1.0f};
            if (is_capped) value = capped(z[i], args.softcap, inverse_softcap);
            z[i] = value.logit;
            d[i] = value.slope;
        }
    }
    if constexpr (SPREAD) {
        const float of_class = args.label_smoothing / args.classes;
        const Vector& weight = args.class_weight;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            mass[i] = of_class;
            if (weight.data != nullptr) {
                const int column = smaller(column_of(first, i), args.classes - 1);
                mass[i] *= load_float(weight.data, weight.number, column);
            }
        }
    }
    if (has_own || is_ragged) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int column = column_of(first, i);
            if (column == label || column >= args.classes) {
                z[i] = minus_infinity();
                if constexpr (SPREAD) mass[i] = 0.0f;
            }
        }
    }
    keep<SUMS != Sums::plain, SPREAD, N>(kept, spread, z, d, mass);
}

struct All {
    Kept kept;
    Spread spread;
};

/// What the four lanes that share a row keep together; all four get it, and the same to the bit.
template <bool SPREAD>
__device__ __forceinline__ void merge_lanes(All& all) {
#pragma unroll
    for (int away = 1; away <= 2; away *= 2) {
        All other{{}, nothing_spread()};
        other.kept.m = __shfl_xor_sync(0xffffffffu, all.kept.m, away);
        other.kept.a = __shfl_xor_sync(0xffffffffu, all.kept.a, away);
        other.kept.s = __shfl_xor_sync(0xffffffffu, all.kept.s, away);
        if constexpr (SPREAD) {
            other.spread.b = __shfl_xor_sync(0xffffffffu, all.spread.b, away);
            other.spread.c = __shfl_xor_sync(0xffffffffu, all.spread.c, away);
            other.spread.t = __shfl_xor_sync(0xffffffffu, all.spread.t, away);
            other.spread.o = __shfl_xor_sync(0xffffffffu, all.spread.o, away);
        }
        merge(all.kept, all.spread, other.kept, other.spread);
    }
}

}  // namespace attent::gpu::scorer
