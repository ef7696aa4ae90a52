// Launches hopper_attention_kernel.
#ifdef ATTENT_EMULATE
#include "emulate_launch.h"
#else
#include "check.h"
#endif

#include "scored_attention_sm90.cuh"
#include "tensor_map.h"

namespace attent::gpu {

namespace {

// Of a dimension of one the stride is not used; a tensor map takes none below the width.
hopper::Dimension dimension(int64_t size, int64_t stride, int width) {
    return {size, size > 1 ? stride : (width + CHUNK - 1) / CHUNK * CHUNK};
}

Status make_map_of_rows(hopper::TensorMap* map, const Rows& of, const ScoredAttention& a, int rows, int heads,
                        int width) {
    const int examples = a.sizes.is_packed ? 1 : a.sizes.examples;
    return hopper::make_map(
        map, of.data, a.dtype == Dtype::bfloat16, width,
        {dimension(rows, of.row, width), dimension(heads, of.head, width), dimension(examples, of.example, width)},
        HopperShape::BLOCK_N);
}

template <typename T, int WIDTH>
Status launch_for(const ScoredAttention& a, const AttentionPlan& plan, cudaStream_t stream) {
    const AttentionSizes& sizes = a.sizes;
    TensorMaps maps;
    ATTENT_RETURN_UNLESS_OK(make_map_of_rows(&maps.query, a.query, a, sizes.rows, sizes.heads, sizes.width));
    const int key_heads = sizes.heads / sizes.heads_per_key;
    ATTENT_RETURN_UNLESS_OK(make_map_of_rows(&maps.key, a.key, a, sizes.keys, key_heads, sizes.width));
    ATTENT_RETURN_UNLESS_OK(make_map_of_rows(&maps.value, a.value, a, sizes.keys, key_heads, sizes.value_width));
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(plan.blocks));
    shape.block = dim3(static_cast<unsigned>(plan.threads));
    shape.shared = static_cast<size_t>(plan.shared_bytes);
    return launch("hopper_attention", hopper_attention_kernel<HopperTile<T, WIDTH>>, shape, stream, a, maps, plan.tiles,
                  static_cast<int>(plan.units));
}

}  // namespace

Status launch_hopper_attention(const ScoredAttention& a, const AttentionPlan& plan, cudaStream_t stream) {
    const bool is_half = a.dtype == Dtype::float16;
    if (plan.width == 64)
        return is_half ? launch_for<Half, 64>(a, plan, stream) : launch_for<BFloat16, 64>(a, plan, stream);
    return is_half ? launch_for<Half, 128>(a, plan, stream) : launch_for<BFloat16, 128>(a, plan, stream);
}

}  // namespace attent::gpu
