// scored_attention_kernel for head dimensions up to 64.
#include "scored_attention_instances.cuh"

namespace attent::gpu {

ATTENT_SCORED_ATTENTION(64);

}  // namespace attent::gpu
