// The portable kernel (sm_80 and up); what it does is the header of scorer/portable.cuh.
#include "scorer.h"
#include "scorer/portable.cuh"

namespace attent {
namespace scorer {

template <typename T, Sums SUMS>
__global__ void __launch_bounds__(Portable::THREADS, 2) portable_scorer_kernel(const __grid_constant__ ScorerArgs args) {
    portable_scorer<T, SUMS>(args, dynamic_shared());
}
template __global__ void portable_scorer_kernel<BFloat16, Sums::plain>(const __grid_constant__ ScorerArgs);
template __global__ void portable_scorer_kernel<BFloat16, Sums::capped>(const __grid_constant__ ScorerArgs);
template __global__ void portable_scorer_kernel<BFloat16, Sums::spread>(const __grid_constant__ ScorerArgs);

}  // namespace scorer
}  // namespace attent
