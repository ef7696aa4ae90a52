// The two loops over the vocabulary of one row, once per instruction set. The maths is in row_kernels_body.h, which
// each row_kernels_<instruction set>.cpp compiles for its own set; row_statistics.cpp picks one at run time.
#pragma once

#include <cstdint>

namespace attent {

// Sums over v != target against the maximum over v != target: sum = sum exp(z~ - maximum), squares = sum d^2 exp(2 (z~
// - maximum)). Without any such v (or with -inf everywhere) maximum is the lowest finite number and the sums are 0.
struct SplitSums {
    double maximum;
    double sum;
    double squares;
};

template <typename T>
struct RowKernels {
    // logits [vocabulary]; 0 <= target < vocabulary; softcap 0: none.
    SplitSums (*split_sums)(const T* logits, int64_t vocabulary, int64_t target, T softcap);

    // logits [vocabulary] <- factor d exp(z~ - logsumexp), for the target as for every other. The logsumexp is high +
    // low: in one T a large one would lose digits that z~ - logsumexp needs.
    void (*scaled_probabilities)(T* logits, int64_t vocabulary, T high, T low, T factor, T softcap);
};

struct InstructionSet {
    const char* name;
    RowKernels<float> float32;
    RowKernels<double> float64;
};

#if defined(__x86_64__)
extern const InstructionSet avx512_kernels;  // 64-byte vectors; needs avx512f
extern const InstructionSet avx2_kernels;    // 32-byte vectors; needs avx2 and fma
#endif
extern const InstructionSet portable_kernels;  // 16-byte vectors: SSE2, NEON, or what the compiler makes of them

}  // namespace attent
