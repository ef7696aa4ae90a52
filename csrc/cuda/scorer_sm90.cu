// The Hopper kernel (sm_90a); what it does is the header of scorer/hopper_scorer.cuh.
#include "scorer.h"
#include "scorer/hopper_scorer.cuh"

namespace attent {
namespace scorer {

template <typename T, Sums SUMS>
__global__ void __launch_bounds__(Hopper::THREADS, 1)
    hopper_scorer_kernel(const __grid_constant__ ScorerArgs args, const __grid_constant__ hopper::TensorMap hidden,
                         const __grid_constant__ hopper::TensorMap weight) {
    hopper_scorer<T, SUMS>(args, hidden, weight, dynamic_shared());
}
template __global__ void hopper_scorer_kernel<BFloat16, Sums::plain>(const __grid_constant__ ScorerArgs, const __grid_constant__ hopper::TensorMap, const __grid_constant__ hopper::TensorMap);
template __global__ void hopper_scorer_kernel<BFloat16, Sums::capped>(const __grid_constant__ ScorerArgs, const __grid_constant__ hopper::TensorMap, const __grid_constant__ hopper::TensorMap);
template __global__ void hopper_scorer_kernel<BFloat16, Sums::spread>(const __grid_constant__ ScorerArgs, const __grid_constant__ hopper::TensorMap, const __grid_constant__ hopper::TensorMap);

}  // namespace scorer
}  // namespace attent
