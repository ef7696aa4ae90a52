// Top-k of up to kMostInLaunch scores in one launch of one block: select_in_block of select.cuh, which has the maths.
// Of more, the launches in their order (select_top_k.h).
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

struct Launches {
    Dtype dtype;
    int blocks;
    cudaStream_t stream;

    Status count(Source source, const PassArgs& pass) const {
        return launch_select_count(source, dtype, pass, blocks, stream);
    }
    Status floor(Source source, const PassArgs& pass) const {
        return launch_select_floor(source, dtype, pass, blocks, stream);
    }
    Status write(Source source, const PassArgs& pass) const {
        return launch_select_write(source, dtype, pass, blocks, stream);
    }
};

}  // namespace

Status launch_select_top_k(const SelectTopKArgs& args, cudaStream_t stream) {
    ATTENT_RETURN_UNLESS_OK(check_select_top_k(args));
    if (args.k == 0) return Status{};
    if (args.n > kMostInLaunch) {
        const auto plan = plan_select_top_k(args.n, args.k, args.k_floor, args.temperature, args.dtype);
        return run_passes(args, plan, Launches{args.dtype, plan.blocks, stream});
    }
    return for_dtype(args.dtype, [&](auto score) { return launch_for<decltype(score)>(args, stream); });
}

}  // namespace attent::gpu
