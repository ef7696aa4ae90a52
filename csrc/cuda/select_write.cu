// Who of a large pool is chosen, in index order: write_all of select_write.cuh. The last block sorts up to
// kFinishedInPass of them and writes the outputs.
//
// Shapes: score [n], valid [n], code [n], kind [n]; chosen [k], outputs [k]. Bytes: up to 5 an example read, twice but
// then from the L1 cache; 8 a chosen one written, and 20 or 22 where the last block finishes.
#include "check.h"
#include "select_top_k.h"
#include "select_write.cuh"

namespace attent::gpu {

namespace {

template <Source SOURCE, typename Score>
__global__ void __launch_bounds__(kPassThreads) select_write_kernel(PassArgs args) {
    __shared__ PassShared<kFinishedInPass> shared;
    write_all<SOURCE, Score>(Block{kPassThreads}, args, blockIdx.x, gridDim.x, shared);
}

template <typename Score>
Status launch_of(Source source, const PassArgs& args, int blocks, cudaStream_t stream) {
    LaunchShape shape;
    shape.grid = blocks;
    shape.block = kPassThreads;
    switch (source) {
        case Source::codes:
            return launch("select_write", select_write_kernel<Source::codes, Score>, shape, stream, args);
        case Source::floor:
            return launch("select_write", select_write_kernel<Source::floor, Score>, shape, stream, args);
        default:
            return launch("select_write", select_write_kernel<Source::scores, Score>, shape, stream, args);
    }
}

}  // namespace

Status launch_select_write(Source source, Dtype dtype, const PassArgs& args, int blocks, cudaStream_t stream) {
    return for_dtype(dtype, [&](auto score) { return launch_of<decltype(score)>(source, args, blocks, stream); });
}

}  // namespace attent::gpu
