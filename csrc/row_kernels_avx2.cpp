// The row kernels for x86-64 processors with AVX2 and FMA: 32-byte vectors.
#include "row_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define VECTOR_BYTES 32
#include "row_kernels_body.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace attent {
const InstructionSet avx2_kernels = {"avx2", row_kernels<float>, row_kernels<double>};
}

#endif
