#include "check.h"
#include "versions.h"

namespace attent::gpu {

Status cuda_versions(int* driver, int* runtime) {
    ATTENT_CHECK_CALL(cudaDriverGetVersion(driver));
    ATTENT_CHECK_CALL(cudaRuntimeGetVersion(runtime));
    return Status{};
}

}  // namespace attent::gpu
