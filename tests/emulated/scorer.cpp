// The scorer's kernels on a CPU: their own source, run by the emulator (csrc/cuda/emulate.h), behind the same binding as
// on a GPU. Python's launcher does not see the difference; addresses are those of CPU tensors.
#define ATTENT_EMULATE
#include "../../csrc/cuda/emulate.h"
//
#include "../../csrc/bind_scorer.cpp"
#include "../../csrc/cuda/scorer/hopper_scorer.cuh"
#include "../../csrc/cuda/scorer/portable.cuh"
#include "../../csrc/scorer_plan.cpp"

namespace attent {
namespace scorer {

template <typename T, Sums SUMS>
void portable_block(ScorerArgs args) {
    portable_scorer<T, SUMS>(args, dynamic_shared());
}

template <typename T, Sums SUMS>
void hopper_block(ScorerArgs args, hopper::TensorMap hidden, hopper::TensorMap weight) {
    hopper_scorer<T, SUMS>(args, hidden, weight, dynamic_shared());
}

template <typename T, Sums SUMS>
void run(ScorerKernel kernel, const ScorerArgs& args, int processors) {
    const ScorerPlan plan = plan_scorer(kernel, args, processors);
    const dim3 grid(static_cast<unsigned>(plan.grid)), block(static_cast<unsigned>(plan.threads));
    const auto bytes = static_cast<size_t>(plan.shared_bytes);
    if (kernel == ScorerKernel::portable) {
        emulate::launch(portable_block<T, SUMS>, grid, block, bytes, args);
    } else {
        const hopper::TensorMap hidden{args.hidden, args.width, args.tokens, hidden_row_stride(args), Hopper::BM};
        const hopper::TensorMap weight{args.weight, args.width, args.classes, args.weight_row, Hopper::BN};
        emulate::launch(hopper_block<T, SUMS>, grid, block, bytes, args, hidden, weight);
    }
}

template <typename T>
void run(ScorerKernel kernel, const ScorerArgs& args, int processors) {
    switch (sums_of(args)) {
        case Sums::plain:
            return run<T, Sums::plain>(kernel, args, processors);
        case Sums::capped:
            return run<T, Sums::capped>(kernel, args, processors);
        case Sums::spread:
            return run<T, Sums::spread>(kernel, args, processors);
    }
}

}  // namespace scorer

gpu::Status launch_scorer(ScorerKernel kernel, const ScorerArgs& args, int processors, cudaStream_t) {
    if (kernel == ScorerKernel::hopper) {
        if (const char* reason = hopper_scorer_refuses(args)) return gpu::say(gpu::Status::refused, "%s", reason);
    }
    if (args.number == Number::bfloat16) {
        scorer::run<BFloat16>(kernel, args, processors);
    } else {
        scorer::run<Float16>(kernel, args, processors);
    }
    return {};
}

}  // namespace attent

PYBIND11_MODULE(emulated_scorer, module) {
    attent::bind_scorer_plan(module);
    attent::bind_scorer(module);
    module.def("set_seed", [](uint64_t seed) { attent::emulate::schedule().seed = seed; },
               "Of the order in which threads and blocks of threads run.");
}
