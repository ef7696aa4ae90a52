// How scored attention is cut into blocks, and what memory its launch is lent. Host arithmetic alone.

#include <algorithm>

#include "cuda/scored_attention.h"
#include "cuda/select.cuh"

namespace attent::gpu {

namespace {

// Into how many parts the keys of a few queries are cut: until there are two blocks for each processor. Each part has
// four tiles of keys at least: below that its fixed costs (a query's load, a slot's store, a ticket) are as large as its
// work.
int splits(int64_t blocks, int keys, int block_n, int processors) {
    const int64_t most = std::max<int64_t>(blocks, 1);
    const int64_t wanted = (2 * static_cast<int64_t>(processors) + most - 1) / most;
    return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, keys / (4 * block_n))));
}

bool is_few(const AttentionSizes& sizes) {
    return sizes.only_pooled_row || sizes.rows <= FEW_QUERIES;
}

}  // namespace

const char* hopper_attention_refuses(const AttentionSizes& sizes) {
    const int widest = std::max(sizes.width, sizes.value_width);
    if (!sizes.is_hopper) return "no Hopper GPU, or rows that no tensor map finds";
    if (is_few(sizes)) return "few queries";
    if (sizes.keys == 0) return "no keys: a tensor map has one at least";
    if (widest > 128) return "head dimensions above 128";
    if (widest > 64 && widest <= 96) return "head dimensions from 65 to 96";
    return nullptr;
}

AttentionPlan plan_scored_attention(const AttentionSizes& sizes) {
    AttentionPlan plan{};
    const int widest = std::max(sizes.width, sizes.value_width);
    plan.shape = tile_shape(widest, is_few(sizes));
    if (hopper_attention_refuses(sizes) == nullptr) {
        const HopperShape shape{widest <= 64 ? 64 : 128};
        plan.kernel = AttentionKernel::hopper;
        plan.width = shape.width, plan.block_m = shape.BLOCK_M, plan.block_n = shape.BLOCK_N;
        plan.threads = shape.THREADS, plan.shared_bytes = shape.shared_bytes();
    } else {
        plan.kernel = AttentionKernel::portable;
        plan.width = plan.shape.width, plan.block_m = plan.shape.block_m(), plan.block_n = plan.shape.block_n;
        plan.threads = plan.shape.threads(), plan.shared_bytes = plan.shape.shared_bytes();
    }
    if (sizes.only_pooled_row) {
        plan.tiles = sizes.is_packed ? sizes.examples : 1;
    } else if (sizes.is_packed) {
        plan.tiles = sizes.rows / plan.block_m + 1 + sizes.examples;
    } else {
        plan.tiles = std::max(1, (sizes.rows + plan.block_m - 1) / plan.block_m);
    }
    plan.units = static_cast<int64_t>(sizes.heads) * plan.tiles * (sizes.is_packed ? 1 : std::max(sizes.examples, 0));
    plan.splits = 1;
    if (is_few(sizes)) {
        const int keys = sizes.is_packed ? sizes.keys / std::max(sizes.examples, 1) : sizes.keys;
        plan.splits = splits(plan.units, keys, plan.block_n, sizes.processors);
    }
    plan.tickets = 1 + num_groups(sizes) + sizes.examples + (plan.splits > 1 ? plan.units : 0);
    plan.blocks = plan.units * plan.splits;
    if (plan.kernel ==
        AttentionKernel::hopper) {  // its blocks take one unit after the other; a ticket says which is next
        plan.blocks = std::min<int64_t>(plan.units, std::max(sizes.processors, 1));
        plan.tickets += 1;
    }
    plan.slots = sizes.has_target ? plan.units : sizes.pool == Pool::mean ? plan.units * plan.width : 0;
    plan.split_slots = plan.splits > 1 ? plan.units * plan.splits * part_floats(plan.width) : 0;
    plan.choice_scratch = select_scratch_length(sizes.examples);
    return plan;
}

}  // namespace attent::gpu
