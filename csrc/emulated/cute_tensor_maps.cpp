// The tensor maps that our launchers ask the driver for (cuda/tensor_map.h) beside those that CuTe asks for, of the same
// tensors and the same tiles in shared memory (cute_layouts.cpp says where those tiles have what). Host code: the driver's
// one function stands below, and writes down what it was asked.
//
// Prints a line for each comparison: how many things were compared, how many differ, and its name.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <vector>

// ------------------------------------------------------------------------------------------------------- the driver

namespace {

struct Request {
    int64_t dtype, rank, interleave, swizzle, fill;
    const void* data;
    std::array<uint64_t, 5> sizes, strides;  // the second in bytes, of all dimensions but the first
    std::array<uint32_t, 5> box, every;
} request;

CUresult encode(CUtensorMap*, CUtensorMapDataType dtype, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* every,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
    request = {dtype, rank, interleave, swizzle, fill, data, {}, {}, {}, {}};
    std::copy_n(sizes, rank, request.sizes.begin());
    std::copy_n(strides, rank - 1, request.strides.begin());
    std::copy_n(box, rank, request.box.begin());
    std::copy_n(every, rank, request.every.begin());
    return CUDA_SUCCESS;
}

}  // namespace

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType dtype, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* every, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    return encode(map, dtype, rank, data, sizes, strides, box, every, interleave, swizzle, promotion, fill);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult*) {
    *found = reinterpret_cast<void*>(&encode);
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) {
    return "";
}
const char* cudaGetErrorName(cudaError_t) {
    return "";
}
cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline size_t __cvta_generic_to_shared(const void*) {
    return 0;
}

// CuTe looks at the version of nvcc's compiler, which this is not.
#define CUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL
#define __CUDACC_VER_MAJOR__ 12
#define __CUDACC_VER_MINOR__ 0
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>

#include "cuda/tensor_map.h"

namespace {

using namespace cute;
namespace hopper = attent::gpu::hopper;

void report(const char* name, const Request& ours, const Request& cutes) {
    const auto as_numbers = [](const Request& r) {
        std::vector<uint64_t> all{static_cast<uint64_t>(r.dtype),      static_cast<uint64_t>(r.rank),
                                  static_cast<uint64_t>(r.interleave), static_cast<uint64_t>(r.swizzle),
                                  static_cast<uint64_t>(r.fill),       reinterpret_cast<uint64_t>(r.data)};
        all.insert(all.end(), r.sizes.begin(), r.sizes.end());
        all.insert(all.end(), r.strides.begin(), r.strides.end());
        all.insert(all.end(), r.box.begin(), r.box.end());
        all.insert(all.end(), r.every.begin(), r.every.end());
        return all;
    };
    const auto a = as_numbers(ours), b = as_numbers(cutes);
    int differ = 0;
    for (size_t i = 0; i < a.size(); ++i) {
        if (a[i] == b[i]) continue;
        ++differ;
        std::fprintf(stderr, "%s: number %zu: ours %llu, CuTe's %llu\n", name, i, static_cast<unsigned long long>(a[i]),
                     static_cast<unsigned long long>(b[i]));
    }
    std::printf("%zu %d %s\n", a.size(), differ, name);
}

template <class T>
const T* data() {
    return reinterpret_cast<const T*>(uintptr_t{1} << 20);
}

// A tensor [examples, heads, rows, width], for a product that takes rows of it; or, by columns, for one whose k are its
// rows: CuTe has a tile of [width, rows] for that.
template <class T, bool BY_COLUMNS>
void compare_heads(const char* name, int rows, int heads, int examples, int width, int64_t row, int64_t head,
                   int64_t example) {
    constexpr int BOX = 128;
    hopper::TensorMap map;
    request = {};
    hopper::make_map(&map, data<T>(), is_same_v<T, bfloat16_t>, width,
                     {{rows, row}, {heads, head}, {examples, example}}, BOX);
    const Request ours = request;
    request = {};
    if constexpr (BY_COLUMNS) {
        const auto tensor = make_tensor(make_gmem_ptr(data<T>()), make_layout(make_shape(width, rows, heads, examples),
                                                                              make_stride(_1{}, row, head, example)));
        const auto tile = tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<T>{}, Shape<_64, Int<BOX>>{}, Step<_2, _1>{});
        make_tma_copy(SM90_TMA_LOAD{}, tensor, tile, Shape<_64, Int<BOX>>{}, _1{});
    } else {
        const auto tensor = make_tensor(make_gmem_ptr(data<T>()), make_layout(make_shape(rows, width, heads, examples),
                                                                              make_stride(row, _1{}, head, example)));
        const auto tile = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<BOX>, _64>{});
        make_tma_copy(SM90_TMA_LOAD{}, tensor, tile, Shape<Int<BOX>, _64>{}, _1{});
    }
    report(name, ours, request);
}

// A matrix [rows, width].
template <class T, int BOX>
void compare_matrix(const char* name, int rows, int width, int64_t row) {
    hopper::TensorMap map;
    request = {};
    hopper::make_map(&map, data<T>(), is_same_v<T, bfloat16_t>, rows, width, row, BOX);
    const Request ours = request;
    request = {};
    const auto tensor =
        make_tensor(make_gmem_ptr(data<T>()), make_layout(make_shape(rows, width), make_stride(row, _1{})));
    const auto tile = tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<BOX>, _64>{});
    make_tma_copy(SM90_TMA_LOAD{}, tensor, tile, Shape<Int<BOX>, _64>{}, _1{});
    report(name, ours, request);
}

}  // namespace

int main() {
    compare_matrix<bfloat16_t, 128>("hidden", 1000, 520, 520);
    compare_matrix<bfloat16_t, 256>("weight", 32001, 520, 528);
    compare_matrix<half_t, 256>("weight in float16", 32001, 520, 528);
    // [examples, heads, rows, width] as it lies, and rows of all heads side by side.
    compare_heads<bfloat16_t, false>("queries", 1000, 12, 3, 104, 104, 104000, 1248000);
    compare_heads<half_t, false>("keys, heads side by side", 1000, 12, 3, 64, 768, 64, 768000);
    compare_heads<bfloat16_t, true>("values", 1000, 12, 3, 104, 104, 104000, 1248000);
    compare_heads<half_t, true>("values, heads side by side", 1000, 12, 3, 64, 768, 64, 768000);
}
