// scored_attention_kernel for head dimensions up to 192.
#include "scored_attention_instances.cuh"

namespace attent::gpu {

ATTENT_SCORED_ATTENTION(192);

}  // namespace attent::gpu
