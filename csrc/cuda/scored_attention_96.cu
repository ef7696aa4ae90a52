// scored_attention_kernel for head dimensions up to 96.
#include "scored_attention_instances.cuh"

namespace attent::gpu {

ATTENT_SCORED_ATTENTION(96);

}  // namespace attent::gpu
