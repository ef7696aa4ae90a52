// Every CUDA call goes through here, so that an error names the call, or the kernel with its launch configuration.
//
// The caller has made the tensors' device current (Python's guard does, for this thread and for every copy of the CUDA
// runtime in the process: they share the driver's current context) and keeps all memory alive until the stream is past
// the launch. PyTorch's allocator does the latter for tensors of the stream that they are used on.
#pragma once

#include <cuda_runtime.h>

#include "status.h"

namespace attent::gpu {

inline Status check_call(cudaError_t error, const char* call) {
    if (error == cudaSuccess) return Status{};
    cudaGetLastError();  // it is told here: the next launch must not report it as its own
    return say(Status::failed, "%s: %s (%s)", call, cudaGetErrorString(error), cudaGetErrorName(error));
}

#define ATTENT_CHECK_CALL(call) ATTENT_RETURN_UNLESS_OK(::attent::gpu::check_call((call), #call))

struct LaunchShape {
    dim3 grid = 1;
    dim3 block = 1;
    size_t shared = 0;  // dynamic shared memory, bytes
    dim3 cluster = 1;   // sm_90 and up
};

// What every block may have without asking.
constexpr size_t kSharedUnasked = 48 << 10;

// Launches `kernel`, called `name`, with `arguments`. Asks for the shared memory it needs. An empty grid is no launch.
template <typename... Parameters, typename... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
              Arguments&&... arguments) {
    if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return Status{};
    cudaError_t error = cudaSuccess;
    if (shape.shared > kSharedUnasked) {
        error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shape.shared));
    }
    if (error == cudaSuccess) {
        cudaLaunchConfig_t config{};
        config.gridDim = shape.grid;
        config.blockDim = shape.block;
        config.dynamicSmemBytes = shape.shared;
        config.stream = stream;
        cudaLaunchAttribute cluster{};
        if (shape.cluster.x * shape.cluster.y * shape.cluster.z > 1) {
            cluster.id = cudaLaunchAttributeClusterDimension;
            cluster.val.clusterDim = {shape.cluster.x, shape.cluster.y, shape.cluster.z};
            config.attrs = &cluster;
            config.numAttrs = 1;
        }
        error = cudaLaunchKernelEx(&config, kernel, static_cast<Arguments&&>(arguments)...);
    }
    if (error == cudaSuccess) return Status{};
    cudaGetLastError();
    int device = -1;
    cudaGetDevice(&device);
    return say(Status::failed,
               "%s: %s (%s); launched with grid (%u, %u, %u), block (%u, %u, %u), cluster (%u, %u, %u), %zu bytes of "
               "shared memory, on device %d",
               name, cudaGetErrorString(error), cudaGetErrorName(error), shape.grid.x, shape.grid.y, shape.grid.z,
               shape.block.x, shape.block.y, shape.block.z, shape.cluster.x, shape.cluster.y, shape.cluster.z,
               shape.shared, device);
}

}  // namespace attent::gpu
