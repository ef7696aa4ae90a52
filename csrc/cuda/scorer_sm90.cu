// The scorer's Hopper kernel (sm_90a); what it does is the header of scorer/hopper_scorer.cuh.
#ifdef ATTENT_EMULATE
#include "emulate_launch.h"
#else
#include "check.h"
#endif

#include "scorer.h"
#include "scorer/hopper_scorer.cuh"
#include "tensor_map.h"

namespace attent::gpu::scorer {

namespace {

template <typename T, Sums SUMS>
__global__ void __launch_bounds__(Hopper::THREADS, Hopper::RESIDENT)
    hopper_scorer_kernel(const __grid_constant__ ScorerArgs args, const __grid_constant__ hopper::TensorMap hidden,
                         const __grid_constant__ hopper::TensorMap weight) {
    hopper_scorer<T, SUMS>(args, hidden, weight, dynamic_shared());
}

template <typename T>
Status launch_for(const ScorerArgs& args, int processors, cudaStream_t stream) {
    constexpr bool IS_BFLOAT16 = std::is_same_v<T, BFloat16>;
    hopper::TensorMap hidden, weight;
    ATTENT_RETURN_UNLESS_OK(hopper::make_map(&hidden, args.hidden, IS_BFLOAT16, args.tokens, args.width,
                                             hidden_row_stride(args), Hopper::BM));
    ATTENT_RETURN_UNLESS_OK(
        hopper::make_map(&weight, args.weight, IS_BFLOAT16, args.classes, args.width, args.weight_row, Hopper::BN));
    const bool is_plain = sums_of(ScorerKernel::hopper, args) == Sums::plain;
    const auto kernel = is_plain ? hopper_scorer_kernel<T, Sums::plain> : hopper_scorer_kernel<T, Sums::spread>;
    const ScorerPlan plan = plan_scorer(ScorerKernel::hopper, args, processors);
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(plan.grid));
    shape.block = dim3(static_cast<unsigned>(plan.threads));
    shape.shared = static_cast<size_t>(plan.shared_bytes);
    return launch("hopper_scorer", kernel, shape, stream, args, hidden, weight);
}

}  // namespace

Status launch_hopper_scorer(const ScorerArgs& args, int processors, cudaStream_t stream) {
    if (const char* reason = hopper_scorer_refuses(args)) {
        return say(Status::refused, "kernel: got 'hopper'; it cannot take these arguments: %s", reason);
    }
    return args.number == Number::bfloat16 ? launch_for<BFloat16>(args, processors, stream)
                                           : launch_for<Half>(args, processors, stream);
}

}  // namespace attent::gpu::scorer
