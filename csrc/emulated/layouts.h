// What the emulator takes Hopper's instructions to do, one instruction at a time, on numbers of bfloat16: for a comparison
// with CuTe, which knows them from elsewhere (cute_layouts.cpp). Shared memory is given whole, from address 0 on.
#pragma once

#include <cstdint>
#include <vector>

namespace attent::emulated {

using Numbers = std::vector<uint16_t>;

// As kernels make them (hopper.cuh, hopper_products.cuh).
uint64_t operand(uint32_t tile, int row, int step);
uint64_t columns_operand(uint32_t tile, int row, int leading);

// Shared memory behind a copy of boxes [box_rows, 64], side by side and `apart` bytes apart, from `row` of a matrix
// [rows, width] on.
Numbers load_boxes(const Numbers& matrix, int rows, int width, int row, int box_rows, int boxes, int apart);

// d [64, columns] of operands by descriptor: the accumulators [128][columns / 2] of all threads. columns: 128 or 256.
std::vector<float> product(const Numbers& shared, uint64_t a, uint64_t b, int columns);
// The same with a in registers, [128][4]. columns: 64 or 128.
std::vector<float> row_product(const Numbers& shared, const std::vector<uint32_t>& a, uint64_t b, int columns);

// A warp's: of registers a [32][4] and b [32][2] the accumulators [32][4].
std::vector<float> mma(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b);
// A warp's registers [32][4] from four 8 x 8 matrices, whose rows each lane gives one of, as an address.
std::vector<uint32_t> ldmatrix(const Numbers& shared, const std::vector<uint32_t>& rows, bool transposed);

}  // namespace attent::emulated
