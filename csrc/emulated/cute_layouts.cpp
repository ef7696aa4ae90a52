// CuTe (NVIDIA's CUTLASS, package nvidia-cutlass) beside the emulator: both say what a Hopper instruction reads and writes.
//
// The emulator (cuda/emulate_hopper.h) and the kernels are ours: what both believe wrongly, no test of one against the
// other shows. CuTe's layouts describe the same instructions, and kernels made with them run. So here operands are laid
// out, descriptors made and accumulators found by CuTe's code alone, and each is compared with ours. Host code: no GPU.
//
// Prints a line for each comparison: how many things were compared, how many differ, and its name. Arguments: the names of
// those that are wanted; all, if there are none.
#include <cstdint>

// A shared memory address on the host: the place in `memory`, which begins at a multiple of what a descriptor tells apart.
alignas(1 << 18) static uint16_t memory[1 << 17];

#define cast_smem_ptr_to_uint asks_the_gpu
#include <cute/arch/util.hpp>
#undef cast_smem_ptr_to_uint
namespace cute {
inline uint32_t cast_smem_ptr_to_uint(const void* pointer) {
    return static_cast<uint32_t>(static_cast<const char*>(pointer) - reinterpret_cast<const char*>(memory));
}
}  // namespace cute

#include <algorithm>
#include <cstdio>
#include <cute/atom/mma_atom.hpp>
#include <cute/tensor.hpp>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "layouts.h"

namespace {

using namespace cute;
using T = bfloat16_t;
namespace ours = attent::emulated;
constexpr auto K = SM90::GMMA::Major::K, MN = SM90::GMMA::Major::MN;

// ------------------------------------------------------------------------------------------------------- what is compared

struct Comparison {
    long compared = 0, differ = 0;

    template <class Value>
    void operator()(const Value& ours, const Value& cutes) {
        ++compared;
        if (!(ours == cutes)) ++differ;
    }
};

std::vector<std::string> wanted;

bool is_wanted(const char* name) {
    return wanted.empty() || std::find(wanted.begin(), wanted.end(), name) != wanted.end();
}

template <class Compare>
void report(const char* name, Compare compare) {
    if (!is_wanted(name)) return;
    Comparison same;
    try {
        compare(same);
    } catch (const std::exception& problem) {  // the emulator finds faults of its own
        ++same.compared, ++same.differ;
        std::fprintf(stderr, "%s: %s\n", name, problem.what());
    }
    std::printf("%ld %ld %s\n", same.compared, same.differ, name);
}

// Whole numbers: their products and sums are exact.
float drawn() {
    static std::mt19937 random(1);
    return static_cast<float>(static_cast<int>(random() % 17) - 8);
}
uint16_t bits(float x) {
    return T(x).raw();
}
ours::Numbers all_memory() {
    return {std::begin(memory), std::end(memory)};
}

// ------------------------------------------------------------------------------------------------------------- tiles

// [rows, width] with k adjacent: queries, keys, hidden, weight. Of 128 columns the second 64 lie behind all rows.
template <int ROWS, int WIDTH>
auto tile_of_rows(int at) {
    return make_tensor(make_smem_ptr(reinterpret_cast<T*>(memory) + at / 2),
                       tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<T>{}, Shape<Int<ROWS>, Int<WIDTH>>{}));
}
// [columns, k] with columns adjacent: values, k being their rows. Columns 64 side by side, the next 64 behind all k.
template <int COLUMNS, int ROWS>
auto tile_of_columns(int at) {
    return make_tensor(
        make_smem_ptr(reinterpret_cast<T*>(memory) + at / 2),
        tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<T>{}, Shape<Int<COLUMNS>, Int<ROWS>>{}, Step<_2, _1>{}));
}

template <class Tile>
void fill(Tile&& tile) {
    for (int i = 0; i < size<0>(tile); ++i) {
        for (int j = 0; j < size<1>(tile); ++j) tile(i, j) = T(drawn());
    }
}

