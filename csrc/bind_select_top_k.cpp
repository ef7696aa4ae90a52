// select_top_k in the module: its plan, its launchers and, for tests, the same code on the host.

#include <vector>

#include "binds.h"
#include "cuda/select_top_k.h"
#include "cuda/select_write.cuh"

namespace py = pybind11;

namespace attent {

namespace {

// Small enough that pools of a few hundred have all the seams of thousands: parts of the sort, rounds of the compaction,
// spans of several blocks.
constexpr int kTestKeys = 64, kTestThreads = 16;
constexpr int64_t kTestBlocks = 3;

gpu::SelectTopKPlan plan(int64_t n, int64_t k, int64_t k_floor, float temperature, int dtype) {
    return gpu::plan_select_top_k(n, k, k_floor, temperature, static_cast<gpu::Dtype>(dtype));
}

// As the passes run in tests, for any n.
gpu::SelectTopKPlan plan_of_test(int64_t n, int64_t k, int64_t k_floor, float temperature, int dtype) {
    return gpu::plan_select_top_k(n, k, k_floor, temperature, static_cast<gpu::Dtype>(dtype), 0, kTestBlocks,
                                  kTestThreads, kTestKeys);
}

gpu::SelectTopKArgs arguments(uintptr_t score, int dtype, uintptr_t valid, int64_t n, int64_t k, int64_t k_floor,
                              float temperature, uintptr_t seed, bool sorted, uintptr_t index, uintptr_t chosen_score,
                              uintptr_t inclusion, uintptr_t scratch, uintptr_t tickets, uintptr_t chosen,
                              uintptr_t code, uintptr_t kind, bool delayed) {
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
            pointer<int64_t>(scratch),
            pointer<int32_t>(tickets),
            pointer<int64_t>(chosen),
            pointer<int32_t>(code),
            pointer<int8_t>(kind),
            delayed};
}

gpu::Status not_launched(const gpu::SelectTopKArgs& args, cudaStream_t) {
    return gpu::check_select_top_k(args);
}

// call(Score{}) with the type of the dtype.
template <typename Call>
auto with_score(gpu::Dtype dtype, Call call) {
    switch (dtype) {
        case gpu::Dtype::float16:
            return call(gpu::Half{});
        case gpu::Dtype::bfloat16:
            return call(gpu::BFloat16{});
        default:
            return call(float{});
    }
}

template <int KEYS>
void in_block(const gpu::SelectTopKArgs& args, const gpu::Block& block) {
    std::vector<gpu::SelectShared<KEYS>> shared(1);
    with_score(args.dtype,
               [&](auto score) { gpu::select_in_block(block, gpu::in_block<decltype(score)>(args), shared[0]); });
}

// The passes, block after block.
struct OnHost {
    gpu::Dtype dtype;
    int blocks;
    gpu::Block block;

