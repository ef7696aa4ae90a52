// What the files that define parts of the module attent_kernels._native share. One function for each part; a kernel's
// part is bind_<kernel>.cpp. Its plans and host versions are always there; its launcher only in a build with CUDA
// (ATTENT_CUDA), whose .cu files nvcc compiles.
//
// Keeping alive, on a GPU: an address is only a number, and a launcher returns before the kernel runs. The caller holds
// the tensors until the call returns; after that PyTorch's allocator gives their memory to nobody but later work on the
// stream they were allocated on. So outputs and scratch memory are allocated on the stream that is launched on, and a
// tensor of another stream is the caller's to synchronise and to record (Tensor.record_stream), as for any PyTorch op.
//
// Device and stream: Python makes the tensors' device current around the call and passes its current stream's handle.
// The GIL stays held: launching takes microseconds.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cuda/status.h"

namespace attent {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

inline cudaStream_t stream_of(uintptr_t handle) {
    return reinterpret_cast<cudaStream_t>(handle);
}

// A wrong argument becomes ValueError; a CUDA call that failed RuntimeError, with the launch configuration.
inline void raise_unless_ok(const gpu::Status& status) {
    if (status.kind == gpu::Status::refused) throw pybind11::value_error(status.message);
    if (status.kind == gpu::Status::failed) throw std::runtime_error(status.message);
}

// A function of the module: what `launch` does with the arguments that `pack` makes of numbers, on a stream. One flat list
// of numbers is what Python hands over fastest: 25 ns each.
template <typename Arguments, typename... Numbers>
auto launching(gpu::Status (*launch)(const Arguments&, cudaStream_t), Arguments (*pack)(Numbers...)) {
    return [=](Numbers... numbers, uintptr_t stream) { raise_unless_ok(launch(pack(numbers...), stream_of(stream))); };
}

// What this build's CUDA part is and what the machine's driver can do.
void bind_cuda_build(pybind11::module_& module);

// `testing` is the submodule of host versions: what a kernel's code does, run by the host's compiler.
void bind_select_top_k(pybind11::module_& module, pybind11::module_& testing);
void bind_scored_attention(pybind11::module_& module);
void bind_scorer(pybind11::module_& module);

}  // namespace attent