// A copy of boxes from a matrix that ends within the tile: each number where CuTe's tile has it, 0 outside.
template <int ROWS, int WIDTH, bool COLUMNS>
void compare_boxes(Comparison& same) {
    const int height = ROWS + 20, width = WIDTH - 8, row = 40, apart = ROWS * 128;
    ours::Numbers matrix(height * width);
    for (size_t i = 0; i < matrix.size(); ++i) matrix[i] = static_cast<uint16_t>(i + 1);
    const ours::Numbers shared = ours::load_boxes(matrix, height, width, row, ROWS, WIDTH / 64, apart);
    std::copy_n(shared.begin(), WIDTH / 64 * apart / 2, memory);
    for (int r = 0; r < ROWS; ++r) {
        for (int c = 0; c < WIDTH; ++c) {
            const bool is_inside = row + r < height && c < width;
            uint16_t there;
            if constexpr (COLUMNS) {
                there = tile_of_columns<WIDTH, ROWS>(0)(c, r).raw();
            } else {
                there = tile_of_rows<ROWS, WIDTH>(0)(r, c).raw();
            }
            same(there, is_inside ? matrix[(row + r) * width + c] : uint16_t{0});
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- products

// Registers of a thread's fragment: two numbers of `of` each, where CuTe's `places` are.
template <class Places, class Number>
void append(std::vector<uint32_t>& registers, const Places& places, Number number) {
    for (int i = 0; i < size(places); i += 2) {
        const auto low = places(i), high = places(i + 1);
        registers.push_back(bits(number(get<0>(low), get<1>(low))) |
                            static_cast<uint32_t>(bits(number(get<0>(high), get<1>(high)))) << 16);
    }
}

// d [threads][N / ...] of ours against a bᵀ, each accumulator being where CuTe's atom has it. a [M, 16], b [N, 16].
template <class Atom, class A, class B>
void compare_accumulators(Comparison& same, const std::vector<float>& d, const A& a, const B& b) {
    const auto mma = make_tiled_mma(Atom{});
    const auto whole = make_identity_tensor(select<0, 1>(typename decltype(mma)::AtomShape_MNK{}));
    size_t i = 0;
    for (int thread = 0; thread < size(mma); ++thread) {
        const auto places = mma.get_slice(thread).partition_C(whole);
        for (int v = 0; v < size(places); ++v) {
            const int m = get<0>(places(v)), n = get<1>(places(v));
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += a(m, k) * b(n, k);
            same(d.at(i++), sum);
        }
    }
    same(i, d.size());
}

// Both operands by descriptor: two warpgroups' rows of a tile, and all columns of another.
template <class Op, int COLUMNS, int WIDTH>
void compare_products(Comparison& descriptors, Comparison* sums) {
    constexpr int ROWS = 128, A_AT = 2048, B_AT = A_AT + ROWS * WIDTH * 2;
    auto a = tile_of_rows<ROWS, WIDTH>(A_AT);
    auto b = tile_of_rows<COLUMNS, WIDTH>(B_AT);
    fill(a), fill(b);
    const ours::Numbers shared = all_memory();
    const auto mma = make_tiled_mma(Op{}, Layout<Shape<_2, _1, _1>>{});
    for (int group = 0; group < 2; ++group) {
        const auto slice = mma.get_slice(128 * group);
        const auto fragment_a = slice.partition_fragment_A(a);
        const auto fragment_b = slice.partition_fragment_B(b);
        for (int step = 0; step < WIDTH / 16; ++step) {
            const int half = step / 4;
            const uint64_t from = ours::operand(A_AT + half * ROWS * 128, 64 * group, step % 4);
            const uint64_t with = ours::operand(B_AT + half * COLUMNS * 128, 0, step % 4);
            descriptors(from, static_cast<uint64_t>(fragment_a(0, 0, step)));
            descriptors(with, static_cast<uint64_t>(fragment_b(0, 0, step)));
            if (sums == nullptr) continue;
            compare_accumulators<Op>(
                *sums, ours::product(shared, from, with, COLUMNS),
                [&](int m, int k) { return static_cast<float>(a(64 * group + m, 16 * step + k)); },
                [&](int n, int k) { return static_cast<float>(b(n, 16 * step + k)); });
        }
    }
}

// The left operand in registers, the right one a tile of rows that are k.
template <class Op, int COLUMNS>
void compare_row_products(Comparison& descriptors, Comparison* sums) {
    constexpr int ROWS = 128, AT = 2048, LEADING = ROWS * 128;
    auto b = tile_of_columns<COLUMNS, ROWS>(AT);
    fill(b);
    const ours::Numbers shared = all_memory();
    const auto mma = make_tiled_mma(Op{});
    const auto fragment = mma.get_slice(0).partition_fragment_B(b);
    for (int step = 0; step < ROWS / 16; ++step) {
        float a[64][16];
        for (auto& row : a) {
            for (float& x : row) x = drawn();
        }
        std::vector<uint32_t> registers;
        for (int thread = 0; thread < 128; ++thread) {
            append(registers, mma.get_slice(thread).partition_A(make_identity_tensor(Shape<_64, _16>{})),
                   [&](int m, int k) { return a[m][k]; });
        }
        const uint64_t with = ours::columns_operand(AT, 16 * step, LEADING);
        // Of 64 columns no next 64 are found: CuTe leaves the leading offset 0, we do not.
        const uint64_t unused = COLUMNS == 64 ? static_cast<uint64_t>(LEADING / 16) << 16 : 0;
        descriptors(with, static_cast<uint64_t>(fragment(0, 0, step)) | unused);
        if (sums == nullptr) continue;
        compare_accumulators<Op>(
            *sums, ours::row_product(shared, registers, with, COLUMNS), [&](int m, int k) { return a[m][k]; },
            [&](int n, int k) { return static_cast<float>(b(n, 16 * step + k)); });
    }
}

// A warp's product, all operands in registers.
void compare_warp_products(Comparison& sums) {
    using Op = SM80_16x8x16_F32BF16BF16F32_TN;
    const auto mma = make_tiled_mma(Op{});
    float a[16][16], b[8][16];
    for (int k = 0; k < 16; ++k) {
        for (auto& row : a) row[k] = drawn();
        for (auto& row : b) row[k] = drawn();
    }
    std::vector<uint32_t> registers_a, registers_b;
    for (int thread = 0; thread < 32; ++thread) {
        const auto slice = mma.get_slice(thread);
        append(registers_a, slice.partition_A(make_identity_tensor(Shape<_16, _16>{})),
               [&](int m, int k) { return a[m][k]; });
        append(registers_b, slice.partition_B(make_identity_tensor(Shape<_8, _16>{})),
               [&](int n, int k) { return b[n][k]; });
    }
    compare_accumulators<Op>(
        sums, ours::mma(registers_a, registers_b), [&](int m, int k) { return a[m][k]; },
        [&](int n, int k) { return b[n][k]; });
}

// Half precision takes the places of bfloat16.
template <class One, class Other>
constexpr bool lie_alike() {
    using A = MMA_Traits<One>;
    using B = MMA_Traits<Other>;
    return is_same_v<typename A::ALayout, typename B::ALayout> && is_same_v<typename A::BLayout, typename B::BLayout> &&
           is_same_v<typename A::CLayout, typename B::CLayout>;
}
static_assert(lie_alike<SM90_64x256x16_F32BF16BF16_SS<K, K>, SM90_64x256x16_F32F16F16_SS<K, K>>());
static_assert(lie_alike<SM90_64x128x16_F32BF16BF16_SS<K, K>, SM90_64x128x16_F32F16F16_SS<K, K>>());
static_assert(lie_alike<SM90_64x128x16_F32BF16BF16_RS<K, MN>, SM90_64x128x16_F32F16F16_RS<K, MN>>());
static_assert(lie_alike<SM90_64x64x16_F32BF16BF16_RS<K, MN>, SM90_64x64x16_F32F16F16_RS<K, MN>>());
static_assert(lie_alike<SM80_16x8x16_F32BF16BF16F32_TN, SM80_16x8x16_F32F16F16F32_TN>());

// ---------------------------------------------------------------------------------------------------------- ldmatrix

template <class Op>
void compare_ldmatrix(Comparison& same, bool transposed) {
    using Traits = Copy_Traits<Op>;  // layouts of (thread, bit)
    const typename Traits::SrcLayout source{};
    const typename Traits::DstLayout destination{};
    std::vector<uint32_t> rows;
    for (int lane = 0; lane < 32; ++lane) rows.push_back(16 * (5 * lane % 32));
    for (int i = 0; i < 32 * 8; ++i) memory[i] = static_cast<uint16_t>(1000 + i);
    const std::vector<uint32_t> registers = ours::ldmatrix(all_memory(), rows, transposed);
    std::vector<uint16_t> wanted(32 * 8);  // by CuTe's number of what moves
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 8; ++i) wanted.at(source(lane, 16 * i) / 16) = memory[rows[lane] / 2 + i];
    }
    for (int lane = 0; lane < 32; ++lane) {
        for (int i = 0; i < 8; ++i) {
            same(static_cast<uint16_t>(registers[lane * 4 + i / 2] >> i % 2 * 16),
                 wanted.at(destination(lane, 16 * i) / 16));
        }
    }
}

template <class Compare>
void report_products(const char* descriptors, const char* sums, Compare compare) {
    report(descriptors, [&](Comparison& same) { compare(same, nullptr); });
    Comparison unused;
    report(sums, [&](Comparison& same) { compare(unused, &same); });
}

}  // namespace

