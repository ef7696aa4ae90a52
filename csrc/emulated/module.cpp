// The Python module attent_emulated, for tests: GPU kernels' own source on CPU tensors (cuda/emulate.h). It is compiled
// with -DATTENT_EMULATE from this file, the kernels' .cu files, and the bind files of the real module; nothing installs it.

#include "binds.h"
#include "cuda/emulate.h"

PYBIND11_MODULE(attent_emulated, module) {
    module.doc() = "GPU kernels' own source on a CPU.";
    attent::bind_scored_attention(module);
    attent::bind_scorer(module);
    module.def(
        "set_schedule", [](uint64_t seed) { attent::emulate::schedule().seed = seed; },
        "The order in which threads and blocks run, and when asynchronous copies happen; 0: blocks in their order.");
    module.def("launches", [] { return attent::emulate::launches(); }, "How many kernels were launched so far.");
}
