// The floor's first digit, of a large pool: count_floor of select_write.cuh marks who is taken by key.
//
// Shapes: score [n], valid [n], code [n], kind [n]. Bytes: up to 5 an example read, twice but then from the L1 cache;
// 5 written.
#include "check.h"
#include "select_top_k.h"
#include "select_write.cuh"

namespace attent::gpu {

namespace {

template <Source SOURCE, typename Score>
__global__ void __launch_bounds__(kPassThreads) select_floor_kernel(PassArgs args) {
    __shared__ PassShared<1024> shared;
    count_floor<SOURCE, Score>(Block{kPassThreads}, args, blockIdx.x, gridDim.x, shared);
}

template <typename Score>
Status launch_of(Source source, const PassArgs& args, int blocks, cudaStream_t stream) {
    LaunchShape shape;
    shape.grid = blocks;
    shape.block = kPassThreads;
    return source == Source::codes
               ? launch("select_floor", select_floor_kernel<Source::codes, Score>, shape, stream, args)
               : launch("select_floor", select_floor_kernel<Source::scores, Score>, shape, stream, args);
}

}  // namespace

Status launch_select_floor(Source source, Dtype dtype, const PassArgs& args, int blocks, cudaStream_t stream) {
    return for_dtype(dtype, [&](auto score) { return launch_of<decltype(score)>(source, args, blocks, stream); });
}

}  // namespace attent::gpu
