// Tensor maps: how TMA finds boxes of a matrix. Made on the host for each launch, a microsecond each, and passed to the
// kernel by value. The one function of the driver that this takes is asked for at run time, so nothing links libcuda.
#pragma once

#include "hopper.cuh"
#include "status.h"

#ifndef ATTENT_EMULATE
#include "check.h"
#endif

namespace attent::gpu::hopper {

// A dimension of a matrix but its last: how many, and how many numbers apart.
struct Dimension {
    int64_t size, stride;
};

#ifdef ATTENT_EMULATE

// Refuses what the driver refuses (CUDA Driver API, cuTensorMapEncodeTiled).
template <int N>
Status make_map(TensorMap* map, const void* data, bool, int64_t width, const Dimension (&outer)[N], int box_rows) {
    const auto is_size = [](int64_t size) { return size >= 1 && size <= int64_t{1} << 32; };
    bool is_right = reinterpret_cast<uintptr_t>(data) % 16 == 0 && is_size(width) && box_rows >= 1 && box_rows <= 256;
    for (const Dimension& one : outer) {
        is_right =
            is_right && is_size(one.size) && one.stride % 8 == 0 && one.stride >= 0 && one.stride < int64_t{1} << 39;
    }
    if (!is_right) return say(Status::failed, "cuTensorMapEncodeTiled would refuse this tensor map");
    *map = {data, width, {1, 1, 1}, {0, 0, 0}, box_rows};
    for (int i = 0; i < N; ++i) map->sizes[i] = outer[i].size, map->strides[i] = outer[i].stride;
    return Status{};
}

#else

// Of a matrix [outer reversed, width] of float16 or bfloat16, such as [examples, heads, rows, width] of outer = {rows,
// heads, examples}: `data` at a multiple of 16 bytes, columns adjacent, strides multiples of 8 and `width` at least.
// Loaded by boxes of [box_rows, 64] of the inner two dimensions, box_rows at most 256, 0 outside of the matrix.
template <int N>
Status make_map(TensorMap* map, const void* data, bool is_bfloat16, int64_t width, const Dimension (&outer)[N],
                int box_rows) {
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
    cuuint64_t sizes[N + 1] = {static_cast<cuuint64_t>(width)}, strides[N];  // strides in bytes
    cuuint32_t box[N + 1] = {ROW_BYTES / 2, static_cast<cuuint32_t>(box_rows)}, every[N + 1] = {1, 1};
    for (int i = 0; i < N; ++i) {
        sizes[i + 1] = static_cast<cuuint64_t>(outer[i].size);
        strides[i] = static_cast<cuuint64_t>(outer[i].stride) * 2;
        if (i > 0) box[i + 1] = every[i + 1] = 1;
    }
    const CUresult result =
        encode(map, is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, N + 1,
               const_cast<void*>(data), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result == CUDA_SUCCESS) return Status{};
    return say(Status::failed,
               "cuTensorMapEncodeTiled: error %d for %d dimensions, [%lld, %lld] with rows %lld apart at %p",
               static_cast<int>(result), N + 1, static_cast<long long>(outer[0].size), static_cast<long long>(width),
               static_cast<long long>(outer[0].stride), data);
}

#endif

// Of a matrix [rows, width].
inline Status make_map(TensorMap* map, const void* data, bool is_bfloat16, int64_t rows, int64_t width,
                       int64_t row_stride, int box_rows) {
    return make_map(map, data, is_bfloat16, width, {Dimension{rows, row_stride}}, box_rows);
}

}  // namespace attent::gpu::hopper
