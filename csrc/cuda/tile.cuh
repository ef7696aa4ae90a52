// Tiles of rows in shared memory: how they get there (cp.async) and how tensor cores read them (ldmatrix), without bank
// conflicts.
//
// A tile is ROWS x WIDTH numbers of 16 bits, in chunks of 8 (16 bytes, what one lane copies and one row of ldmatrix is).
// Shared memory has 32 banks of 4 bytes, so 8 chunks side by side can be read at once. ldmatrix reads one chunk of each
// of 8 rows: laid out plainly they would lie a row apart, in the same banks. So a row's chunks are permuted by its number
// (swizzle below), and any 8 rows' chunks fall into 8 different groups of banks.

#pragma once

#include <cstdint>

#include "half.cuh"

namespace attent::gpu {

// Bytes from the start of the block's dynamic shared memory (or, on a GPU, of its shared memory).
using SharedAddress = uint32_t;

constexpr int CHUNK = 8;         // numbers of 16 bits in 16 bytes
constexpr int CHUNK_BYTES = 16;  // the widest access

// Where a row's chunk lies among the row's chunks.
template <int WIDTH>
__host__ __device__ constexpr int swizzle(int row, int chunk) {
    static_assert(WIDTH % 32 == 0, "rows of whole groups of 4 chunks");
    // Rows of whole groups of 8 chunks all start in the same banks: 8 permutations. Else two rows in turn do: 4.
    return WIDTH % 64 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
}

// Bytes from the start of a tile to a chunk of a row.
template <int WIDTH>
__host__ __device__ constexpr int offset_in_tile(int row, int chunk) {
    return row * (WIDTH * 2) + swizzle<WIDTH>(row, chunk) * CHUNK_BYTES;
}

template <int WIDTH>
constexpr bool is_free_of_conflicts() {
    for (int first = 0; first < 64; first += 8) {
        for (int chunk = 0; chunk < WIDTH / CHUNK; ++chunk) {
            int groups = 0;
            for (int row = first; row < first + 8; ++row) {
                groups |= 1 << offset_in_tile<WIDTH>(row, chunk) / CHUNK_BYTES % 8;
            }
            if (groups != 255) return false;
        }
    }
    return true;
}
static_assert(is_free_of_conflicts<64>() && is_free_of_conflicts<96>() && is_free_of_conflicts<128>());
static_assert(is_free_of_conflicts<192>() && is_free_of_conflicts<256>());

// ------------------------------------------------------------------------------------------------------ instructions

#ifdef ATTENT_EMULATE

inline unsigned char* dynamic_shared() {
    return emulate::dynamic_shared();
}
inline SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(static_cast<const unsigned char*>(pointer) - emulate::dynamic_shared());
}
inline void copy_async(SharedAddress to, const void* from, int bytes) {
    emulate::start_copy(to, from, bytes);
}
inline void commit_copies() {
    emulate::commit_copies();
}
template <int GROUPS>
void wait_for_copies() {
    emulate::wait_for_copies(GROUPS);
}

inline void load_matrices(uint32_t (&r)[4], SharedAddress row, bool transposed) {
    const emulate::Exchange& all = emulate::meet("ldmatrix", row);
    const int g = emulate::here().lane / 4, t = emulate::here().lane % 4;
    for (int matrix = 0; matrix < 4; ++matrix) {
        const auto number = [&](int i, int j) {
            const auto start = emulate::shown<SharedAddress>(all, 8 * matrix + i);
            uint16_t bits;
            std::memcpy(&bits, emulate::at_shared(start, CHUNK_BYTES) + 2 * j, 2);
            return static_cast<uint32_t>(bits);
        };
        r[matrix] =
            transposed ? number(2 * t, g) | number(2 * t + 1, g) << 16 : number(g, 2 * t) | number(g, 2 * t + 1) << 16;
    }
}
inline void ldmatrix(uint32_t (&r)[4], SharedAddress row) {
    load_matrices(r, row, false);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], SharedAddress row) {
    load_matrices(r, row, true);
}

