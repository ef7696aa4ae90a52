// One digit of the k-th key of a large pool: count_digit of select_passes.cuh, which has the maths.
//
// Shapes: score [n], valid [n], code [n]. Bytes: 2 or 4 an example and 1 of validity, read once; with noise 4 written.
// Integer work only, but for the noise: some 20 instructions an example, 250 with noise.
#include "check.h"
#include "select_top_k.h"

namespace attent::gpu {

namespace {

template <Source SOURCE, typename Score>
__global__ void __launch_bounds__(kPassThreads) select_count_kernel(PassArgs args) {
    __shared__ PassShared<1024> shared;
    count_digit<SOURCE, Score>(Block{kPassThreads}, args, blockIdx.x, gridDim.x, shared);
}

template <Source SOURCE, typename Score>
Status launch_for(const PassArgs& args, int blocks, cudaStream_t stream) {
    LaunchShape shape;
    shape.grid = blocks;
    shape.block = kPassThreads;
    return launch("select_count", select_count_kernel<SOURCE, Score>, shape, stream, args);
}

template <typename Score>
Status launch_of(Source source, const PassArgs& args, int blocks, cudaStream_t stream) {
    return source == Source::with_noise ? launch_for<Source::with_noise, Score>(args, blocks, stream)
                                        : launch_for<Source::scores, Score>(args, blocks, stream);
}

}  // namespace

Status launch_select_count(Source source, Dtype dtype, const PassArgs& args, int blocks, cudaStream_t stream) {
    // Codes are read instead of scores: one kernel serves all dtypes.
    if (source == Source::codes) return launch_for<Source::codes, float>(args, blocks, stream);
    if (source == Source::floor) return launch_for<Source::floor, float>(args, blocks, stream);
    return for_dtype(dtype, [&](auto score) { return launch_of<decltype(score)>(source, args, blocks, stream); });
}

}  // namespace attent::gpu
