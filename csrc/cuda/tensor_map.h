// Tensor maps: how TMA finds boxes of a matrix. Made on the host for each launch, a microsecond each, and passed to the
// kernel by value. The one function of the driver that this takes is asked for at run time, so nothing links libcuda.
#pragma once

#include "hopper.cuh"
#include "status.h"

#ifndef ATTENT_EMULATE
#include "check.h"
#endif

namespace attent::gpu::hopper {

#ifdef ATTENT_EMULATE

inline Status make_map(TensorMap* map, const void* data, bool, int64_t rows, int64_t width, int64_t row_stride,
                       int box_rows) {
    *map = {data, width, rows, row_stride, box_rows};
    return Status{};
}

#else

// Of a matrix [rows, width] of float16 or bfloat16: `data` at a multiple of 16 bytes, columns adjacent, rows `row_stride`
// numbers apart, a multiple of 8. Loaded by boxes of [box_rows, 64], box_rows at most 256, 0 outside of the matrix.
inline Status make_map(TensorMap* map, const void* data, bool is_bfloat16, int64_t rows, int64_t width,
                       int64_t row_stride, int box_rows) {
    using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode encode = nullptr;
    if (encode == nullptr) {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        ATTENT_CHECK_CALL(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
        if (found == nullptr) return say(Status::failed, "cuTensorMapEncodeTiled: the driver does not have it");
        encode = reinterpret_cast<Encode>(found);
    }
    const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[1] = {static_cast<cuuint64_t>(row_stride) * 2};  // bytes
    const cuuint32_t box[2] = {ROW_BYTES / 2, static_cast<cuuint32_t>(box_rows)}, every[2] = {1, 1};
    const CUresult result =
        encode(map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
               const_cast<void*>(data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return Status{};
    return say(Status::failed, "cuTensorMapEncodeTiled: error %d for [%lld, %lld] with rows %lld apart at %p",
               static_cast<int>(result), static_cast<long long>(rows), static_cast<long long>(width),
               static_cast<long long>(row_stride), data);
}

#endif

}  // namespace attent::gpu::hopper
