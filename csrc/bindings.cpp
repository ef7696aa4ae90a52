// The Python module attent_kernels._native: functions on raw addresses. It knows no torch, so one build serves every
// release of it; the launchers in attent_kernels take tensors, check them and call this. Here: the CPU's row statistics.
// The GPU's kernels: one bind_<kernel>.cpp each (binds.h).
//
// Keeping alive: an address is only a number. The caller holds the tensors it came from until the call returns (holding
// them in local variables does), and does not write to them from another thread meanwhile: the GIL is released during
// the work. Nothing is kept after the call. Errors come back as ValueError, before anything has been written.

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "binds.h"
#include "row_statistics.h"

namespace py = pybind11;

namespace {

using attent::pointer;

void raise_unless_ok(attent::Status status, const char* function) {
    if (status != attent::Status::ok) throw py::value_error(std::string(function) + ": " + attent::describe(status));
}

template <typename T>
void row_statistics(uintptr_t logits, int64_t rows, int64_t vocabulary, int64_t row_stride, uintptr_t target,
                    double softcap, uintptr_t loss, uintptr_t logsumexp, uintptr_t squared_norm, int threads,
                    const char* instruction_set) {
    attent::Status status;
    {
        py::gil_scoped_release without_gil;
        status = attent::row_statistics<T>(pointer<const T>(logits), rows, vocabulary, row_stride,
                                           pointer<const int64_t>(target), softcap, pointer<T>(loss),
                                           pointer<T>(logsumexp), pointer<T>(squared_norm), threads, instruction_set);
    }
    raise_unless_ok(status, "row_statistics");
}

template <typename T>
void logits_gradient(uintptr_t logits, int64_t rows, int64_t vocabulary, int64_t row_stride, uintptr_t target,
                     uintptr_t loss, uintptr_t logsumexp, uintptr_t factor, double softcap, int threads,
                     const char* instruction_set) {
    attent::Status status;
    {
        py::gil_scoped_release without_gil;
        status = attent::logits_gradient<T>(
            pointer<T>(logits), rows, vocabulary, row_stride, pointer<const int64_t>(target), pointer<const T>(loss),
            pointer<const T>(logsumexp), pointer<const T>(factor), softcap, threads, instruction_set);
    }
    raise_unless_ok(status, "logits_gradient");
}

template <typename T>
void define_row_functions(py::module_& module, const std::string& dtype) {
    module.def(("row_statistics_" + dtype).c_str(), &row_statistics<T>, py::arg("logits"), py::arg("rows"),
               py::arg("vocabulary"), py::arg("row_stride"), py::arg("target"), py::arg("softcap"), py::arg("loss"),
               py::arg("logsumexp"), py::arg("squared_norm"), py::arg("threads"),
               py::arg("instruction_set") = py::none(), "attent::row_statistics of csrc/row_statistics.h.");
    module.def(("logits_gradient_" + dtype).c_str(), &logits_gradient<T>, py::arg("logits"), py::arg("rows"),
               py::arg("vocabulary"), py::arg("row_stride"), py::arg("target"), py::arg("loss"), py::arg("logsumexp"),
               py::arg("factor"), py::arg("softcap"), py::arg("threads"), py::arg("instruction_set") = py::none(),
               "attent::logits_gradient of csrc/row_statistics.h.");
}

py::list instruction_sets() {
    py::list names;
    for (const char* const* name = attent::instruction_sets(); *name != nullptr; ++name) names.append(*name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "attent's native kernels on raw addresses; called through the launchers in attent_kernels.";
    define_row_functions<float>(module, "float32");
    define_row_functions<double>(module, "float64");
    module.def("instruction_sets", &instruction_sets,
               "The instruction sets the row kernels can use on this processor, best first.");
#if defined(_OPENMP)
    module.attr("openmp") = true;
#else
    module.attr("openmp") = false;  // built without OpenMP: `threads` is taken and one is used
#endif
    py::module_ testing = module.def_submodule("testing", "Host versions of what GPU kernels do, for tests.");
    attent::bind_cuda_build(module);
    attent::bind_select_top_k(module, testing);
    attent::bind_scored_attention(module);
    attent::bind_scorer(module);
}
