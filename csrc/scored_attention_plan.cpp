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

}  // namespace

AttentionPlan plan_scored_attention(const AttentionSizes& sizes) {
    AttentionPlan plan{};
    const bool few = sizes.only_pooled_row || sizes.rows <= FEW_QUERIES;
    plan.shape = tile_shape(std::max(sizes.width, sizes.value_width), few);
    const int block_m = plan.shape.block_m();
    if (sizes.only_pooled_row) {
        plan.tiles = sizes.is_packed ? sizes.examples : 1;
    } else if (sizes.is_packed) {
        plan.tiles = sizes.rows / block_m + 1 + sizes.examples;
    } else {
        plan.tiles = std::max(1, (sizes.rows + block_m - 1) / block_m);
    }
    const int64_t units =
        static_cast<int64_t>(sizes.heads) * plan.tiles * (sizes.is_packed ? 1 : std::max(sizes.examples, 0));
    plan.splits = 1;
    if (few) {
        const int keys = sizes.is_packed ? sizes.keys / std::max(sizes.examples, 1) : sizes.keys;
        plan.splits = splits(units, keys, plan.shape.block_n, sizes.processors);
    }
    plan.blocks = units * plan.splits;
    plan.tickets = 1 + (sizes.examples + GROUP - 1) / GROUP + sizes.examples + (plan.splits > 1 ? units : 0);
    plan.slots = sizes.has_target ? units : sizes.pool == Pool::mean ? units * plan.shape.width : 0;
    plan.split_slots = plan.splits > 1 ? units * plan.splits * part_floats(plan.shape.width) : 0;
    plan.choice_scratch = select_scratch_length(sizes.examples);
    return plan;
}

}  // namespace attent::gpu
