// One width of tiles in one object file, so that they are compiled side by side.
#pragma once

#include "scored_attention.cuh"

namespace attent::gpu {

#define ATTENT_SCORED_ATTENTION(WIDTH)                                                                    \
    Status launch_scored_attention_##WIDTH(const ScoredAttention& a, const AttentionPlan& plan, bool few, \
                                           cudaStream_t stream) {                                         \
        if (a.dtype == Dtype::float16) return launch_width<Half, WIDTH>(a, plan, few, stream);            \
        return launch_width<BFloat16, WIDTH>(a, plan, few, stream);                                       \
    }

// Few queries have tiles of 64, 128 and 256: what counts there is memory, and smaller ones would not read less.
template <typename T, int WIDTH>
Status launch_width(const ScoredAttention& a, const AttentionPlan& plan, bool few, cudaStream_t stream) {
    if constexpr (tile_shape(WIDTH, true).width == WIDTH) {
        if (few) return launch_tile<T, WIDTH, true>(a, plan, stream);
    }
    return launch_tile<T, WIDTH, false>(a, plan, stream);
}

}  // namespace attent::gpu
