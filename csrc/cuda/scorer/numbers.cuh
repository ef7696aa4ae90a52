// Numbers as tensors hold them, read as float32 or int64.
#pragma once

#include "../half.cuh"
#include "../scorer.h"

namespace attent::gpu::scorer {

__device__ __forceinline__ float load_float(const void* data, Number number, int64_t at) {
    switch (number) {
        case Number::bfloat16:
            return to_float32(static_cast<const BFloat16*>(data)[at]);
        case Number::float16:
            return to_float32(static_cast<const Half*>(data)[at]);
        case Number::float64:
            return static_cast<float>(static_cast<const double*>(data)[at]);
        default:
            return static_cast<const float*>(data)[at];
    }
}

__device__ __forceinline__ int64_t load_integer(const void* data, Number number, int64_t at) {
    return number == Number::int32 ? static_cast<const int32_t*>(data)[at] : static_cast<const int64_t*>(data)[at];
}

}  // namespace attent::gpu::scorer