    template <typename Pass>
    gpu::Status each_block(Pass pass) const {
        std::vector<gpu::PassShared<gpu::kFinishedInPass>> shared(1);
        for (int i = 0; i < blocks; ++i) {
            const int program = block.backwards ? blocks - 1 - i : i;
            with_score(dtype, [&](auto score) { pass(program, score, shared[0]); });
        }
        return gpu::Status{};
    }
    gpu::Status count(gpu::Source source, const gpu::PassArgs& args) const {
        return each_block([&](int program, auto score, auto& shared) {
            using Score = decltype(score);
            switch (source) {
                case gpu::Source::scores:
                    return gpu::count_digit<gpu::Source::scores, Score>(block, args, program, blocks, shared);
                case gpu::Source::with_noise:
                    return gpu::count_digit<gpu::Source::with_noise, Score>(block, args, program, blocks, shared);
                case gpu::Source::codes:
                    return gpu::count_digit<gpu::Source::codes, Score>(block, args, program, blocks, shared);
                case gpu::Source::floor:
                    return gpu::count_digit<gpu::Source::floor, Score>(block, args, program, blocks, shared);
            }
        });
    }
    gpu::Status floor(gpu::Source source, const gpu::PassArgs& args) const {
        return each_block([&](int program, auto score, auto& shared) {
            using Score = decltype(score);
            if (source == gpu::Source::codes) {
                gpu::count_floor<gpu::Source::codes, Score>(block, args, program, blocks, shared);
            } else {
                gpu::count_floor<gpu::Source::scores, Score>(block, args, program, blocks, shared);
            }
        });
    }
    gpu::Status write(gpu::Source source, const gpu::PassArgs& args) const {
        return each_block([&](int program, auto score, auto& shared) {
            using Score = decltype(score);
            if (source == gpu::Source::codes) {
                gpu::write_all<gpu::Source::codes, Score>(block, args, program, blocks, shared);
            } else if (source == gpu::Source::floor) {
                gpu::write_all<gpu::Source::floor, Score>(block, args, program, blocks, shared);
            } else {
                gpu::write_all<gpu::Source::scores, Score>(block, args, program, blocks, shared);
            }
        });
    }
};

// how: "block" and "small block": select_in_block with a kernel's sizes and with small ones; "passes": small ones.
void on_host(const gpu::SelectTopKArgs& args, const std::string& how, bool backwards) {
    raise_unless_ok(gpu::check_select_top_k(args));
    if (args.k == 0) return;
    if (how == "block") return in_block<gpu::kSelectKeys>(args, {gpu::kSelectThreads, backwards});
    const gpu::Block block{kTestThreads, backwards};
    if (how == "small block") return in_block<kTestKeys>(args, block);
    const auto plan = plan_of_test(args.n, args.k, args.k_floor, args.temperature, static_cast<int>(args.dtype));
    raise_unless_ok(gpu::run_passes(args, plan, OnHost{args.dtype, plan.blocks, block}));
}

void outputs_on_host(const gpu::SelectTopKArgs& args) {
    const auto plan = plan_of_test(args.n, args.k, args.k_floor, args.temperature, static_cast<int>(args.dtype));
    const gpu::PassArgs pass = gpu::in_passes(args, plan);
    with_score(args.dtype, [&](auto score) {
        for (int program = 0; program < gpu::ceil_div(args.k, kTestThreads); ++program) {
            gpu::write_outputs<decltype(score)>(gpu::Block{kTestThreads}, pass, program);
        }
    });
}

}  // namespace

void bind_select_top_k(py::module_& module, py::module_& testing) {
    py::class_<gpu::SelectTopKPlan>(module, "SelectTopKPlan", py::module_local())
        .def_readonly("blocks", &gpu::SelectTopKPlan::blocks)
        .def_readonly("threads", &gpu::SelectTopKPlan::threads)
        .def_readonly("span", &gpu::SelectTopKPlan::span)
        .def_readonly("scratch_length", &gpu::SelectTopKPlan::scratch_length)
        .def_readonly("ticket_count", &gpu::SelectTopKPlan::ticket_count)
        .def_readonly("chosen_length", &gpu::SelectTopKPlan::chosen_length)
        .def_readonly("code_length", &gpu::SelectTopKPlan::code_length)
        .def_readonly("kind_length", &gpu::SelectTopKPlan::kind_length)
        .def_readonly("launches", &gpu::SelectTopKPlan::launches)
        .def_readonly("finished", &gpu::SelectTopKPlan::finished);
    py::class_<gpu::SelectTopKArgs>(module, "SelectTopKArgs", py::module_local())
        .def(py::init(&arguments), "attent::gpu::SelectTopKArgs of csrc/cuda/select_top_k.h, in its order.");
    module.def("plan_select_top_k", &plan, py::arg("n"), py::arg("k"), py::arg("k_floor"), py::arg("temperature"),
               py::arg("dtype"), "attent::gpu::plan_select_top_k of csrc/cuda/select_top_k.h.");
    testing.def("plan_select_top_k", &plan_of_test, "The plan of the passes with small blocks, for any n.");
    testing.def("select_top_k", &on_host, py::arg("args"), py::arg("how"), py::arg("backwards"),
                "What the kernels do, one thread of one block after another.");
    testing.def("select_outputs", &outputs_on_host, "What follows the sort, where the plan is not finished.");
    testing.def("not_select_top_k", launching(&not_launched, &arguments), "As select_top_k, up to the launch.");
#if defined(ATTENT_CUDA)
    module.def("select_top_k", launching(&gpu::launch_select_top_k, &arguments),
               "attent::gpu::launch_select_top_k of csrc/cuda/select_top_k.h: SelectTopKArgs, then the stream.");
    module.def("select_outputs", launching(&gpu::launch_select_outputs, &arguments),
               "attent::gpu::launch_select_outputs of csrc/cuda/select_top_k.h.");
#endif
}

}  // namespace attent
