// scored_attention_kernel for head dimensions up to 256.
#include "scored_attention_instances.cuh"

namespace attent::gpu {

ATTENT_SCORED_ATTENTION(256);

}  // namespace attent::gpu
