// The emulator's side of the comparison with CuTe: what is in layouts.h, by kernels of one instruction each.
#include "layouts.h"

#include "cuda/emulate.h"
#include "cuda/hopper_products.cuh"
#include "cuda/mma.cuh"
#include "cuda/tensor_map.h"

namespace attent::emulated {

namespace {

using namespace gpu;

constexpr int WARPGROUP = 128, WARP = 32;

void fill_shared(const Numbers& numbers) {
    if (threadIdx.x == 0) std::memcpy(dynamic_shared(), numbers.data(), 2 * numbers.size());
    __syncthreads();
}

template <typename Kernel, typename... Arguments>
void run(Kernel kernel, int threads, const Numbers& shared, Arguments... arguments) {
    const auto body = [&] {
        fill_shared(shared);
        kernel(arguments...);
    };
    const auto call = [](const decltype(body)* what) { (*what)(); };
    void (*entry)(const decltype(body)*) = call;
    emulate::launch(entry, dim3(1), dim3(threads), 2 * shared.size(), &body);
}

// Of a thread: its accumulators of one product, from `start` on.
template <int N, typename Start, typename... Operands>
void multiply(std::vector<float>& d, Start start, Operands&... in_registers) {
    float mine[N / 2] = {};
    hopper::fence_products(mine, in_registers...);
    start(mine);
    hopper::commit_products();
    hopper::wait_for_products<BFloat16, 0>();
    std::copy(mine, mine + N / 2, &d[threadIdx.x * (N / 2)]);
}

template <int N>
std::vector<float> product_of(const Numbers& shared, uint64_t a, uint64_t b) {
    std::vector<float> d(WARPGROUP * N / 2);
    run([&] { multiply<N>(d, [&](auto& mine) { hopper::start_product<BFloat16>(mine, a, b, false); }); }, WARPGROUP,
        shared);
    return d;
}

template <int N>
std::vector<float> row_product_of(const Numbers& shared, const std::vector<uint32_t>& a, uint64_t b) {
    std::vector<float> d(WARPGROUP * N / 2);
    const auto kernel = [&] {
        uint32_t mine[1][4];
        std::copy(&a[threadIdx.x * 4], &a[threadIdx.x * 4] + 4, mine[0]);
        multiply<N>(d, [&](auto& sums) { hopper::start_row_product<BFloat16>(sums, mine[0], b); }, mine);
    };
    run(kernel, WARPGROUP, shared);
    return d;
}

}  // namespace

uint64_t operand(uint32_t tile, int row, int step) {
    return hopper::operand(tile, row, step);
}
uint64_t columns_operand(uint32_t tile, int row, int leading) {
    return hopper::columns_operand(tile, row, leading);
}

Numbers load_boxes(const Numbers& matrix, int rows, int width, int row, int box_rows, int boxes, int apart) {
    hopper::TensorMap map;
    hopper::make_map(&map, matrix.data(), true, rows, width, width, box_rows);
    const int bytes = boxes * apart;
    Numbers shared((bytes + 1024) / 2);
    const auto kernel = [&] {
        const auto barrier = static_cast<SharedAddress>(bytes);
        hopper::init_barrier(barrier, 1);
        hopper::arrive_and_expect(barrier, boxes * box_rows * hopper::ROW_BYTES);
        for (int i = 0; i < boxes; ++i) hopper::load_box(map, i * apart, barrier, 64 * i, row);
        hopper::wait(barrier, 0);
        std::memcpy(shared.data(), dynamic_shared(), bytes);
    };
    run(kernel, 1, shared);
    return shared;
}

std::vector<float> product(const Numbers& shared, uint64_t a, uint64_t b, int columns) {
    return columns == 128 ? product_of<128>(shared, a, b) : product_of<256>(shared, a, b);
}
std::vector<float> row_product(const Numbers& shared, const std::vector<uint32_t>& a, uint64_t b, int columns) {
    return columns == 64 ? row_product_of<64>(shared, a, b) : row_product_of<128>(shared, a, b);
}

std::vector<float> mma(const std::vector<uint32_t>& a, const std::vector<uint32_t>& b) {
    std::vector<float> d(WARP * 4);
    const auto kernel = [&] {
        uint32_t my_a[4], my_b[2];
        float c[4] = {};
        std::copy(&a[threadIdx.x * 4], &a[threadIdx.x * 4] + 4, my_a);
        std::copy(&b[threadIdx.x * 2], &b[threadIdx.x * 2] + 2, my_b);
        mma_16x8x16<BFloat16>(c, my_a, my_b);
        std::copy(c, c + 4, &d[threadIdx.x * 4]);
    };
    run(kernel, WARP, Numbers(8));
    return d;
}

std::vector<uint32_t> ldmatrix(const Numbers& shared, const std::vector<uint32_t>& rows, bool transposed) {
    std::vector<uint32_t> registers(WARP * 4);
    const auto kernel = [&] {
        uint32_t mine[4];
        transposed ? gpu::ldmatrix_transposed(mine, rows[threadIdx.x]) : gpu::ldmatrix(mine, rows[threadIdx.x]);
        std::copy(mine, mine + 4, &registers[threadIdx.x * 4]);
    };
    run(kernel, WARP, shared);
    return registers;
}

}  // namespace attent::emulated