inline uint4 load_shared_16(SharedAddress address) {
    uint4 value;
    std::memcpy(&value, emulate::at_shared(address, 16), 16);
    return value;
}
inline uint32_t load_shared_4(SharedAddress address) {
    uint32_t value;
    std::memcpy(&value, emulate::at_shared(address, 4), 4);
    return value;
}
inline void store_shared_4(SharedAddress address, uint32_t value) {
    std::memcpy(emulate::at_shared(address, 4), &value, 4);
}
inline void store_shared_16(SharedAddress address, const uint4& value) {
    std::memcpy(emulate::at_shared(address, 16), &value, 16);
    emulate::block().unpublished[address / 16] = &emulate::here();
}

#else

extern __shared__ __align__(1024) unsigned char attent_dynamic_shared[];
__device__ __forceinline__ unsigned char* dynamic_shared() {
    return attent_dynamic_shared;
}

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
    return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, past the L1 cache and the registers; of them the first `bytes` are read, the
// others are 0. The calling thread sees them after wait_for_copies, other threads after a barrier behind that.
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
// Ends a group of copies; waits are for all groups but the GROUPS youngest.
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Four matrices of 8 x 8; lanes 8 i .. 8 i + 7 give the addresses of matrix i's rows. Lane 4 g + t gets, of each matrix,
// the numbers 2t and 2t + 1 of row g; transposed: of column g.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(SharedAddress address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint32_t load_shared_4(SharedAddress address) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}
__device__ __forceinline__ void store_shared_4(SharedAddress address, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared_16(SharedAddress address, const uint4& v) {
    asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

#endif

// --------------------------------------------------------------------------------------------- tiles and fragments

// Start to copy a tile of rows: rows [0, rows) and columns [0, width) of what begins at `from`, rows `stride` numbers
// apart and each at a multiple of 16 bytes; 0 elsewhere. Called by THREADS threads, of which this is the `thread`-th.
// UNROLL: how many rows' addresses it may hold in registers together.
template <typename T, int ROWS, int WIDTH, int THREADS, int UNROLL = ROWS>
__device__ __forceinline__ void copy_tile_async(SharedAddress tile, const T* from, int64_t stride, int rows, int width,
                                                int thread) {
    // Threads side by side take chunks side by side. Of 12 or 24 chunks a thread takes every third part, so that its
    // column stays the same from row to row.
    constexpr int CHUNKS = WIDTH / CHUNK, A_ROW = CHUNKS % 3 == 0 ? CHUNKS / 3 : CHUNKS, AT_ONCE = THREADS / A_ROW;
    static_assert(THREADS % A_ROW == 0 && ROWS % AT_ONCE == 0, "threads share the tile evenly");
    const int row = thread / A_ROW, column = thread % A_ROW;
#pragma unroll UNROLL
    for (int i = 0; i < ROWS; i += AT_ONCE) {
        const bool is_inside = row + i < rows;
        const T* start = from + (is_inside ? (row + i) * stride : 0);
#pragma unroll
        for (int chunk = column; chunk < CHUNKS; chunk += A_ROW) {
            const int left = (width - chunk * CHUNK) * 2;
            const int bytes = !is_inside || left <= 0 ? 0 : left < CHUNK_BYTES ? left : CHUNK_BYTES;
            copy_async(tile + offset_in_tile<WIDTH>(row + i, chunk), bytes > 0 ? start + chunk * CHUNK : from, bytes);
        }
    }
}

// From the address of a chunk to that of another one, `rows` (a multiple of 8) below and `chunks` on. `start` is of a
// chunk whose number has no bit in common with `chunks`, in a tile at a multiple of 128 bytes. With constants that is one
// instruction, where offset_in_tile takes several; and a loop around it needs one register for all of a lane's addresses.
template <int WIDTH>
__host__ __device__ constexpr SharedAddress moved(SharedAddress start, int rows, int chunks) {
    constexpr int GROUP_CHUNKS = WIDTH % 64 == 0 ? 8 : 4;
    return (start ^ static_cast<SharedAddress>(chunks % GROUP_CHUNKS * CHUNK_BYTES)) +
           static_cast<SharedAddress>(rows * (WIDTH * 2) + chunks / GROUP_CHUNKS * (GROUP_CHUNKS * CHUNK_BYTES));
}

template <int WIDTH>
constexpr bool moves_as_it_lies() {
    for (int row = 0; row < 8; ++row) {
        for (int rows = 0; rows <= 16; rows += 8) {
            for (int chunk = 0; chunk < WIDTH / CHUNK; ++chunk) {
                for (int first = 0; first < 2; ++first) {  // from chunk 0 to any, from chunk 1 to odd ones
                    if (first == 1 && chunk % 2 == 0) continue;
                    const auto start = static_cast<SharedAddress>(offset_in_tile<WIDTH>(row, first));
                    const auto wanted = static_cast<SharedAddress>(offset_in_tile<WIDTH>(row + rows, chunk));
                    if (moved<WIDTH>(start, rows, chunk - first) != wanted) return false;
                }
            }
        }
    }
    return true;
}
static_assert(moves_as_it_lies<64>() && moves_as_it_lies<96>() && moves_as_it_lies<128>());
static_assert(moves_as_it_lies<192>() && moves_as_it_lies<256>());

// Keep the compiler from computing what follows from `address` before this point, that is, outside of a loop: it would
// rather hold dozens of addresses in registers than compute them again.
__device__ __forceinline__ void compute_from_here(SharedAddress& address) {
#ifdef ATTENT_EMULATE
    (void)address;
#else
    asm volatile("" : "+r"(address));
#endif
}

// Where a lane reads a fragment of a tile from, the first of each kind; `moved` leads to the others.
//
// A[16, 16] of a product: rows from `row` on, k from 0 on. The next 16 k: 2 chunks on.
template <int WIDTH>
__device__ __forceinline__ SharedAddress start_of_a(SharedAddress tile, int row, int lane) {
    return tile + offset_in_tile<WIDTH>(row + lane % 16, lane / 16);
}
// Two B[16, 8] side by side of a product with the tile's transpose: columns are the tile's rows from `row` on, k are its
// columns. b[0..1] are the first's, b[2..3] the second's. The next 16 k: 2 chunks on.
template <int WIDTH>
__device__ __forceinline__ SharedAddress start_of_b_of_rows(SharedAddress tile, int row, int lane) {
    return tile + offset_in_tile<WIDTH>(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
// The same of a product with the tile itself: k are its rows from `row` on. The next 16 columns: 2 chunks on; read with
// ldmatrix_transposed.
template <int WIDTH>
__device__ __forceinline__ SharedAddress start_of_b(SharedAddress tile, int row, int lane) {
    return tile + offset_in_tile<WIDTH>(row + lane % 16, lane / 16);
}

// The same in one: A from `row` and 16 `step` on, two B from `row` and 16 `step`, or 16 `pair`, on.
template <int WIDTH>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], SharedAddress tile, int row, int step, int lane) {
    ldmatrix(a, moved<WIDTH>(start_of_a<WIDTH>(tile, row, lane), 0, 2 * step));
}
template <int WIDTH>
__device__ __forceinline__ void load_b_of_rows(uint32_t (&b)[4], SharedAddress tile, int row, int step, int lane) {
    ldmatrix(b, moved<WIDTH>(start_of_b_of_rows<WIDTH>(tile, row, lane), 0, 2 * step));
}
template <int WIDTH>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], SharedAddress tile, int row, int pair, int lane) {
    ldmatrix_transposed(b, moved<WIDTH>(start_of_b<WIDTH>(tile, row, lane), 0, 2 * pair));
}

}  // namespace attent::gpu
