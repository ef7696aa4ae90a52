// Hopper's copies, barriers and products for kernels that run on a CPU (emulate.h): the twins of hopper.cuh's and
// hopper_products.cuh's. A copy lands at some time between its start and the end of a wait for it, drawn; a product reads
// its operands as late as it may, when it is waited for: what overwrites them before shows. Errors: a product of operands
// that a thread stored and has not published, products of registers that no fence before them holds, and waits without an
// end.
#pragma once

#include <functional>
#include <map>
#include <set>

#include "half.cuh"
#include "tile.cuh"

namespace attent::gpu::hopper {

// ----------------------------------------------------------------------------------------------------------- barriers

struct Barrier {
    int count = 0, pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;
    std::vector<std::function<void()>> copies;  // under way
    void complete() {
        if (pending == 0 && bytes == 0) phase ^= 1, pending = count;
    }
};
inline Barrier& barrier_at(SharedAddress address) {
    static std::map<SharedAddress, Barrier> all;
    return all[address];
}
inline void init_barrier(SharedAddress barrier, int arrivals) {
    emulate::at_shared(barrier, 8);
    barrier_at(barrier) = Barrier();
    barrier_at(barrier).count = barrier_at(barrier).pending = arrivals;
}
inline void publish_barriers() {}
// Of the calling thread alone: what another stored stays unpublished until that one comes by.
inline void publish_stores() {
    auto& stores = emulate::block().unpublished;
    for (auto store = stores.begin(); store != stores.end();) {
        store = store->second == &emulate::here() ? stores.erase(store) : std::next(store);
    }
}
inline void arrive(SharedAddress barrier) {
    Barrier& b = barrier_at(barrier);
    if (b.pending-- == 0) throw std::logic_error("more arrivals than the barrier counts");
    b.complete();
}
inline void arrive_and_expect(SharedAddress barrier, int bytes) {
    barrier_at(barrier).bytes += bytes;
    arrive(barrier);
}
inline void wait(SharedAddress barrier, uint32_t parity) {
    Barrier& b = barrier_at(barrier);
    while (b.phase == parity) {
        // A copy lands at some time, in any order.
        if (!b.copies.empty() && emulate::block().random() % 4 == 0) {
            const size_t which = emulate::block().random() % b.copies.size();
            const auto copy = b.copies[which];
            b.copies.erase(b.copies.begin() + static_cast<std::ptrdiff_t>(which));
            copy();
            emulate::block().has_moved = true;
            continue;
        }
        emulate::back_to_scheduler();
    }
    emulate::block().has_moved = true;
}

// ------------------------------------------------------------------------------------------------------------- copies

// A matrix [examples, heads, rows, width] of 16-bit numbers, loaded by boxes of [box_rows, 64] of one head.
struct TensorMap {
    const void* data;
    int64_t width;
    int64_t sizes[3], strides[3];  // of rows, heads, examples
    int box_rows;
};
inline void prefetch_map(const TensorMap&) {}
inline void load_box(const TensorMap& map, SharedAddress to, SharedAddress barrier, int column, int row, int head,
                     int example) {
    if (to % 1024 != 0) throw std::logic_error("a swizzled box at a misaligned address");
    const TensorMap from = map;
    const auto copy = [=] {
        const auto* start =
            static_cast<const uint16_t*>(from.data) + example * from.strides[2] + head * from.strides[1];
        for (int r = 0; r < from.box_rows; ++r) {
            for (int c = 0; c < 64; ++c) {
                uint16_t value = 0;
                if (example < from.sizes[2] && head < from.sizes[1] && row + r < from.sizes[0] &&
                    column + c < from.width) {
                    value = start[(row + r) * from.strides[0] + column + c];
                }
                const int at = r * 128 + (2 * c ^ r % 8 * 16);
                std::memcpy(emulate::at_shared(to + at, 2), &value, 2);
            }
        }
        barrier_at(barrier).bytes -= from.box_rows * 128;
        barrier_at(barrier).complete();
    };
    // It lands at once, or when somebody waits for it.
    if (emulate::block().random() % 2 == 0) {
        copy();
    } else {
        barrier_at(barrier).copies.push_back(copy);
    }
}
inline void load_box(const TensorMap& map, SharedAddress to, SharedAddress barrier, int column, int row) {
    load_box(map, to, barrier, column, row, 0, 0);
}

// ----------------------------------------------------------------------------------------------------------- products

// d [64, columns] (+)= a [64, 16] b [16, columns] of four warps. a: in registers, if they are there.
struct Product {
    float* d;
    int columns;
    const uint32_t* registers;
    uint64_t a, b;
    bool b_is_transposed, adds;
};
// Products that a thread has started.
struct Products {
    std::vector<std::vector<Product>> groups{1};  // the last is still open
    std::set<const void*> fenced;                 // what the fence before the open group held
};
inline Products& products_of_thread() {
    std::shared_ptr<void>& held = emulate::here().products;
    if (held == nullptr) held = std::make_shared<Products>();
    return *static_cast<Products*>(held.get());
}
template <typename Registers>
void fence_registers(Registers&) {}
inline void hold(const float* accumulators) {
    products_of_thread().fenced.insert(accumulators);
}
template <int N>
void hold(const uint32_t (&operands)[N][4]) {
    for (const auto& operand : operands) products_of_thread().fenced.insert(operand);
}
template <typename... Registers>
void fence_products(Registers&... registers) {
    emulate::meet("wgmma.fence", 0);
    (hold(registers), ...);
}
inline void start(const Product& product) {
    for (const void* registers : {static_cast<const void*>(product.d), static_cast<const void*>(product.registers)}) {
        if (registers != nullptr && products_of_thread().fenced.count(registers) == 0) {
            throw std::logic_error("a product of registers that no fence before it holds");
        }
    }
    products_of_thread().groups.back().push_back(product);
}
inline void commit_products() {
    emulate::meet("wgmma.commit_group", 0);
    products_of_thread().groups.emplace_back();
    products_of_thread().fenced.clear();
}

// Number (row, k) of a tile of rows; or, of a transposed operand, (column, k): rows are k there, 64 columns side by side,
// the next 64 a leading offset on.
template <typename T>
T number_of_operand(uint64_t descriptor, int row, int k, bool is_transposed) {
    if (descriptor >> 62 != 1) throw std::logic_error("an operand without 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4;
    const uint32_t atom = (descriptor >> 32 & 0x3fff) << 4;
    uint32_t at = is_transposed ? start + row / 64 * leading + k / 8 * atom + k % 8 * 128 + 2 * (row % 64)
                                : start + row / 8 * atom + row % 8 * 128 + 2 * k;
    at ^= (at >> 7 & 7) << 4;
    if (emulate::block().unpublished.count(at / 16) != 0) throw std::logic_error("a product of unpublished stores");
    T value;
    std::memcpy(&value, emulate::at_shared(at, 2), 2);
    return value;
}

// Rows g and g + 8 of this warp's 16, for lane = 4 g + t; in registers they lie as A of mma.cuh.
template <typename T>
void rows_of_a(float (&rows)[2][16], const Product& product) {
    const int warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = emulate::here().lane;
    if (product.registers == nullptr) {
        for (int half = 0; half < 2; ++half) {
            for (int k = 0; k < 16; ++k) {
                const int row = 16 * warp + lane / 4 + 8 * half;
                rows[half][k] = to_float32(number_of_operand<T>(product.a, row, k, false));
            }
        }
        return;
    }
    struct Shown {
        uint32_t a[4];
    } mine;
    for (int i = 0; i < 4; ++i) mine.a[i] = product.registers[i];
    const emulate::Exchange& all = emulate::meet("wgmma", mine);
    for (int k = 0; k < 16; ++k) {
        const Shown owner = emulate::shown<Shown>(all, lane / 4 * 4 + k % 8 / 2);
        for (int half = 0; half < 2; ++half) {
            const uint32_t pair = owner.a[k / 8 * 2 + half];
            rows[half][k] = k % 2 == 0 ? low_of<T>(pair) : high_of<T>(pair);
        }
    }
}

// Instructions of the whole warp: no lane goes on, and tells others that it has read its operands, before all have.
template <typename T, int IN_FLIGHT>
void wait_for_products() {
    auto& groups = products_of_thread().groups;
    while (static_cast<int>(groups.size()) - 1 > IN_FLIGHT) {
        for (const Product& product : groups.front()) {
            float rows[2][16];
            rows_of_a<T>(rows, product);
            for (int i = 0; i < product.columns / 4; ++i) {
                const int column = i / 2 * 8 + emulate::here().lane % 4 * 2 + i % 2;
                float sums[2];
                for (int half = 0; half < 2; ++half) {
                    sums[half] = product.adds ? product.d[i / 2 * 4 + half * 2 + i % 2] : 0.0f;
                }
                for (int k = 0; k < 16; ++k) {
                    const float b = to_float32(number_of_operand<T>(product.b, column, k, product.b_is_transposed));
                    for (int half = 0; half < 2; ++half) sums[half] += rows[half][k] * b;
                }
                for (int half = 0; half < 2; ++half) product.d[i / 2 * 4 + half * 2 + i % 2] = sums[half];
            }
        }
        groups.erase(groups.begin());
    }
    emulate::meet("wgmma.wait_group", IN_FLIGHT);
}

template <int REGISTERS>
void take_registers() {}
template <int REGISTERS>
void give_registers() {}

}  // namespace attent::gpu::hopper
