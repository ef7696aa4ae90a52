// The twin of check.h's launch for kernels that run on a CPU (emulate.h).
#pragma once

#include "emulate.h"
#include "status.h"

namespace attent::gpu {

struct LaunchShape {
    dim3 grid = 1;
    dim3 block = 1;
    size_t shared = 0;
};

template <typename... Parameters, typename... Arguments>
Status launch(const char* name, void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t,
              Arguments&&... arguments) {
    try {
        emulate::launch<Parameters...>(kernel, shape.grid, shape.block, shape.shared, arguments...);
    } catch (const std::exception& problem) {
        return say(Status::failed, "%s: %s", name, problem.what());
    }
    return Status{};
}

}  // namespace attent::gpu
