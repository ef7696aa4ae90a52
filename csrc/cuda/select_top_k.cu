// Top-k of up to kMostInLaunch scores in one launch of one block: select_in_block of select.cuh, which has the maths.
//
// Shapes: score [n], valid [n]; index, chosen_score, inclusion [k]. Bytes: 2 or 4 and 1 an example from memory, then
// scratch memory that stays in the caches. One block is bound by its instructions and barriers, not by bytes or FLOPs.
#include "check.h"
#include "select_top_k.h"

namespace attent::gpu {

namespace {

template <typename Score>
__global__ void __launch_bounds__(kSelectThreads, 1) select_top_k_kernel(SelectArgs<Score> args) {
    __shared__ SelectShared<kSelectKeys> shared;
    select_in_block(Block{kSelectThreads}, args, shared);
}

template <typename Score>
Status launch_for(const SelectTopKArgs& args, cudaStream_t stream) {
    LaunchShape shape;
    shape.block = kSelectThreads;
    return launch("select_top_k", select_top_k_kernel<Score>, shape, stream, in_block<Score>(args));
}

}  // namespace

Status launch_select_top_k(const SelectTopKArgs& args, cudaStream_t stream) {
    ATTENT_RETURN_UNLESS_OK(check_select_top_k(args));
    if (args.k == 0) return Status{};
    switch (args.dtype) {
        case Dtype::float32:
            return launch_for<float>(args, stream);
        case Dtype::float16:
            return launch_for<Half>(args, stream);
        case Dtype::bfloat16:
            return launch_for<BFloat16>(args, stream);
    }
    return say(Status::refused, "dtype: got %d; takes 0 (float32), 1 (float16) or 2 (bfloat16)",
               static_cast<int>(args.dtype));
}

}  // namespace attent::gpu
