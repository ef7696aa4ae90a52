// The scorer's portable kernel (sm_80 and up); what it does is the header of scorer/portable.cuh.
#ifdef ATTENT_EMULATE
#include "emulate_launch.h"
#else
#include "check.h"
#endif

#include "scorer.h"
#include "scorer/portable.cuh"

namespace attent::gpu::scorer {

namespace {

template <typename T, Sums SUMS>
__global__ void __launch_bounds__(Portable::THREADS, Portable::RESIDENT)
    portable_scorer_kernel(const __grid_constant__ ScorerArgs args) {
    portable_scorer<T, SUMS>(args, dynamic_shared());
}

template <typename T>
Status launch_for(const ScorerArgs& args, int processors, cudaStream_t stream) {
    const Sums sums = sums_of(ScorerKernel::portable, args);
    const auto kernel = sums == Sums::plain    ? portable_scorer_kernel<T, Sums::plain>
                        : sums == Sums::capped ? portable_scorer_kernel<T, Sums::capped>
                                               : portable_scorer_kernel<T, Sums::spread>;
    const ScorerPlan plan = plan_scorer(ScorerKernel::portable, args, processors);
    LaunchShape shape;
    shape.grid = dim3(static_cast<unsigned>(plan.grid));
    shape.block = dim3(static_cast<unsigned>(plan.threads));
    shape.shared = static_cast<size_t>(plan.shared_bytes);
    return launch("portable_scorer", kernel, shape, stream, args);
}

}  // namespace

Status launch_scorer(ScorerKernel kernel, const ScorerArgs& args, int processors, cudaStream_t stream) {
    ATTENT_RETURN_UNLESS_OK(check_scorer(args));
    if (kernel == ScorerKernel::hopper) {
#if defined(ATTENT_SM90A) || defined(ATTENT_EMULATE)
        return launch_hopper_scorer(args, processors, stream);
#else
        return say(Status::refused, "kernel: got 'hopper'; this build has no code for sm_90a");
#endif
    }
    return args.number == Number::bfloat16 ? launch_for<BFloat16>(args, processors, stream)
                                           : launch_for<Half>(args, processors, stream);
}

}  // namespace attent::gpu::scorer
