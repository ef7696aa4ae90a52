// Which CUDA the machine's driver and this build have.
#pragma once

#include "status.h"

namespace attent::gpu {

// As CUDA numbers them: 13000 is 13.0; the driver's is 0 where there is none. Needs no GPU.
Status cuda_versions(int* driver, int* runtime);

}  // namespace attent::gpu
