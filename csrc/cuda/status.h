// How the host functions of the CUDA kernels say what happened, without exceptions: nvcc and the C++ compiler share it.
#pragma once

#include <cstdarg>
#include <cstdio>

// As <cuda_runtime.h> declares it, so that argument structs and launchers can be declared without that header.
struct CUstream_st;
typedef struct CUstream_st* cudaStream_t;

namespace attent::gpu {

struct Status {
    enum Kind {
        ok_kind = 0,
        refused,  // an argument is wrong: nothing was launched. ValueError in Python
        failed,   // a CUDA call failed. RuntimeError in Python
    };
    Kind kind = ok_kind;
    char message[384] = "";

    bool ok() const { return kind == ok_kind; }
};

// printf's format: "k: got 7; takes 0 <= k <= n = 5".
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
inline Status say(Status::Kind kind, const char* format, ...) {
    Status status;
    status.kind = kind;
    va_list values;
    va_start(values, format);
    std::vsnprintf(status.message, sizeof status.message, format, values);
    va_end(values);
    return status;
}

#define ATTENT_RETURN_UNLESS_OK(call)                       \
    do {                                                    \
        const ::attent::gpu::Status attent_status = (call); \
        if (!attent_status.ok()) return attent_status;      \
    } while (false)

}  // namespace attent::gpu
