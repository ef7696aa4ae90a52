// select_top_k in the module: its plan, its launcher and, for tests, the same code on the host.

#include <vector>

#include "binds.h"
#include "cuda/select_top_k.h"

namespace py = pybind11;

namespace attent {

namespace {

gpu::SelectTopKArgs arguments(uintptr_t score, int dtype, uintptr_t valid, int64_t n, int64_t k, int64_t k_floor,
                              float temperature, uintptr_t seed, bool sorted, uintptr_t index, uintptr_t chosen_score,
                              uintptr_t inclusion, uintptr_t scratch) {
    return {pointer<const void>(score),
            static_cast<gpu::Dtype>(dtype),
            pointer<const int8_t>(valid),
            n,
            k,
            k_floor,
            temperature,
            pointer<const int64_t>(seed),
            sorted,
            pointer<int64_t>(index),
            pointer<void>(chosen_score),
            pointer<float>(inclusion),
            pointer<int64_t>(scratch)};
}

// Small enough that pools of a few hundred have all the seams of thousands: parts of the sort, rounds of the compaction.
constexpr int kTestKeys = 64, kTestThreads = 16;

template <typename Score, int KEYS>
void on_host(const gpu::SelectTopKArgs& args, const gpu::Block& block) {
    std::vector<gpu::SelectShared<KEYS>> shared(1);
    gpu::select_in_block(block, gpu::in_block<Score>(args), shared[0]);
}

template <typename Score>
void on_host(const gpu::SelectTopKArgs& args, bool small, bool backwards) {
    if (small) {
        on_host<Score, kTestKeys>(args, {kTestThreads, backwards});
    } else {
        on_host<Score, gpu::kSelectKeys>(args, {gpu::kSelectThreads, backwards});
    }
}

void select_in_block_on_host(uintptr_t score, int dtype, uintptr_t valid, int64_t n, int64_t k, int64_t k_floor,
                             float temperature, uintptr_t seed, bool sorted, uintptr_t index, uintptr_t chosen_score,
                             uintptr_t inclusion, uintptr_t scratch, bool small, bool backwards) {
    const auto args = arguments(score, dtype, valid, n, k, k_floor, temperature, seed, sorted, index, chosen_score,
                                inclusion, scratch);
    raise_unless_ok(gpu::check_select_top_k(args));
    switch (args.dtype) {
        case gpu::Dtype::float32:
            return on_host<float>(args, small, backwards);
        case gpu::Dtype::float16:
            return on_host<gpu::Half>(args, small, backwards);
        case gpu::Dtype::bfloat16:
            return on_host<gpu::BFloat16>(args, small, backwards);
    }
}

#if defined(ATTENT_CUDA)
void select_top_k(uintptr_t score, int dtype, uintptr_t valid, int64_t n, int64_t k, int64_t k_floor, float temperature,
                  uintptr_t seed, bool sorted, uintptr_t index, uintptr_t chosen_score, uintptr_t inclusion,
                  uintptr_t scratch, uintptr_t stream) {
    raise_unless_ok(gpu::launch_select_top_k(arguments(score, dtype, valid, n, k, k_floor, temperature, seed, sorted,
                                                       index, chosen_score, inclusion, scratch),
                                             stream_of(stream)));
}
#endif

}  // namespace

void bind_select_top_k(py::module_& module, py::module_& testing) {
    py::class_<gpu::SelectTopKPlan>(module, "SelectTopKPlan", py::module_local())
        .def_readonly("blocks", &gpu::SelectTopKPlan::blocks)
        .def_readonly("threads", &gpu::SelectTopKPlan::threads)
        .def_readonly("scratch_length", &gpu::SelectTopKPlan::scratch_length);
    module.def("plan_select_top_k", &gpu::plan_select_top_k, py::arg("n"),
               "attent::gpu::plan_select_top_k of csrc/cuda/select_top_k.h.");
    testing.def("select_in_block", &select_in_block_on_host,
                "attent::gpu::select_in_block of csrc/cuda/select.cuh, one thread of the block after another.");
#if defined(ATTENT_CUDA)
    module.def("select_top_k", &select_top_k, "attent::gpu::launch_select_top_k of csrc/cuda/select_top_k.h.");
#endif
}

}  // namespace attent
