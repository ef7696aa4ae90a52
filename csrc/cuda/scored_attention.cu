// Which instance of scored_attention_kernel a call takes.
#ifdef ATTENT_EMULATE
#include "emulate.h"
#endif

#include "scored_attention.h"

namespace attent::gpu {

Status launch_scored_attention_64(const ScoredAttention&, const AttentionPlan&, bool, cudaStream_t);
Status launch_scored_attention_96(const ScoredAttention&, const AttentionPlan&, bool, cudaStream_t);
Status launch_scored_attention_128(const ScoredAttention&, const AttentionPlan&, bool, cudaStream_t);
Status launch_scored_attention_192(const ScoredAttention&, const AttentionPlan&, bool, cudaStream_t);
Status launch_scored_attention_256(const ScoredAttention&, const AttentionPlan&, bool, cudaStream_t);

Status launch_hopper_attention(const ScoredAttention&, const AttentionPlan&, cudaStream_t);

Status launch_scored_attention(const ScoredAttention& a, cudaStream_t stream) {
    if (a.dtype != Dtype::float16 && a.dtype != Dtype::bfloat16) {
        return say(Status::refused, "query: got dtype %d; takes float16 and bfloat16", static_cast<int>(a.dtype));
    }
    const int widest = a.sizes.width > a.sizes.value_width ? a.sizes.width : a.sizes.value_width;
    if (widest > 256) return say(Status::refused, "query: got a head dimension of %d; takes up to 256", widest);
    const AttentionPlan plan = plan_scored_attention(a.sizes);
    if (plan.units * plan.splits >= int64_t{1} << 31) {
        return say(Status::refused, "query: got %lld tiles of rows; takes fewer than 2^31",
                   static_cast<long long>(plan.units * plan.splits));
    }
    if (plan.kernel == AttentionKernel::hopper) {
#if defined(ATTENT_SM90A) || defined(ATTENT_EMULATE)
        return launch_hopper_attention(a, plan, stream);
#else
        return say(Status::refused, "sizes: got is_hopper; this build has no code for sm_90a");
#endif
    }
    const bool few = plan.shape.key_warps > 1;
    switch (plan.shape.width) {
        case 64:
            return launch_scored_attention_64(a, plan, few, stream);
        case 96:
            return launch_scored_attention_96(a, plan, few, stream);
        case 128:
            return launch_scored_attention_128(a, plan, few, stream);
        case 192:
            return launch_scored_attention_192(a, plan, few, stream);
        default:
            return launch_scored_attention_256(a, plan, few, stream);
    }
}

}  // namespace attent::gpu
