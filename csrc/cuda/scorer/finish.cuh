// How a launch ends: by tickets, each time the last to come goes on and the others leave.
//
// 1. Of a tile's vocabulary groups: folds the groups' slots in their order into token losses and squared norms.
// 2. Of the tiles that hold tokens of a block of examples: folds tokens into examples.
// 3. Of all blocks of examples: sums the blocks, and chooses.
//
// Nothing is summed by atomics, so results are the same to the bit whatever the order of arrival. Nobody waits for
// another block of threads: they need not run at the same time. Every ticket is 0 again at the end, so a launch can be
// replayed in a CUDA graph.
#pragma once

#include "../select.cuh"
#include "folds.cuh"

namespace attent::gpu::scorer {

/// Whether it is so for any thread. What threads stored before is there after.
template <typename Team>
__device__ bool any_of_team(const Team& team, bool is_so, int* flag) {
    if (team.thread() == 0) *flag = 0;
    team.sync();  // the flag is clear before anybody sets it
    if (is_so) *flag = 1;
    team.sync();  // all have spoken
    return *flag != 0;
}

/// Whether this team is the last of `count` to come here; all that they stored before is then visible to it. `delayed`: a
/// stress test's switch, it first waits for up to some 65 microseconds, so that any order of arrival happens.
template <typename Team>
__device__ bool take_ticket(int32_t* ticket, int count, const Team& team, int* flag, bool delayed) {
    if (delayed) __nanosleep(static_cast<unsigned>(clock()) & 0xFFFF);
    __threadfence();  // what this thread stored is visible to the GPU before …
    team.sync();      // … the whole team's ticket is taken; and nobody still reads the flag's last value
    if (team.thread() == 0) {
        const bool is_last = atomicAdd(ticket, 1) == count - 1;
        if (is_last) *ticket = 0;
        *flag = is_last;
    }
    team.sync();  // the flag is there
    const bool is_last = *flag != 0;
    __threadfence();  // what others stored before their tickets is read after this
    return is_last;
}

/// What a team does when it has stored its slots of (tile, group). Whether it has ended the launch: then all scores are
/// there, and it is to choose. (Not here: in the loop of a persistent kernel the choice would cost registers.)
template <int ROWS, bool SPREAD, typename Team>
__device__ bool finish_item(const ScorerArgs& args, int tile, const Team& team, float* shared /* [threads] */,
                            int* flag) {
    if (!take_ticket(args.tickets + tile, args.groups, team, flag, args.delayed)) return false;
    const int64_t capacity = static_cast<int64_t>(args.row_tiles) * ROWS;
    for (int row = team.thread(); row < ROWS; row += team.threads()) {
        fold_token<SPREAD>(args, capacity, tile * ROWS + row);
    }
    const Range blocks = blocks_of_tile(args, tile, ROWS);
    for (int block = blocks.first; block <= blocks.last; ++block) {
        const int spans = tiles_of_block(args, block, ROWS);
        if (!take_ticket(args.tickets + args.row_tiles + block, spans, team, flag, args.delayed)) continue;
        fold_examples(args, block, team, shared);
        if (!take_ticket(args.tickets + args.row_tiles + args.blocks, args.blocks, team, flag, args.delayed)) {
            continue;
        }
        fold_blocks(args, team, shared);
        return true;  // nothing comes after all blocks
    }
    return false;
}

/// The choice by the launch's scores, by the team that has ended it. `stages`: nobody loads or multiplies them any more.
template <typename Team>
__device__ void choose(const ScorerArgs& args, const Team& team, unsigned char* stages) {
    if (args.choice.index == nullptr) return;
    using Shared = SelectShared<1024>;
    static_assert(sizeof(Shared) <= 48 << 10 && Team::threads() * 4 <= 1024);
    const SelectArgs<float> choice{args.choice.score,     args.valid,          args.batch,
                                   args.choice.k,         args.choice.k_floor, args.choice.temperature,
                                   args.choice.seed,      args.choice.index,   args.choice.chosen_score,
                                   args.choice.inclusion, args.selection};
    team.sync();  // the folds' use of the memory is over
    select_in_block(Team::block(), choice, *reinterpret_cast<Shared*>(stages));
}

/// ‖h‖² of a tile's rows, for the score "head" of examples of one token: a warp a row.
template <typename T, int ROWS, typename Team>
__device__ void store_hidden_squares(const ScorerArgs& args, int tile, const Team& team) {
    const int lane = team.thread() % 32;
    for (int r = team.thread() / 32; r < ROWS; r += team.threads() / 32) {
        const int row = tile * ROWS + r;
        const T* hidden = static_cast<const T*>(args.hidden) + hidden_offset(args, row);
        float square = 0.0f;
        for (int i = lane; i < args.width; i += 32) {
            const float h = to_float32(hidden[i * args.hidden_column]);
            square = fmaf(h, h, square);
        }
        for (int step = 16; step > 0; step /= 2) square += __shfl_xor_sync(0xffffffffu, square, step);
        if (lane == 0) args.hidden_square[row] = square;
    }
}

}  // namespace attent::gpu::scorer
