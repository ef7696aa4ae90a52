// Index, score and inclusion of the chosen of a large pool, once their ranks are sorted: write_output of
// select_write.cuh.
//
// Shapes: chosen [k], score [n], kind [n]; index, chosen_score, inclusion [k]. Bytes: 8 a chosen one read, 2 or 4 and 1
// gathered, 14 or 16 written.
#include "check.h"
#include "select_top_k.h"
#include "select_write.cuh"

namespace attent::gpu {

namespace {

template <typename Score>
__global__ void __launch_bounds__(kPassThreads) select_outputs_kernel(PassArgs args) {
    write_outputs<Score>(Block{kPassThreads}, args, blockIdx.x);
}

template <typename Score>
Status launch_for(const PassArgs& args, cudaStream_t stream) {
    LaunchShape shape;
    shape.grid = static_cast<unsigned>(ceil_div(args.k, kPassThreads));
    shape.block = kPassThreads;
    return launch("select_outputs", select_outputs_kernel<Score>, shape, stream, args);
}

}  // namespace

Status launch_select_outputs(const SelectTopKArgs& args, cudaStream_t stream) {
    ATTENT_RETURN_UNLESS_OK(check_select_top_k(args));
    const auto plan = plan_select_top_k(args.n, args.k, args.k_floor, args.temperature, args.dtype);
    const PassArgs pass = in_passes(args, plan);
    return for_dtype(args.dtype, [&](auto score) { return launch_for<decltype(score)>(pass, stream); });
}

}  // namespace attent::gpu
