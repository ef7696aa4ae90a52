// The row kernels for any processor: 16-byte vectors, which are NEON on arm64 and SSE2 on x86-64.
#include "row_kernels.h"

#define VECTOR_BYTES 16
#include "row_kernels_body.h"

namespace attent {
const InstructionSet portable_kernels = {"portable", row_kernels<float>, row_kernels<double>};
}
