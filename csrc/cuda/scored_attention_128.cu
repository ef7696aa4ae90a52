// scored_attention_kernel for head dimensions up to 128.
#include "scored_attention_instances.cuh"

namespace attent::gpu {

ATTENT_SCORED_ATTENTION(128);

}  // namespace attent::gpu