int main(int count, char** names) {
    wanted.assign(names + 1, names + count);
    report("boxes [128, 64]", compare_boxes<128, 64, false>);
    report("boxes [256, 64]", compare_boxes<256, 64, false>);
    report("boxes [128, 128]", compare_boxes<128, 128, false>);
    report("boxes [128, 64] by columns", compare_boxes<128, 64, true>);
    report("boxes [128, 128] by columns", compare_boxes<128, 128, true>);
    report_products("descriptors m64n256k16", "products m64n256k16",
                    compare_products<SM90_64x256x16_F32BF16BF16_SS<K, K>, 256, 64>);
    report_products("descriptors m64n128k16, 64 wide", "products m64n128k16, 64 wide",
                    compare_products<SM90_64x128x16_F32BF16BF16_SS<K, K>, 128, 64>);
    report_products("descriptors m64n128k16, 128 wide", "products m64n128k16, 128 wide",
                    compare_products<SM90_64x128x16_F32BF16BF16_SS<K, K>, 128, 128>);
    report_products("descriptors m64n64k16 of rows", "products m64n64k16 of rows",
                    compare_row_products<SM90_64x64x16_F32BF16BF16_RS<K, MN>, 64>);
    report_products("descriptors m64n128k16 of rows", "products m64n128k16 of rows",
                    compare_row_products<SM90_64x128x16_F32BF16BF16_RS<K, MN>, 128>);
    report("products m16n8k16", compare_warp_products);
    report("ldmatrix", [](Comparison& same) { compare_ldmatrix<SM75_U32x4_LDSM_N>(same, false); });
    report("ldmatrix transposed", [](Comparison& same) { compare_ldmatrix<SM75_U16x8_LDSM_T>(same, true); });
}
